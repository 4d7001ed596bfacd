"""The traced engine: the real model's real code, run for one training step on fake tensors.

The peak is the largest sum of living storages between the start of a step and its end, with the optimizer's
state in place. It equals what the CPU's allocator gives out in the same step, kernels' own workspaces aside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from leantune.anatomy import find_head
from leantune.errors import UserError
from leantune.planner.building import build_fake, undisturbed
from leantune.planner.forecast import Figures, Memory
from leantune.planner.setting import Setting, check
from leantune.planner.step import Saved, Step, kernels, make_batch, make_optimizer
from leantune.planner.tracker import Tracker, UnanswerableError
from leantune.tokentune.attach import tuner_of

_HEAD = ("head", "head backward")
_UNTRACEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnanswerableError,
    NotImplementedError,
)


class CannotTrace(UserError):  # noqa: N818 - it is an answer: use the other engine
    """The model's code cannot run without numbers; the closed form may still answer."""


def trace(setting: Setting) -> Figures:
    """Forecast one training step by running it on fake tensors.

    Args:
        setting: What to train and on which batch.

    Returns:
        The figures, equal to what the CPU's allocator would show.

    Raises:
        CannotTrace: The model's code needs numbers that only weights give.
        UserError: The setting is refused, or a method does not fit the model.
    """
    return Tracer().trace(setting)


class Tracer:
    """Traces one setting after another.

    The last model is kept: settings that differ from it in the batch, or in how many tokens are chosen, need
    no new one (with token selection, making one costs several steps' time).
    """

    def __init__(self) -> None:
        self._made: tuple[Any, nn.Module, Tracker] | None = None

    def trace(self, setting: Setting) -> Figures:
        """As the function `trace`."""
        check(setting)
        try:
            model, tracker = self._model(setting)
            with undisturbed():
                return _traced(model, setting, tracker)
        except _UNTRACEABLE as error:
            self._made = None
            name = (setting.config.architectures or [type(setting.config).__name__])[0]
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise CannotTrace(f"{name} cannot be traced without weights: {reason[:160]}") from None

    def evaluation_peak(self, setting: Setting, batch: int) -> int:
        """Bytes at the peak of a forward pass without gradient, the optimizer's state in place.

        Args:
            setting: As of `trace`.
            batch: Rows; the recipe's `eval_batch_size`.

        Raises:
            CannotTrace, UserError: As `trace`.
        """
        model, tracker = self._model(setting)
        with undisturbed(), tracker:
            optimizer = make_optimizer(model, setting)
            rows = make_batch(replace(setting, batch=batch))
            start = len(tracker.events)
            model.eval()
            with torch.no_grad(), kernels(setting):
                output = model(**rows)
            del output, optimizer
        model.train()
        return tracker.peak(start)[0]

    def _model(self, setting: Setting) -> tuple[nn.Module, Tracker]:
        key = _identity(setting)
        if self._made is None or self._made[0] != key:
            self._made = None  # let the old one go first
            tracker = Tracker()
            self._made = (key, build_fake(setting, tracker), tracker)
        _, model, tracker = self._made
        tuner, tokens = tuner_of(find_head(model)), setting.recipe.lean.tokens
        if tuner is not None and tokens is not None:
            tuner.config, tuner.step = replace(tuner.config, keep=tokens.keep), 0
        return model, tracker


def _identity(setting: Setting) -> Any:
    """Equal for settings that one model serves."""
    lean = setting.recipe.lean.model_dump()
    if lean["tokens"] is not None:
        lean["tokens"].pop("keep")
    return lean, setting.stage, setting.checkpointing, setting.dtype, setting.recipe.model, id(setting.config)


def _traced(model: nn.Module, setting: Setting, tracker: Tracker) -> Figures:
    tracker.flops.clear()
    with tracker:
        with tracker.during("weights"):
            weights = _keys(tracker, (*model.parameters(), *model.buffers()))
        with tracker.during("before"):
            optimizer = make_optimizer(model, setting)
            batch = make_batch(setting)
            _keys(tracker, batch.values())
        state = _keys(tracker, (v for held in optimizer.state.values() for v in held.values()))
        saved, start = Saved(tracker.key), len(tracker.events)
        Step(model, optimizer, setting, tracker.enter).run(batch, saved)
        gradients = _keys(tracker, (p.grad for p in model.parameters() if p.grad is not None))
        tracker.enter("after")
        model.zero_grad(set_to_none=True)
    known = {"weights": weights, "optimizer": state, "gradients": gradients}
    sizes, _ = _born(tracker)
    return Figures(
        memory=_split(tracker, start, known, saved),
        saved_activation_bytes=sum(sizes[key] for key in saved.keys - weights),
        parameters=_count(model.parameters()),
        trained=_count(p for p in model.parameters() if p.requires_grad),
        forward_flops=sum(tracker.flops[phase] for phase in ("forward", "head")),
        backward_flops=sum(tracker.flops[phase] for phase in ("head backward", "backward")),
        engine="traced",
    )


def _split(tracker: Tracker, start: int, known: dict[str, set[int]], saved: Saved) -> Memory:
    """Sort what is alive at the step's peak."""
    _, alive = tracker.peak(start)
    sizes, phases = _born(tracker)
    parts = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "logits", "temporary"), 0)
    for key in alive:
        named = next((name for name, keys in known.items() if key in keys), None)
        if named is None:
            in_head = phases[key] in _HEAD
            named = "logits" if in_head else "activations" if key in saved.keys else "temporary"
        parts[named] += sizes[key]
    return Memory(**parts)


def _born(tracker: Tracker) -> tuple[dict[int, int], dict[int, str]]:
    """Key → size in bytes, and key → phase in which it appeared."""
    sizes: dict[int, int] = {}
    phases: dict[int, str] = {}
    for event in tracker.events:
        if event.key not in sizes:
            sizes[event.key], phases[event.key] = event.bytes, event.phase
    return sizes, phases


def _keys(tracker: Tracker, tensors: Iterable[Tensor]) -> set[int]:
    return {tracker.key(tensor) for tensor in tensors if isinstance(tensor, Tensor)}


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
