"""Tiny adapted models that the bottleneck tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from leantune.bottleneck import BottleneckConfig
from tests.tiny_models import batch_for, tiny

TASKS = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "classification", "t5": "seq2seq"}
TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
TARGETS = {
    "llama": ["o_proj", "down_proj"],
    "gpt2": ["c_proj"],  # Conv1D
    "bert": ["output.dense"],
    "t5": ["o", "wo"],
}
NAMES = ("bottleneck_down", "bottleneck_down_bias", "bottleneck_up", "bottleneck_up_bias")


def pytest_configure(config: pytest.Config) -> None:
    # PEFT 0.21 asks transformers 5.23 for the old name of a property; nothing that we can mend.
    config.addinivalue_line(
        "filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    )


def base(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return tiny(family, TASKS[family], dtype)


def config_for(family: str, **settings: Any) -> BottleneckConfig:
    settings = {"r": 4, "target_modules": TARGETS[family], "task_type": TASK_TYPES[family], **settings}
    return BottleneckConfig(**settings)


def trained(family: str, **settings: Any) -> PeftModel:
    """As after training: no parameter of the adapter is zero."""
    torch.manual_seed(0)
    return get_peft_model(base(family), config_for(family, init_weights=False, **settings))


@pytest.fixture(params=sorted(TARGETS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["serial", "parallel"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """Logits of a model in eval mode on the family's batch; the model's mode is restored."""

    def compute(model: Any, family: str, **kwargs: Any) -> torch.Tensor:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            result = model(**batch_for(family, TASKS[family]), **kwargs).logits
        model.train(was_training)
        return result

    return compute
