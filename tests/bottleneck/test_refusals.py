"""Mistakes end in one line that names the key, the value and what is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from leantune.bottleneck import BottleneckConfig
from leantune.errors import UserError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0: must be a whole number, 1 or more"),
        ({"r": 2.0}, "r=2.0: must be a whole number, 1 or more"),
        ({"r": True}, "r=True: must be a whole number, 1 or more"),
        ({"rank_pattern": {"wo": -1}}, "rank_pattern['wo']=-1: must be a whole number, 1 or more"),
        ({"bottleneck_alpha": 0}, "bottleneck_alpha=0: must be a number above 0"),
        ({"bottleneck_alpha": "4"}, "bottleneck_alpha='4': must be a number above 0"),
        ({"alpha_pattern": {"wo": None}}, "alpha_pattern['wo']=None: must be a number above 0"),
        ({"bottleneck_dropout": 1.0}, "bottleneck_dropout=1.0: must be a number in [0, 1)"),
        ({"bottleneck_dropout": float("nan")}, "bottleneck_dropout=nan: must be a number in [0, 1)"),
        ({"mode": "sequential"}, "mode='sequential': must be one of 'serial', 'parallel'"),
        ({"placement": "ffn"}, "placement='ffn': must be one of 'houlsby', 'pfeiffer'"),
        ({"activation": "elu"}, "activation='elu': must be one of 'relu', 'gelu', 'silu', 'swish', 'tanh'"),
        ({"bottleneck_bias": "none"}, "bottleneck_bias='none': must be one of True, False"),
        ({"init_weights": "zero"}, "init_weights='zero': must be one of True, False"),
        ({"target_modules": ".*o", "layers_to_transform": 0}, "layers_to_transform=0: cannot be combined"),
        ({"target_modules": ["wo"], "layers_pattern": "h"}, "layers_pattern='h': needs layers_to_transform"),
        ({"layers_pattern": "h", "layers_to_transform": 1}, "layers_pattern='h': needs target_modules"),
    ],
)  # fmt: skip
def test_config(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        BottleneckConfig(**settings)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_layers_that_are_not_linear() -> None:
    stack = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="layer '0' is a Embedding"):
        get_peft_model(stack, BottleneckConfig(target_modules=["0"]))


def test_targets_cannot_be_chosen_where_there_is_no_transformers_model() -> None:
    with pytest.raises(UserError, match="target_modules=None: Sequential holds no transformers model"):
        get_peft_model(nn.Sequential(nn.Linear(8, 8)), BottleneckConfig())


def test_any_floating_width_of_quantised_weights_gets_a_whole_dtype() -> None:
    """Weights of one byte (int8, float8) say nothing of the dtype that the adapter should have."""
    from leantune.bottleneck.layer import BottleneckLinear

    for dtype in (torch.int8, torch.float8_e4m3fn):
        linear = nn.Linear(8, 8)
        linear.weight = nn.Parameter(linear.weight.data.to(dtype), requires_grad=False)
        assert BottleneckLinear(linear)._place()[1] is torch.get_default_dtype()
