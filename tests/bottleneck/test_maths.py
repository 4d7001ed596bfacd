"""The layer computes the formula: against an explicit float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from leantune.bottleneck import BottleneckConfig
from leantune.bottleneck.config import ACTIVATION_NAMES
from leantune.bottleneck.function import _CastLinear
from leantune.bottleneck.layer import ACTIVATIONS, BottleneckLinear
from leantune.bottleneck.model import bottleneck_layers
from tests.bottleneck.conftest import NAMES

EXACT = {"rtol": 0, "atol": 1e-12}


class Two(nn.Module):
    """Two layers, so that gradients pass through an adapted one to another."""

    def __init__(self, conv: bool = False) -> None:
        super().__init__()
        self.first = Conv1D(9, 7) if conv else nn.Linear(7, 9)
        self.second = Conv1D(5, 9) if conv else nn.Linear(9, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(conv: bool = False, **settings: Any) -> tuple[nn.Module, dict[str, BottleneckLinear]]:
    torch.manual_seed(0)
    config = BottleneckConfig(
        **{"r": 4, "target_modules": ["first", "second"], "init_weights": False, **settings}
    )
    model = get_peft_model(Two(conv).double(), config)
    return model, {name.rpartition(".")[2]: layer for name, layer in bottleneck_layers(model).items()}


def reference(
    layers: dict[str, BottleneckLinear], x: torch.Tensor, scales: dict[str, float]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """y = f(x) + s (act(t D' + d) U' + u), t = f(x) or x, with matrices alone."""
    leaves = {}
    h = x
    for name, layer in layers.items():
        config, base = layer.config["default"], layer.base_layer
        W = base.weight.T if isinstance(base, Conv1D) else base.weight
        f = h @ W.T + (0 if base.bias is None else base.bias)
        mine = {
            key: getattr(layer, key)["default"].detach().clone().requires_grad_()
            for key in NAMES
            if "default" in getattr(layer, key)
        }
        leaves |= {f"{name}.{key}": value for key, value in mine.items()}
        t = f if config.mode == "serial" else h
        hidden = ACT2FN[config.activation](t @ mine[NAMES[0]].T + mine.get(NAMES[1], 0))
        h = f + scales[name] * (hidden @ mine[NAMES[2]].T + mine.get(NAMES[3], 0))
        h = torch.tanh(h) if name == "first" else h
    return h, leaves


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
@pytest.mark.parametrize("settings", [{}, {"bottleneck_alpha": 3.0, "bottleneck_bias": False}])
def test_forward_and_gradients_equal_the_formula(
    mode: str, activation: str, conv: bool, settings: dict[str, Any]
) -> None:
    model, layers = adapted(conv, mode=mode, activation=activation, rank_pattern={"second": 6}, **settings)
    scales = {"first": 0.75, "second": 0.5} if settings else {"first": 1.0, "second": 1.0}
    assert [layers[name].scaling["default"] for name in scales] == list(scales.values())
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    expected, leaves = reference(layers, x_theirs, scales)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    result = model(x_ours)
    (result * weight).sum().backward()

    torch.testing.assert_close(result, expected, **EXACT)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, **EXACT)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(leaves) == (4 if settings else 8)
    for name, layer in layers.items():
        for key in NAMES:
            if "default" in getattr(layer, key):
                grad = getattr(layer, key)["default"].grad
                torch.testing.assert_close(grad, leaves[f"{name}.{key}"].grad, **EXACT)


def test_activations_are_those_of_transformers() -> None:
    assert set(ACTIVATIONS) == set(ACTIVATION_NAMES)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    for name, function in ACTIVATIONS.items():
        assert torch.equal(function(x), ACT2FN[name](x)), name


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_the_function(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    numbers = [torch.randn(*s, dtype=torch.float64).requires_grad_() for s in (shape, (4, 6), (4,))]
    x, W, b = numbers[0], numbers[1], numbers[2] if bias else None
    torch.testing.assert_close(_CastLinear.apply(x, W, b), F.linear(x, W, b))
    assert torch.autograd.gradcheck(_CastLinear.apply, (x, W, b))


def test_dropout_acts_on_the_activated_bottleneck(mode: str) -> None:
    _, layers = adapted(mode=mode, bottleneck_dropout=0.5)
    layer = layers["first"].train()
    x = torch.randn(2000, 7, dtype=torch.float64)
    t = layer.base_layer(x) if mode == "serial" else x
    D, d, U, u = (getattr(layer, name)["default"] for name in NAMES)
    hidden = F.relu(t @ D.T + d)
    torch.manual_seed(5)
    added = layer(x) - layer.base_layer(x)
    torch.manual_seed(5)
    torch.testing.assert_close(added, F.dropout(hidden, 0.5) @ U.T + u, rtol=0, atol=1e-10)
    layer.eval()
    torch.testing.assert_close(layer(x) - layer.base_layer(x), hidden @ U.T + u, rtol=0, atol=1e-10)


def test_adapters_that_are_active_together_are_summed(mode: str) -> None:
    """A second one reads the same frozen output, not what the first made of it."""
    model, layers = adapted(mode="serial")
    second = BottleneckConfig(r=3, target_modules=["first", "second"], mode=mode, init_weights=False)
    model.add_adapter("second", second)
    layer = layers["first"]
    x = torch.randn(5, 7, dtype=torch.float64)
    frozen = layer.base_layer(x)
    each = [
        layer.adapter_output("default", frozen),
        layer.adapter_output("second", frozen if mode == "serial" else x),
    ]
    for active, expected in (("default", each[0]), ("second", each[1]), (["default", "second"], sum(each))):
        layer.set_adapter(active)
        torch.testing.assert_close(layer(x) - frozen, expected, **EXACT)
    layer.set_adapter("second")
    assert layer.reads_output == (mode == "serial")
    layer.set_adapter("default")
    assert layer.reads_output


def test_a_narrower_bottleneck_of_chosen_ranks_is_the_one_with_the_others_zero(mode: str) -> None:
    """What rank pruning relies on: the axes are as declared, and alpha follows the width."""
    settings = {"mode": mode, "activation": "gelu", "bottleneck_alpha": 6.0}
    model, layers = adapted(**settings)
    pruned, narrow = adapted(
        **settings, rank_pattern={"first": 3, "second": 1}, alpha_pattern={"first": 4.5, "second": 1.5}
    )
    kept = {"first": [0, 2, 3], "second": [1]}
    axes = type(model.base_model).tensor_axes_for(model.peft_config["default"])
    assert tuple(axes) == NAMES
    with torch.no_grad():
        for name, layer in layers.items():
            sizes = {"in": layer.in_features, "out": layer.out_features, "rank": 4}
            gone = [rank for rank in range(4) if rank not in kept[name]]
            for key, over in axes.items():
                tensor = getattr(layer, key)["default"]
                assert tensor.shape == tuple(sizes[axis] for axis in over)
                if "rank" in over:
                    part = tensor.index_select(over.index("rank"), torch.tensor(kept[name]))
                    getattr(narrow[name], key)["default"].copy_(part)
                else:
                    getattr(narrow[name], key)["default"].copy_(tensor)
            layer.bottleneck_up["default"][:, gone] = 0
            narrow[name].base_layer.load_state_dict(layer.base_layer.state_dict())
    x = torch.randn(6, 7, dtype=torch.float64)
    torch.testing.assert_close(pruned(x), model(x), **EXACT)
