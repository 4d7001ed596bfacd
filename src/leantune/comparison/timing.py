"""Seconds of a training step and of an inference step, all methods in one process, turn by turn.

Runs that follow each other on a machine that others use as well cannot be compared by the clock. Here every
method takes its step on one batch before any goes on to the next batch, so that whatever slows the machine
down slows all of them, and ratios are taken within a round.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from leantune.comparison.plan import Cell
from leantune.lightpeft import PruningPlan
from leantune.measure import StepClock
from leantune.recipes.loading import validate
from leantune.run import lean
from leantune.run.arguments import training_arguments
from leantune.run.inputs import Inputs
from leantune.run.loading import attach_saved, base_for_run
from leantune.run.models import load_base, quiet_transformers
from leantune.run.trainer import LeanTrainer, build_trainer

WARM_UP = 2
ROUNDS = 10
# Bytes a trained parameter takes: itself, its gradient and Adam's two moments, in float32.
TRAINED_BYTES = 16
SHARE_OF_MEMORY = 0.6  # that all methods' models together may take


@dataclass
class Runner:
    """A method's trained model with what a step needs, and its times."""

    trainer: LeanTrainer
    step_clock: StepClock
    inference_clock: StepClock
    failure: str | None = None

    def train_on(self, batch: Mapping[str, Tensor]) -> None:
        """Forward, backward, clip and optimizer step, as in training."""
        trainer = self.trainer
        model, optimizer = cast(nn.Module, trainer.model_wrapped), cast(Any, trainer.optimizer)
        with self.step_clock.step():
            trainer.training_step(model, dict(batch))
            if trainer.args.max_grad_norm:
                trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    def infer(self, batch: Mapping[str, Tensor]) -> None:
        """A forward pass without gradients, in evaluation mode."""
        model = cast(nn.Module, self.trainer.model_wrapped).eval()
        with self.inference_clock.step(), torch.no_grad(), self.trainer.compute_loss_context_manager():
            model(**self.trainer._prepare_inputs(dict(batch)))


@dataclass
class Timing:
    """What was measured: method → {"step": [...], "inference": [...]} or {"failed": why}."""

    interleaved: bool
    rounds: int
    batch_size: int
    device: str
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)


def measure(cells: Sequence[Cell], inputs: Inputs, rounds: int = ROUNDS, warm_up: int = WARM_UP) -> Timing:
    """Time one finished run of each method.

    Args:
        cells: One a method, finished.
        inputs: Data, task and tokenizer, the same for all.
        rounds: Batches that count.
        warm_up: Batches before them that do not.
    """
    together = _fit_together(cells)
    batches = _batches(cells[0], inputs, rounds + warm_up)
    timing = Timing(together, rounds, cells[0].recipe.train.batch_size, "cpu")
    groups = [list(cells)] if together else [[cell] for cell in cells]
    with tempfile.TemporaryDirectory() as nowhere, quiet_transformers():
        for group in groups:
            runners = {cell.method.name: _prepare(cell, inputs, batches[0], Path(nowhere)) for cell in group}
            _rounds([runner for runner in runners.values() if isinstance(runner, Runner)], batches)
            for name, runner in runners.items():
                timing.methods[name] = _times(runner, warm_up)
                if isinstance(runner, Runner):
                    timing.device = runner.trainer.args.device.type
    return timing


def _times(runner: Runner | str, warm_up: int) -> dict[str, Any]:
    if isinstance(runner, str) or runner.failure is not None:
        return {"failed": runner if isinstance(runner, str) else runner.failure}
    clocks = {"step": runner.step_clock, "inference": runner.inference_clock}
    return {what: [round(s, 6) for s in clock.seconds[warm_up:]] for what, clock in clocks.items()}


