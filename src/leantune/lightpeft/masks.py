"""Masks: one number per head or FFN neuron, learned beside the adapter.

A unit's mask scales the unit's features where they enter the output projection of their block. A forward
pre-hook does it, on the layer as it stands in the model: on an adapted output projection that is PEFT's
layer, so base and adapter both read the masked input. Masks are leaf tensors that belong to no module: the
Trainer's optimizer, DDP's buckets, state dicts and PEFT's files know nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leantune.anatomy import find_head
from leantune.anatomy.blocks import Group
from leantune.errors import UserError
from leantune.lightpeft.config import LightPeftConfig
from leantune.lightpeft.shared import processes, sum_over_processes


class Masks:
    """The masks of one model, the hooks that apply them, and their optimizer.

    The penalty λ Σ|m| enters as its gradient λ·sign(m) when a step is taken, not through the loss: it is then
    the same under gradient accumulation, loss scaling and DDP, and the logged loss stays the task's. Adam's
    learning rate is constant: masks rank units, and a decay would weigh early steps over late ones.

    Args:
        model: Holds the output projections.
        groups: One mask is made for each.
        config: λ_A, λ_F and the learning rate.

    Attributes:
        values: The masks by name of the group, (count,) float32, ones at the start.
    """

    def __init__(self, model: nn.Module, groups: Iterable[Group], config: LightPeftConfig) -> None:
        self.config = config
        self.values: dict[str, Tensor] = {}
        self._outputs: dict[str, nn.Module] = {}
        self._penalty: dict[str, float] = {}
        self._handles: list[Any] = []
        weights = {"heads": config.lambda_heads, "neurons": config.lambda_neurons}
        head = find_head(model)
        for group in groups:
            outputs = [head.get_submodule(cut.module) for cut in group.outputs]
            self._outputs[group.name] = outputs[0]
            self._penalty[group.name] = weights[group.kind]
            self.values[group.name] = torch.ones(group.count)
            hook = partial(self._scale_input, group.name)
            self._handles += [output.register_forward_pre_hook(hook) for output in outputs]
        self.reset()

    def reset(self) -> None:
        """Back to ones, on the devices where the output projections are now, with a new optimizer."""
        for name, value in self.values.items():
            device = next(self._outputs[name].parameters()).device
            self.values[name] = torch.ones(len(value), device=device, requires_grad=True)
        self._new_optimizer()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def step(self, scaler: Any = None) -> None:
        """One optimizer step on the gradients that the step's backward passes left, which are then dropped.

        Gradients are averaged over processes, as DDP does it with the parameters'.

        Args:
            scaler: The loss scaler (`torch.amp.GradScaler`) of fp16 training: gradients are divided by its
                scale, and the step is left out where they are not finite.
        """
        if not self.values:
            return
        flat = self._flat_gradient()  # (units,)
        if scaler is not None:
            flat /= scaler.get_scale()
        flat = sum_over_processes(flat) / processes()
        if scaler is None or bool(flat.isfinite().all()):
            pieces = flat.split([len(value) for value in self.values.values()])
            for (name, value), piece in zip(self.values.items(), pieces, strict=True):
                value.grad = piece.to(value) + self._penalty[name] * value.detach().sign()
            self._optimizer.step()
        self._optimizer.zero_grad()

    def forget_step(self) -> None:
        """Drop the gradients of the passes since the last step."""
        for value in self.values.values():
            value.grad = None

    def state(self) -> dict[str, Tensor]:
        """Masks and Adam's state as tensors by name."""
        tensors = {}
        for name, value in self.values.items():
            tensors[f"mask.{name}"] = value.detach()
            for key, held in self._optimizer.state.get(value, {}).items():
                tensors[f"{key}.{name}"] = held
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors` of `state`.

        Raises:
            UserError: They are of another model or of other settings.
        """
        shapes = {name: len(value) for name, value in self.values.items()}
        stored = {key[5:]: len(value) for key, value in tensors.items() if key.startswith("mask.")}
        if shapes != stored:
            odd = sorted(set(shapes.items()) ^ set(stored.items()))[0][0]
            raise UserError(
                f"the checkpoint's masks are not this model's: {odd!r} has {stored.get(odd, 'no')} masks in "
                f"the checkpoint and {shapes.get(odd, 'no')} here (another model, or other ratios)"
            )
        self.reset()
        for name, value in self.values.items():
            value.copy_(tensors[f"mask.{name}"])
            held = {key: tensors.get(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if held["step"] is not None:
                # a copy, on the mask's device; Adam counts steps on the CPU
                self._optimizer.state[value] = {
                    key: tensor.clone() if key == "step" else tensor.to(value, copy=True)
                    for key, tensor in held.items()
                    if tensor is not None
                }

    def _new_optimizer(self) -> None:
        if self.values:
            self._optimizer = torch.optim.Adam(self.values.values(), lr=self.config.mask_learning_rate)

    def _flat_gradient(self) -> Tensor:
        """All masks' gradients in one vector, zeros where a layer was not used."""
        gradients = [
            torch.zeros_like(value) if value.grad is None else value.grad for value in self.values.values()
        ]
        return torch.cat([gradient.to(gradients[0].device) for gradient in gradients])

    def _scale_input(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return (_Scale.apply(x, self.values[name].to(x.device)), *args[1:])


class _Scale(torch.autograd.Function):
    """x (..., count · size) with the features of each unit times its mask (count,).

    Written out for the masks' gradient: autograd's own would sum over all tokens into a float16 or bfloat16
    number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x, mask)
        return _times(x, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:  # type: ignore[override]
        x, mask = ctx.saved_tensors
        # a product of a scaled gradient can be too large for float16
        wide = grad.float() if grad.dtype == torch.float16 else grad
        products = (wide * x).unflatten(-1, (len(mask), -1))  # (..., count, size)
        others = [*range(products.dim() - 2), products.dim() - 1]
        total = products.sum(others, dtype=torch.promote_types(products.dtype, mask.dtype))
        return (_times(grad, mask) if ctx.needs_input_grad[0] else None), total.to(mask.dtype)


def _times(x: Tensor, mask: Tensor) -> Tensor:
    return (x.unflatten(-1, (len(mask), -1)) * mask.to(x.dtype)[:, None]).flatten(-2)
