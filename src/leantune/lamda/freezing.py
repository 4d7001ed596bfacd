"""Gradual freezing of B: the schedule, the edit of parameters and optimizer state, the Trainer callback.

A frozen column keeps its values bit for bit. Where one process owns the parameter, frozen columns leave it:
parameter, gradient and optimizer state shrink, which is where the memory goes. Where several processes share
it (DDP, FSDP2), its shape must not change: gradients of frozen columns are zero, and whatever weight decay
and momentum still did to them is undone after each step. The same happens with optimizers whose state cannot
be cut by columns (factored or quantised state).
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from leantune.errors import UserError
from leantune.lamda.layer import LamdaLinear


def frozen_columns(step: int, total_steps: int, r: int, freeze_ratio: float) -> int:
    """How many of the r columns of B are frozen after optimizer step `step`: min(r, floor(r t / (eta T))).

    Exact: `freeze_ratio` counts as the decimal number that it is written as, so no column is late or early by
    a rounding error. METHODS 1, "Gradual freezing of B"; the schedule that the paper's constant was meant
    for.

    Args:
        step: Optimizer steps done, t >= 0.
        total_steps: Optimizer steps of the whole run, T >= 1.
        r: Rank.
        freeze_ratio: eta in [0, 1]; 0 freezes all columns from the start.

    Raises:
        UserError: A value is out of range.
    """
    for key, value, least in (("step", step, 0), ("total_steps", total_steps, 1), ("r", r, 1)):
        if value < least:
            raise UserError(f"{key}={value!r}: must be {least} or more")
    if not 0 <= freeze_ratio <= 1:
        raise UserError(f"freeze_ratio={freeze_ratio!r}: must be in [0, 1]")
    duration = Fraction(repr(float(freeze_ratio))) * total_steps
    return r if step >= duration else int(Fraction(r * step) / duration)


def freeze_columns(model: nn.Module, optimizer: Any, step: int, total_steps: int) -> int:
    """Freeze the columns of B that are due after optimizer step `step`; for training loops of your own.

    Call it after each `optimizer.step()`. The rank and `freeze_ratio` are those of each adapter. Adapters
    that are not being trained are left alone.

        for step in range(1, total_steps + 1):
            ...
            optimizer.step()
            optimizer.zero_grad()
            leantune.freeze_columns(model, optimizer, step, total_steps)

    Parameters named `lamda_B` are replaced by smaller ones, in the model and in the optimizer: do not hold on
    to the old ones. When all columns are frozen an empty parameter stays in the optimizer's group, so that
    its state can be saved and loaded as ever.

    Args:
        model: A model with LaMDA adapters, wrapped or not.
        optimizer: The `torch.optim.Optimizer` (or accelerate's wrapper of one), or None if there is none yet.
        step: Optimizer steps done so far in this run, from 0.
        total_steps: Optimizer steps of the whole run.

    Returns:
        Frozen columns in the model, all trained LaMDA adapters together.
    """
    keep_shape = _is_shared(model)
    total = 0
    for layer, adapter_name in _trained(model):
        config = layer.config[adapter_name]
        due = frozen_columns(step, total_steps, layer.r[adapter_name], config.freeze_ratio)
        layer.scheduled[adapter_name] = True
        if due > layer.frozen_columns(adapter_name) or layer.held[adapter_name]:
            _freeze(layer, adapter_name, due, optimizer, keep_shape)
        total += layer.frozen_columns(adapter_name)
    return total


def frozen_share(model: nn.Module) -> float | None:
    """Frozen columns of B over all columns, in [0, 1]; None where no LaMDA adapter is being trained."""
    layers = list(_trained(model))
    columns = sum(layer.r[adapter_name] for layer, adapter_name in layers)
    frozen = sum(layer.frozen_columns(adapter_name) for layer, adapter_name in layers)
    return frozen / columns if columns else None


def frozen_in_place(model: nn.Module) -> int:
    """Frozen numbers of B that are still in its parameter, because processes share it."""
    return sum(
        layer.held[adapter_name] * layer.lamda_B[adapter_name].shape[0]
        for layer, adapter_name in _trained(model)
    )


class LamdaFreezing(TrainerCallback, ExportableState):
    """Freezes the columns of B on schedule in any Trainer: `Trainer(..., callbacks=[LamdaFreezing()])`.

    Stateful: the schedule's length is in `trainer_state.json`, and a run that is interrupted and resumed ends
        with
    the same weights and optimizer state, bit for bit, as one that is not. Nothing happens for models without
    LaMDA adapters, so it can always be there.

    Args:
        total_steps: Length T of the schedule in optimizer steps. Default: the run's (`state.max_steps`).
    """

    def __init__(self, total_steps: int | None = None) -> None:
        self.total_steps = total_steps
        self._running_total = total_steps
        self._frozen = 0

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` holds: the schedule's length, and how many columns are frozen by now."""
        return {"args": {"total_steps": self._running_total}, "attributes": {"_frozen": self._frozen}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new Trainer is a new run: columns that an earlier one froze in this very model are trained again.

        (As they are when the adapter comes from a file.) It happens before the Trainer makes its optimizer.
        """
        model = kwargs.get("model")
        for layer, adapter_name in _trained(model) if model is not None else ():
            _release(layer, adapter_name)
            if layer.lamda_B_frozen[adapter_name].shape[1]:
                layer.split_columns(adapter_name, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the checkpoint's split on a resumed run; freeze what is due at the start (eta = 0)."""
        self._running_total = self.total_steps or state.max_steps
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        keep_shape = _is_shared(model)
        for layer, adapter_name in _trained(model):
            _release(layer, adapter_name)
            if state.global_step and not keep_shape:
                self._restore(layer, adapter_name, optimizer, state.global_step)
        self._frozen = freeze_columns(model, optimizer, state.global_step, self._running_total)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Runs after `optimizer.step()` and before a checkpoint is written."""
        total = self._running_total or state.max_steps
        self._frozen = freeze_columns(kwargs["model"], kwargs.get("optimizer"), state.global_step, total)

    def _restore(self, layer: LamdaLinear, adapter_name: str, optimizer: Any, step: int) -> None:
        """Split B as it was when the checkpoint was written.

        The Trainer has loaded B in one piece and the optimizer's state in the shape that it had; that shape
        says how many columns were frozen. An optimizer without state leaves it to the schedule.
        """
        r, parameter = layer.r[adapter_name], layer.lamda_B[adapter_name]
        due = frozen_columns(step, self._running_total or 1, r, layer.config[adapter_name].freeze_ratio)
        if optimizer is not None and not _holds(optimizer, parameter):
            return
        widths = {v.shape[1] for v in _state_of(optimizer, parameter).values() if v.ndim == 2}
        count = r - widths.pop() if len(widths) == 1 else due
        if count != layer.lamda_B_frozen[adapter_name].shape[1] and _can_cut(optimizer, parameter, r - count):
            _cut(layer, adapter_name, count, optimizer)


def _trained(model: nn.Module) -> Iterator[tuple[LamdaLinear, str]]:
    """Layers and names of the LaMDA adapters that are being trained."""
    for module in model.modules():
        if isinstance(module, LamdaLinear):
            for adapter_name, S in module.lamda_S.items():
                if S.requires_grad and adapter_name in module.active_adapters:
                    yield module, adapter_name


def _is_shared(model: nn.Module) -> bool:
    """Whether the parameters belong to more processes than this one (or a wrapper relies on shapes)."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        return True
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        return True
    return any(hasattr(p, "placements") or hasattr(p, "ds_id") for p in model.parameters())


# -- one layer -----------------------------------------------------------------------------------------------


def _freeze(layer: LamdaLinear, adapter_name: str, due: int, optimizer: Any, keep_shape: bool) -> None:
    """Bring the frozen columns of one layer to `due`, never to fewer."""
    parameter = layer.lamda_B[adapter_name]
    due = max(due, layer.frozen_columns(adapter_name))
    left = layer.r[adapter_name] - due
    if keep_shape or layer.held[adapter_name] or not _can_cut(optimizer, parameter, left):
        _hold(layer, adapter_name, due - layer.lamda_B_frozen[adapter_name].shape[1])
    else:
        _cut(layer, adapter_name, due, optimizer)


def _cut(layer: LamdaLinear, adapter_name: str, count: int, optimizer: Any) -> None:
    """Take columns out of the parameter, and out of what the optimizer knows about it."""
    old, new = layer.split_columns(adapter_name, count)
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state and new.shape[1]:
        optimizer.state[new] = {key: _last_columns(value, old, new) for key, value in state.items()}


def _last_columns(value: Any, old: Tensor, new: Tensor) -> Any:
    """The part of an optimizer's state that belongs to the columns which stay."""
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value  # a step count; or, on a resumed run, state that was cut before it was saved
    return value[:, old.shape[1] - new.shape[1] :].clone(memory_format=torch.contiguous_format)


def _can_cut(optimizer: Any, parameter: Tensor, left: int) -> bool:
    """Whether all of the optimizer's state on this parameter goes column by column."""
    fitting = {tuple(parameter.shape), (parameter.shape[0], left)}
    return all(
        tuple(v.shape) in fitting and v.is_floating_point()
        for v in _state_of(optimizer, parameter).values()
        if v.numel() != 1 or v.ndim == 2
    )


def _state_of(optimizer: Any, parameter: Tensor) -> dict[str, Tensor]:
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _holds(optimizer: Any, parameter: Tensor) -> bool:
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


@torch.no_grad()
def _hold(layer: LamdaLinear, adapter_name: str, count: int) -> None:
    """Freeze the first `count` columns in place: restore those held before, remember the new ones."""
    parameter = layer.lamda_B[adapter_name]
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    if local.ndim != 2 or (local.numel() and local.shape[1] != parameter.shape[1]):
        raise UserError(
            f"LaMDA cannot freeze columns of a parameter in pieces of shape {tuple(local.shape)}; "
            f"use FSDP2 (`fsdp_version: 2`), which splits by rows"
        )
    kept = layer.__dict__.get("_held_values", {}).get(adapter_name)
    if kept is not None:
        local[:, : kept.shape[1]] = kept
    layer.__dict__.setdefault("_held_values", {})[adapter_name] = local[:, :count].clone()
    layer.held[adapter_name] = count


def _release(layer: LamdaLinear, adapter_name: str) -> None:
    """Forget held columns; their values stay in the parameter."""
    layer.__dict__.get("_held_values", {}).pop(adapter_name, None)
    layer.held[adapter_name] = 0
