"""How much each module of an adapter, and each rank of a module, does for the task.

Running sums stay on the device; what leaves a layer is a handful of numbers, never a tensor of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from leantune.anatomy import find_head, find_stacks
from leantune.errors import UserError
from leantune.lightpeft.adapters import Axes, adapter_layers, adapter_output
from leantune.lightpeft.shared import sum_over_processes, whole


class ModuleImportance:
    """IM of every adapted module: ‖what the adapter adds‖₂ / ‖frozen output‖₂, averaged over tokens.

    Every real token of every measured step counts alike. Padding is told by the forward's `attention_mask`
    (on a decoder's side `decoder_attention_mask`, or the labels' end). A call whose output has the shape of
    no mask — pooled vectors, TokenTune's second pass — counts only for modules that were never called with
    one that fits. A token whose frozen output is zero has no ratio and is left out.

    Args:
        model: With the adapter.
        adapter_name: The adapter.

    Attributes:
        active: Whether calls are measured; in training mode only.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.active = False
        self.adapter_name = adapter_name
        self.layers: dict[str, Any] = dict(adapter_layers(model))
        self._dropouts = {name: _dropouts(layer) for name, layer in self.layers.items()}
        self._rows = {name: row for row, name in enumerate(self.layers)}
        # Output of the frozen layer whose adapter is running. One place for all: checkpointing's replay stops
        # in the middle of a layer, and must not leave one behind in each.
        self._frozen: tuple[str, Tensor] | None = None
        head = find_head(model)
        self._tokens = _Tokens(head)
        self._handles = [head.register_forward_pre_hook(self._tokens.catch, with_kwargs=True)]
        for name, layer in self.layers.items():
            self._handles.append(layer.base_layer.register_forward_hook(partial(self._keep, name)))
            self._handles.append(layer.register_forward_hook(partial(self._measure, name)))
        self.reset()

    def reset(self) -> None:
        """Forget everything measured; sums go where the model is now."""
        device = next(next(iter(self.layers.values())).parameters()).device
        # Σ ratio and tokens of calls with a fitting mask, the same of the others: (modules, 4)
        self._sums = torch.zeros(len(self.layers), 4, dtype=_wide(device), device=device)
        self._step = torch.zeros_like(self._sums)  # of the step in progress, in this process
        self._frozen = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def step(self) -> None:
        """Enter what was measured since the last step, on all processes: reading then needs no talk."""
        if self.active:
            self._sums += sum_over_processes(self._step)
            self._step.zero_()
        self._frozen = None

    @contextmanager
    def unmeasured(self) -> Iterator[None]:
        """What passes in here measure is dropped."""
        before = self._step.clone()
        try:
            yield
        finally:
            self._step.copy_(before)

    def forget_step(self) -> None:
        """Drop what was measured since the last step."""
        self._step.zero_()
        self._frozen = None

    def read(self) -> dict[str, float]:
        """IM by module name.

        Raises:
            UserError: A module was not measured.
        """
        fitting, others = self._sums.cpu().split(2, dim=1)
        total, count = torch.where(fitting[:, 1:] > 0, fitting, others).unbind(1)
        return {name: float(total[i] / _measured(count[i], name)) for i, name in enumerate(self.layers)}

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return {"module_sums": self._sums}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors` of `state`."""
        self.reset()
        _load(self._sums, tensors, "module_sums")

    def _keep(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.active and self.layers[name].training:
            self._frozen = (name, output.detach())

    @torch.no_grad()
    def _measure(self, name: str, layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        held, self._frozen = self._frozen, None
        if held is None or held[0] != name or layer.disable_adapters or layer.merged:
            return
        frozen = held[1]
        for dropout in self._dropouts[name]:  # draws nothing: training goes on as if this had not run
            dropout.training = False
        added = adapter_output(layer, self.adapter_name, args[0].detach(), frozen)
        for dropout in self._dropouts[name]:
            dropout.training = True
        ratio = _norm(added) / _norm(frozen)  # (...,)
        weights = self._tokens.weights(name, ratio)
        real = ratio.isfinite() if weights is None else ratio.isfinite() & weights
        ratio = torch.where(real, ratio, 0.0)
        sums = torch.stack([ratio.sum(dtype=self._step.dtype), real.sum(dtype=self._step.dtype)])
        column = 2 if weights is None and self._tokens.known(name) else 0
        self._step[self._rows[name], column : column + 2] += sums.to(self._step.device)


class RankImportance:
    """First-order Taylor importance of every rank of every adapted module, averaged over steps.

    From the tensors that are trained and have a rank axis. `terms`: Σ|w·g| over a tensor's other axes;
    `sum`: |Σ w·g| of each tensor; tensors are added up. A tensor with two rank axes (LaMDA's S) enters by
    rows and by columns.

    Args:
        model: With the adapter.
        adapter_name: The adapter.
        axes: Its tensors' axes (`adapter_axes`).
        variant: `terms` or `sum`.

    Attributes:
        active: Whether steps are measured.
    """

    def __init__(self, model: nn.Module, adapter_name: str, axes: Axes, variant: str) -> None:
        self.active = False
        self.adapter_name, self.variant = adapter_name, variant
        self.axes = {name: names for name, names in axes.items() if "rank" in names}
        self.layers: dict[str, Any] = dict(adapter_layers(model))
        self._ranks = {name: self._rank(name, layer) for name, layer in self.layers.items()}
        self.reset()

    def reset(self) -> None:
        """Forget everything measured; sums go where the model is now."""
        device = next(next(iter(self.layers.values())).parameters()).device
        self._sums = torch.zeros(sum(self._ranks.values()), dtype=_wide(device), device=device)
        self._count = torch.zeros((), dtype=_wide(device), device=device)  # steps

    @torch.no_grad()
    def step(self) -> None:
        """Enter the gradients of a step, after they were clipped and before the optimizer uses them.

        Clipping scales all gradients of a step alike: ranks compare as they would without, the step weighs
        less. DDP and FSDP2 have averaged them, so all processes enter the same. A step with a gradient that
        is not finite is left out, as the loss scaler leaves it out.
        """
        if not self.active:
            return
        scores = [self._scores(name).to(self._sums) for name in self.layers]
        flat = torch.cat(scores)  # (ranks of all modules,)
        finite = flat.isfinite().all()
        self._sums += torch.where(finite, flat, 0.0)
        self._count += finite

    def read(self) -> dict[str, Tensor]:
        """Importance of each rank by module name, (r,).

        Raises:
            UserError: No step was measured.
        """
        mean = (self._sums / _measured(self._count, "the adapter's ranks")).cpu()
        return dict(zip(self.layers, mean.split(list(self._ranks.values())), strict=True))

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return {"rank_sums": self._sums, "rank_steps": self._count}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from `tensors` of `state`."""
        self.reset()
        _load(self._sums, tensors, "rank_sums")
        _load(self._count, tensors, "rank_steps")

    def _tensor(self, layer: Any, name: str) -> Tensor | None:
        held: Any = getattr(layer, name)
        if self.adapter_name not in held:
            return None
        tensor: Any = held[self.adapter_name]
        return getattr(tensor, "weight", tensor)

    def _rank(self, name: str, layer: Any) -> int:
        sizes = [
            tensor.shape[names.index("rank")]
            for tensor_name, names in self.axes.items()
            if (tensor := self._tensor(layer, tensor_name)) is not None
        ]
        if not sizes:
            raise UserError(f"Light-PEFT finds no ranks in {name!r} ({type(layer).__name__})")
        return max(sizes)  # a LaMDA adapter's B may have lost frozen columns

    def _scores(self, name: str) -> Tensor:
        """Of one module at this step, (r,)."""
        layer, r = self.layers[name], self._ranks[name]
        scores = torch.zeros(r, device=self._sums.device, dtype=self._sums.dtype)
        for tensor_name, axes in self.axes.items():
            tensor = self._tensor(layer, tensor_name)
            if tensor is None or tensor.grad is None:
                continue
            products = whole(tensor).to(scores) * whole(tensor.grad).to(scores)
            for axis in (i for i, label in enumerate(axes) if label == "rank"):
                rows = products.movedim(axis, 0).reshape(products.shape[axis], -1)  # (r, …)
                score = rows.abs().sum(1) if self.variant == "terms" else rows.sum(1).abs()
                scores[r - len(score) :] += score  # LaMDA freezes leading columns
        return scores


class _Tokens:
    """Which tokens of the forward in progress are real."""

    def __init__(self, head: PreTrainedModel) -> None:
        self._parameters = list(signature(type(head).forward).parameters)[1:]
        self._two_sided = bool(getattr(head.config, "is_encoder_decoder", False))
        stacks = find_stacks(head) if self._two_sided else ()
        names = [name for stack in stacks if stack.side == "decoder" for name in stack.names]
        self._decoder = tuple(f"{name}." for name in names)
        self._masks: dict[str, Tensor | None] = {}

    def catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the head model."""
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        decoder, labels = given.get("decoder_attention_mask"), given.get("labels")
        if decoder is None and self._two_sided and isinstance(labels, Tensor) and labels.dim() == 2:
            # no mask is customary here: what bears no label after the last label is padding
            decoder = (labels != -100).flip(1).cummax(1).values.flip(1)
        self._masks = {"encoder": given.get("attention_mask"), "decoder": decoder}

    def known(self, name: str) -> bool:
        """Whether the sequence that module `name` sees came with a mask."""
        return self._masks.get(self._side(name)) is not None

    def weights(self, name: str, like: Tensor) -> Tensor | None:
        """True for real tokens, in the shape of `like`, (batch, n) or (batch · n,); None if no mask fits."""
        own, other = self._side(name), "encoder"  # a decoder's cross-attention reads the encoder's tokens
        for mask in (self._masks.get(own), self._masks.get(other)):
            if isinstance(mask, Tensor) and mask.dim() >= 2:
                rows = mask.flatten(0, -2)  # multiple choice: (batch, choices, n)
                if tuple(like.shape) in (tuple(rows.shape), (rows.numel(),)):
                    return rows.reshape(like.shape).bool().to(like.device)
        return None

    def _side(self, name: str) -> str:
        return "decoder" if self._decoder and name.startswith(self._decoder) else "encoder"


def _dropouts(layer: nn.Module) -> list[nn.Module]:
    return [
        module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Dropout) and not name.startswith("base_layer")
    ]


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _measured(count: Tensor, what: str) -> Tensor:
    if not count > 0:
        raise UserError(
            f"the importance of {what} was not measured: it is in the second half of the estimation's steps, "
            f"in training"
        )
    return count


def _load(target: Tensor, tensors: dict[str, Tensor], name: str) -> None:
    stored = tensors.get(name)
    if stored is None or stored.shape != target.shape:
        raise UserError(
            f"the checkpoint's {name} do not fit this model's adapter (another adapter, or other settings)"
        )
    target.copy_(stored)
