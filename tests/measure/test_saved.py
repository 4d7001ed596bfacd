"""Bytes kept for backward: what counts, what does not."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leantune.measure import saved_activation_bytes, saved_storages

ROWS, WIDTH = 4, 8
ONE = ROWS * WIDTH * 4  # bytes of one float32 activation


class Net(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.how = how

    def body(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "checkpointed":
            return checkpoint(self.body, x, use_reentrant=False).sum()
        if self.how == "reentrant":
            return checkpoint(self.body, x.requires_grad_(), use_reentrant=True).sum()
        return self.body(x).sum()


def x() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, WIDTH)}


def test_each_storage_counts_once_and_weights_do_not() -> None:
    # the input (for first.weight), and the ReLU's output (for its own backward and for second.weight)
    assert saved_activation_bytes(Net(), x()) == 2 * ONE


def test_frozen_layers_keep_less() -> None:
    net = Net()
    net.first.requires_grad_(False)
    assert saved_activation_bytes(net, x()) == ONE
    net.requires_grad_(False)
    assert saved_activation_bytes(net, x()) == 0


def test_checkpointing_keeps_the_input_alone() -> None:
    assert saved_activation_bytes(Net("checkpointed"), x()) == ONE
    assert saved_activation_bytes(Net("reentrant"), x()) == ONE


class Keeper(torch.autograd.Function):
    """Keeps its input and a float copy past `save_for_backward`, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.A, ctx.tensors = x, (None, x.to(torch.float64), torch.arange(9))
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_what_functions_keep_as_attributes_counts() -> None:
    net = Net()
    net.requires_grad_(False)
    found = saved_storages(lambda: net(Keeper.apply(torch.randn(ROWS, WIDTH, requires_grad=True))))
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = sorted(size for place, size in found.items() if place not in weights)
    assert kept == [ONE, ONE, 2 * ONE]  # the ReLU's output; x and its copy in float64


def test_what_dies_before_the_end_does_not_count() -> None:
    weight = torch.ones(WIDTH, requires_grad=True)

    def forward() -> Tensor:
        lost = (torch.randn(1000, WIDTH) * weight).sum()
        del lost
        return (torch.randn(ROWS, WIDTH) * weight).sum()

    assert sum(saved_storages(forward, exclude={weight.untyped_storage().data_ptr()}).values()) == ONE


def test_the_model_is_as_before() -> None:
    net = Net().eval()
    net.dropout.train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    saved_activation_bytes(net, x())
    assert not net.training and not net.first.training and net.dropout.training
    assert all(parameter.grad is None for parameter in net.parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        saved_activation_bytes(net, {"x": torch.ones(ROWS, WIDTH)})
    assert torch.equal(torch.rand(1), expected)


def test_nothing_of_the_forward_pass_stays() -> None:
    outputs: list[weakref.ref[Tensor]] = []

    class Keeping(nn.Module):  # exp saves its own output
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            output = self.layer(x).exp()
            outputs.append(weakref.ref(output))
            return {"loss": output.sum()}

    saved_activation_bytes(Keeping(), {"x": torch.ones(2, 4)})
    gc.collect()
    assert outputs[0]() is None
