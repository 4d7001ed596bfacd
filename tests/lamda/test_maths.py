"""The layer computes the formula: against an explicit float64 reference and against PSOFT."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import PsoftConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from leantune import LamdaConfig
from leantune.lamda import freeze_columns
from leantune.lamda.layer import LamdaLinear
from leantune.lamda.model import lamda_layers
from tests.lamda.conftest import batch_for, build, perturb


class Two(nn.Module):
    """Two layers, so that gradients pass through an adapted one to another."""

    def __init__(self, conv: bool = False) -> None:
        super().__init__()
        self.first = Conv1D(9, 7) if conv else nn.Linear(7, 9)
        self.second = Conv1D(5, 9) if conv else nn.Linear(9, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(conv: bool = False, **settings: object) -> tuple[nn.Module, dict[str, LamdaLinear]]:
    torch.manual_seed(0)
    base = Two(conv).double()
    model = get_peft_model(base, LamdaConfig(r=4, target_modules=["first", "second"], **settings))
    perturb(model, scale=0.5)
    return model, {name.rpartition(".")[2]: layer for name, layer in lamda_layers(model).items()}


def reference(
    layers: dict[str, LamdaLinear], x: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """W x + s (B S A - B0 S0 A) x with S = S0 + dS and B = B0 + dB: the paper's form, its start taken out."""
    leaves = {}
    h = x
    for name, layer in layers.items():
        base = layer.base_layer
        W = base.weight.T if isinstance(base, Conv1D) else base.weight
        A = layer.lamda_A["default"]
        S0 = torch.diag(layer.lamda_S0["default"]) if "default" in layer.lamda_S0 else torch.eye(4).double()
        B0 = layer.lamda_B0["default"] if "default" in layer.lamda_B0 else torch.zeros(W.shape[0], 4).double()
        dS = layer.lamda_S["default"].detach().clone().requires_grad_()
        dB = layer.joined_columns("default").clone().requires_grad_()
        leaves[f"{name}.S"], leaves[f"{name}.B"] = dS, dB
        delta = layer.scaling["default"] * ((B0 + dB) @ (S0 + dS) @ A - B0 @ S0 @ A)
        h = h @ (W + delta).T + (0 if base.bias is None else base.bias)
        h = torch.tanh(h) if name == "first" else h
    return h, leaves


SETTINGS = list(itertools.product(["spectrum", "normalized", "identity"], ["vectors", "zero"], [None, 2.0]))


@pytest.mark.parametrize(("scale", "init_b", "alpha"), SETTINGS)
@pytest.mark.parametrize("frozen", [0, 1, 4])
def test_forward_and_gradients_equal_the_formula(
    scale: str, init_b: str, alpha: float | None, frozen: int
) -> None:
    model, layers = adapted(init_scale=scale, init_b=init_b, lamda_alpha=alpha, freeze_ratio=1.0)
    freeze_columns(model, None, frozen, 4)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    expected, leaves = reference(layers, x_theirs)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    result = model(x_ours)
    (result * weight).sum().backward()

    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=0, atol=1e-12)
    for name, layer in layers.items():
        torch.testing.assert_close(
            layer.lamda_S["default"].grad, leaves[f"{name}.S"].grad, rtol=0, atol=1e-12
        )
        if frozen == 4:
            assert layer.lamda_B["default"].shape == (layer.out_features, 0)
            assert layer.lamda_B["default"].grad is None
        else:
            theirs = leaves[f"{name}.B"].grad[:, frozen:]
            torch.testing.assert_close(layer.lamda_B["default"].grad, theirs, rtol=0, atol=1e-12)


def test_gradcheck_of_the_function() -> None:
    from leantune.lamda.function import LowRank

    torch.manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    z, S, B = numbers(2, 3, 4), numbers(4, 4), numbers(5, 3)
    S0, B0, frozen = (t.detach() for t in (numbers(4), numbers(5, 4), numbers(5, 1)))
    for s0, b0 in itertools.product((S0, None), (B0, None)):
        assert torch.autograd.gradcheck(
            lambda *t, s=s0, b=b0: LowRank.apply(*t, s, b, frozen, 0.7, 0), (z, S, B)
        )


def test_held_columns_get_no_gradient_and_the_others_the_same() -> None:
    model, layers = adapted(init_b="vectors")
    x = torch.randn(6, 7, dtype=torch.float64)
    model(x).square().sum().backward()
    free = {name: layer.lamda_B["default"].grad.clone() for name, layer in layers.items()}
    model.zero_grad()
    for layer in layers.values():
        layer.held["default"] = 3
    model(x).square().sum().backward()
    for name, layer in layers.items():
        grad = layer.lamda_B["default"].grad
        assert not grad[:, :3].any()
        assert torch.equal(grad[:, 3:], free[name][:, 3:])


@pytest.mark.parametrize("conv", [False, True])
def test_delta_weight_is_what_forward_adds(conv: bool) -> None:
    model, layers = adapted(conv=conv, init_scale="spectrum", init_b="vectors")
    x = torch.randn(6, 7, dtype=torch.float64)
    layer = layers["first"]
    added = layer(x) - layer.base_layer(x)
    delta = layer.get_delta_weight("default")
    assert delta.shape == layer.base_layer.weight.shape
    torch.testing.assert_close(added, x @ (delta if conv else delta.T), rtol=0, atol=1e-12)


def test_dropout_acts_on_the_projection() -> None:
    model, layers = adapted(lamda_dropout=0.5)
    layer = layers["first"].train()
    x = torch.randn(2000, 7, dtype=torch.float64)
    left, A = layer.lora_factors("default")
    torch.manual_seed(5)
    added = layer(x) - layer.base_layer(x)
    torch.manual_seed(5)
    torch.testing.assert_close(added, F.dropout(x @ A.T, 0.5) @ left.T, rtol=0, atol=1e-10)
    layer.eval()
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ A.T @ left.T, rtol=0, atol=1e-10)


def test_psoft_is_lamda_with_b_frozen_from_the_start() -> None:
    """PEFT's PSOFT without its extras trains the same matrix between the same fixed factors."""
    config = PsoftConfig(
        r=4, target_modules=["q_proj", "v_proj"], psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False
    )
    base = build("llama")
    psoft = get_peft_model(copy.deepcopy(base), config)
    ours = get_peft_model(
        base, LamdaConfig(r=4, target_modules=["q_proj", "v_proj"], init_b="vectors", freeze_ratio=0.0)
    )
    theirs = dict(psoft.named_modules())
    for name, layer in lamda_layers(ours).items():
        A, B = theirs[name]._get_psoft_ab_cache_buffers("default")
        layer.lamda_A["default"], layer.lamda_B0["default"] = A.clone(), B * theirs[name].scaling["default"]
    freeze_columns(ours, None, 0, 20)
    losses = []
    for model in (psoft, ours):
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert len(parameters) == 4
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        losses.append([])
        for step in range(20):
            loss = model(**batch_for("llama", seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][0] - losses[0][-1] != 0
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=2e-6)