def _rounds(runners: Sequence[Runner], batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Every method on a batch, then the next batch; the order turns, so that nobody is always first."""
    for number, batch in enumerate(batches):
        turned = [*runners[number % len(runners) :], *runners[: number % len(runners)]] if runners else []
        for runner in turned:
            if runner.failure is None:
                try:
                    runner.train_on(batch)
                    runner.infer(batch)
                except RuntimeError as error:  # out of memory, say: the others go on
                    runner.failure = _first_line(error)


def _prepare(cell: Cell, inputs: Inputs, batch: Mapping[str, Tensor], place: Path) -> Runner | str:
    """A finished run's model, ready to take steps as late in its training; else why not.

    One step through the Trainer, a whole run to schedules such as LaMDA's freezing, puts model and optimizer
    in the state that most of the steps are taken in.
    """
    try:
        model = _trained_model(cell, inputs)
        trainer = build_trainer(
            model,
            _arguments(cell, place),
            inputs.task,
            inputs.tokenizer,
            inputs.task.collator(inputs.tokenizer),
            lean.callbacks(cell.recipe),
            train=inputs.encoded["train"].select(range(min(2, len(inputs.encoded["train"])))),
        )
        trainer.train()
    except (RuntimeError, ValueError, OSError) as error:
        return _first_line(error)
    device = trainer.args.device
    return Runner(trainer, StepClock(device, warm_up=0), StepClock(device, warm_up=0))


def _trained_model(cell: Cell, inputs: Inputs) -> nn.Module:
    """As the run left it, with its adapter to be trained again."""
    recipe, folder, config = cell.recipe, cell.folder, deepcopy(inputs.config)
    if recipe.lean.adapter.type == "none":
        model: nn.Module = load_base(recipe.model, inputs.task.auto_class, config, source=str(folder.model))
    else:
        plan = PruningPlan.load(folder.plan_file) if recipe.lean.prune is not None else None
        base = base_for_run(recipe, inputs.task, config, plan)
        model = attach_saved(base, folder.adapter, trainable=True)
    return lean.attach_tokens(model, recipe)


def _arguments(cell: Cell, place: Path) -> Any:
    data = cell.recipe.to_dict()
    data["train"] |= {"save_strategy": "no", "gradient_accumulation_steps": 1}
    return training_arguments(validate(data, cell.name), place, has_validation=False, max_steps=1)


def _batches(cell: Cell, inputs: Inputs, count: int) -> list[dict[str, Tensor]]:
    """The same for all: rows drawn once, those of like length together as in training."""
    train, size = inputs.encoded["train"], cell.recipe.train.batch_size
    draw = random.Random(0)
    rows = [number % len(train) for number in draw.sample(range(max(len(train), count * size)), count * size)]
    rows.sort(key=lambda number: len(train[number]["input_ids"]))
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    draw.shuffle(chunks)
    collate = inputs.task.collator(inputs.tokenizer)
    return [collate([dict(train[number]) for number in chunk]) for chunk in chunks]


def _fit_together(cells: Sequence[Cell]) -> bool:
    """Whether all methods' models fit into memory at once, reckoned from what their runs wrote down."""
    needed = 0
    for cell in cells:
        counts = (cell.folder.metrics() or {})["parameters"]
        width = 2 if cell.recipe.model.dtype in ("bfloat16", "float16") else 4
        needed += width * counts["total"] + TRAINED_BYTES * counts["trainable_start"]
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return needed < SHARE_OF_MEMORY * free


def summarize(timing: Timing, baseline: str) -> dict[str, dict[str, Any]]:
    """Medians, and ratios to the baseline: the median over rounds of the ratio within a round.

    Returns:
        Method → `step_seconds`, `step_ratio`, `inference_seconds`, `inference_ratio` and the single
        `seconds`, or `failed`. Ratios are None where the baseline was not timed.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, times in timing.methods.items():
        if "failed" in times:
            found[name] = {"failed": times["failed"]}
            continue
        found[name] = {"seconds": times}
        for what in ("step", "inference"):
            found[name][f"{what}_seconds"] = statistics.median(times[what])
            reference = timing.methods.get(baseline, {}).get(what)
            found[name][f"{what}_ratio"] = _ratio(times[what], reference, timing.interleaved)
    return found


def _ratio(times: Sequence[float], reference: Sequence[float] | None, paired: bool) -> float | None:
    if reference is None:
        return None
    if paired:
        return statistics.median(one / other for one, other in zip(times, reference, strict=True))
    return statistics.median(times) / statistics.median(reference)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
