"""The start: exactly the base model; and the precision of what is computed on a bfloat16 base."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from leantune.bottleneck import BottleneckConfig
from leantune.bottleneck.layer import ACTIVATIONS
from leantune.bottleneck.model import bottleneck_layers
from tests.bottleneck.conftest import NAMES, TASKS, base, batch_for, config_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_zero_at_the_start(family: str, mode: str, dtype: torch.dtype) -> None:
    batch = batch_for(family, TASKS[family])
    plain = base(family, dtype)
    expected = plain(**batch).logits
    model = get_peft_model(base(family, dtype), config_for(family, r=32, mode=mode, bottleneck_dropout=0.3))
    assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.train()(**batch).logits, expected)
    for layer in bottleneck_layers(model).values():
        assert {getattr(layer, name)["default"].dtype for name in NAMES} == {torch.float32}
    model(**batch).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    ups = [grad for name, grad in grads.items() if ".bottleneck_up.default" in name]
    assert len(ups) == len(bottleneck_layers(model)) and all(grad.any() for grad in ups)


def test_down_does_not_depend_on_the_width() -> None:
    """Kaiming uniform with a = sqrt(5): var = 1 / (3 d), so unit inputs give a variance of a third."""
    torch.manual_seed(0)
    for width in (64, 1024):
        model = get_peft_model(
            nn.Sequential(nn.Linear(8, width)), BottleneckConfig(r=256, target_modules=["0"])
        )
        (layer,) = bottleneck_layers(model).values()
        down = layer.bottleneck_down["default"]
        assert down.shape == (256, width)
        assert (down.var() * 3 * width).item() == pytest.approx(1, rel=0.05)
        assert not layer.bottleneck_down_bias["default"].any()


def test_all_random_for_tests() -> None:
    model = get_peft_model(base("llama"), config_for("llama", init_weights=False))
    for layer in bottleneck_layers(model).values():
        assert all(getattr(layer, name)["default"].all() for name in NAMES)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_bfloat16_base_gradients_are_those_of_float32_but_for_rounding(
    mode: str, activation: str
) -> None:
    def gradients(dtype: torch.dtype, autocast: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        config = BottleneckConfig(
            r=8, mode=mode, activation=activation, target_modules=["0", "2"], init_weights=False
        )
        stack = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16))
        model = get_peft_model(stack.to(dtype), config)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape) * 0.2
        x = torch.randn(64, 32).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x)
        assert out.dtype == (torch.bfloat16 if autocast else dtype)
        out.float().square().mean().backward()
        assert x.grad.dtype == dtype
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert {grad.dtype for grad in found.values()} == {torch.float32}
        return {**found, "x": x.grad.float()}

    expected = gradients(torch.float32)
    assert len(expected) == 9
    for found in (gradients(torch.bfloat16), gradients(torch.float32, True), gradients(torch.bfloat16, True)):
        for name, grad in expected.items():
            assert (found[name] - grad).norm() < 0.03 * grad.norm(), name
