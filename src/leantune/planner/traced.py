"""The traced engine: the real model's real code, run for one training step on fake tensors.

The peak is the largest sum of living storages between the start of a step and its end, with the optimizer's
state in place. It equals what the CPU's allocator gives out in the same step, kernels' own workspaces aside.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from leantune.anatomy import find_head
from leantune.errors import UserError
from leantune.planner.building import build_fake, undisturbed
from leantune.planner.forecast import Figures, Memory
from leantune.planner.resident import saving_peak, units_of, weight_bytes
from leantune.planner.setting import Setting, check
from leantune.planner.sharing import Sharing
from leantune.planner.step import Saved, Step, make_batch, make_optimizer
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
    how = (setting.stage, setting.checkpointing, setting.dtype, setting.storage)
    return lean, how, setting.recipe.model, id(setting.config)


@dataclass(frozen=True)
class _Known:
    """Keys of what is in memory between two steps."""

    weights: set[int]
    scales: set[int]
    optimizer: set[int]
    gradients: set[int]

    def share(self, sharing: Sharing) -> Callable[[int], float]:
        """Key → the part of it that one process holds."""
        weights, gradients, optimizer = sharing.shares
        parts = {
            **dict.fromkeys(self.weights | self.scales, weights),
            **dict.fromkeys(self.gradients, gradients),
            **dict.fromkeys(self.optimizer, optimizer),
        }
        return lambda key: parts.get(key, 1.0)


def _traced(model: nn.Module, setting: Setting, tracker: Tracker) -> Figures:
    tracker.flops.clear()
    communication = setting.sharing.communication(units_of(model)) if setting.sharing.gpus > 1 else 0
    with tracker:
        with tracker.during("weights"):
            scales = _keys(tracker, (b for n, b in model.named_buffers() if ".scale_" in n))
            weights = _keys(tracker, (*model.parameters(), *model.buffers())) - scales
        with tracker.during("before"):
            optimizer = make_optimizer(model, setting)
            batch = make_batch(setting)
            _keys(tracker, batch.values())
        state = _keys(tracker, (v for held in optimizer.state.values() for v in held.values()))
        saved, start = Saved(tracker.key), len(tracker.events)
        step = Step(model, optimizer, setting, tracker.enter)
        step.run(batch, saved)
        gradients = _keys(tracker, (p.grad for p in model.parameters() if p.grad is not None))
        end = len(tracker.events)
        tracker.enter("after")
        model.zero_grad(set_to_none=True)
        known = _Known(weights, scales, state, gradients)
        evaluation = _evaluation_peak(step, setting, tracker, known) if setting.evaluates else 0
        del optimizer, step
    sizes, _ = _born(tracker)
    trained = [p for p in model.parameters() if p.requires_grad]
    memory = _split(tracker, (start, end), known, saved, setting.sharing)
    return Figures(
        memory=replace(memory, communication=communication),
        saved_activation_bytes=sum(sizes[key] for key in saved.keys - weights - scales),
        parameters=_count(model.parameters()),
        trained=_count(trained),
        forward_flops=sum(tracker.flops[phase] for phase in ("forward", "head")),
        backward_flops=sum(tracker.flops[phase] for phase in ("head backward", "backward")),
        engine="traced",
        evaluation_peak=evaluation,
        saving_peak=saving_peak(
            setting,
            weights=sum(sizes[key] for key in weights | scales),
            optimizer=sum(sizes[key] for key in state),
            trained=weight_bytes(trained),
        ),
    )


def _evaluation_peak(step: Step, setting: Setting, tracker: Tracker, known: _Known) -> int:
    """Bytes at the peak of an evaluation batch, the optimizer's state in place."""
    gc.collect()  # what the step left in cycles: by the time of an evaluation Python has found it
    tracker.enter("evaluation")
    batch = make_batch(replace(setting, batch=setting.evaluation_batch))
    _keys(tracker, batch.values())
    start = len(tracker.events)
    step.evaluate(batch)
    return tracker.peak(start, None, known.share(setting.sharing))[0]


def _split(tracker: Tracker, span: tuple[int, int], known: _Known, saved: Saved, sharing: Sharing) -> Memory:
    """Sort what is alive at the step's peak."""
    share = known.share(sharing)
    _, alive = tracker.peak(*span, share)
    sizes, phases = _born(tracker)
    names = {
        **dict.fromkeys(saved.keys, "activations"),
        **{key: "logits" for key, phase in phases.items() if phase in _HEAD},
        **{key: "quantization" for key, phase in phases.items() if phase == "dequantise"},
        **dict.fromkeys(known.scales, "quantization"),
        **dict.fromkeys(known.gradients, "gradients"),
        **dict.fromkeys(known.optimizer, "optimizer"),
        **dict.fromkeys(known.weights, "weights"),
    }
    parts = dict.fromkeys((field.name for field in fields(Memory)), 0.0)
    for key in alive:
        parts[names.get(key, "temporary")] += sizes[key] * share(key)
    return Memory(**{name: round(size) for name, size in parts.items()})


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
