"""The stages of a run: estimation, where it prunes, and training. Each has a Trainer and checkpoints."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from leantune.errors import UserError, first_line
from leantune.measure import PeakMemory, peak_rss, saved_activation_bytes
from leantune.recipes import Recipe
from leantune.run import lean, processes
from leantune.run.adapters import check_resumable
from leantune.run.arguments import training_arguments
from leantune.run.callbacks import ProgressBar, RunLog
from leantune.run.checkpoints import newest_complete, sweep
from leantune.run.estimation import STAGE, estimation_steps, write_plan
from leantune.run.facts import count_parameters
from leantune.run.folder import RunFolder, whole_folder
from leantune.run.models import quiet_transformers
from leantune.run.parts import is_out_of_memory, parts_of, release
from leantune.run.preparing import Prepared, sharing_of
from leantune.run.quantization import weight_bytes
from leantune.run.sharding import whole_weights
from leantune.run.stopping import Interrupted, StopOnSignal, go_on
from leantune.run.trainer import LeanTrainer, build_trainer, enable_checkpointing

_APART = 7919  # between the seeds of two processes


@dataclass(frozen=True)
class Job:
    """What the stages of one run work with."""

    recipe: Recipe
    folder: RunFolder
    prepared: Prepared
    resume: bool
    console: Console
    stop: StopOnSignal


def estimate(job: Job) -> None:
    """The first stage of a pruned run: train with masks, and write down what goes."""
    recipe, prepared = job.recipe, job.prepared
    steps = estimation_steps(recipe, len(prepared.encoded["train"]))
    progress = ProgressBar(job.console, f"{recipe.method}: {STAGE}")
    log = RunLog(job.folder.log_file, stage=STAGE)
    trainer = _trainer(
        job,
        job.folder.estimation,
        [*lean.estimation_callbacks(recipe), *_watching(log, progress), job.stop],
        validation=None,
        max_steps=steps,
    )
    _prepare_adapter(trainer, job)
    _run(trainer, job, progress, _checkpoint(job, job.folder.estimation))
    write_plan(job.folder, prepared.model, recipe, job.console)


def fit(job: Job) -> dict[str, Any]:
    """Train, and save the result. Returns what was measured on the way."""
    recipe, folder, prepared = job.recipe, job.folder, job.prepared
    model = prepared.model
    classifies = prepared.task.peft_task_type == "SEQ_CLS"
    checkpoint = _checkpoint(job, folder.checkpoints)
    check_resumable(recipe, checkpoint)
    progress = ProgressBar(job.console, recipe.method)
    log = RunLog(folder.log_file, extra=lambda: lean.progress_facts(model))
    trainer = _trainer(
        job,
        folder.checkpoints,
        [*lean.callbacks(recipe), *_watching(log, progress), job.stop],
        validation=prepared.encoded.get("validation"),
    )
    _prepare_adapter(trainer, job)
    facts: dict[str, Any] = {
        "parameters": count_parameters(model, classifies),
        "weight_bytes": weight_bytes(model),
        "saved_activation_bytes": _saved_bytes(trainer, prepared.encoded["train"]),
    }
    peak = _run(trainer, job, progress, checkpoint)
    facts |= {
        "trainable_end": count_parameters(model, classifies)["trainable"] - lean.held_weights(model),
        "peak": peak,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "steps": trainer.state.global_step,
    }
    whole = whole_weights(trainer)
    processes.from_main(lambda: _save(job, trainer, whole))
    return facts


def _trainer(
    job: Job,
    place: Path,
    callbacks: list[TrainerCallback],
    validation: Dataset | None,
    max_steps: int | None = None,
) -> LeanTrainer:
    recipe, prepared = job.recipe, job.prepared
    collator = prepared.task.collator(prepared.tokenizer)
    more = {} if max_steps is None else {"max_steps": max_steps}
    return build_trainer(
        prepared.model,
        training_arguments(recipe, place, has_validation=validation is not None, **more),
        prepared.task,
        prepared.tokenizer,
        collator,
        callbacks,
        train=prepared.encoded["train"],
        validation=validation,
        train_collator=lean.train_collator(prepared.model, recipe, collator, prepared.task.counts_tokens),
        on_nan=recipe.train.on_nan,
        say=job.console.print,
        would_fit=lambda rows, length: _would_fit(job, rows, length),
    )


def _would_fit(job: Job, rows: int, length: int) -> str:
    """What to tell a run of which so much does not fit in memory."""
    from leantune.planner.rescue import what_would_fit  # which imports from here

    cuda, before = torch.cuda.is_available(), job.prepared.bytes_before
    peak = torch.cuda.max_memory_allocated() if cuda else peak_rss()
    had = peak if cuda or peak is None else peak - (before or 0)
    found = None
    try:
        found = what_would_fit(job.recipe, job.prepared.config, rows, length, had, sharing_of(job.recipe))
    except UserError as error:
        return f"lower data.max_length or train.batch_size (no forecast: {first_line(error)})"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return found or "nothing that leantune can forecast would: take a smaller model, or shorter texts"


def _watching(*callbacks: TrainerCallback) -> list[TrainerCallback]:
    """What writes and prints: the main process's."""
    return list(callbacks) if processes.is_main() else []


def _checkpoint(job: Job, place: Path) -> str | None:
    processes.from_main(lambda: sweep(place))
    if not job.resume:
        return None
    checkpoint, skipped = processes.from_main(lambda: newest_complete(place))
    for line in skipped:
        job.console.print(line)
    job.console.print(
        f"resuming from {checkpoint.name}" if checkpoint else "no complete checkpoint: starting anew"
    )
    return None if checkpoint is None else str(checkpoint)


def _prepare_adapter(trainer: LeanTrainer, job: Job) -> None:
    """Give an adapter its start from data, if it needs one: from rows that the seed alone decides.

    A resumed run does it again and then takes the checkpoint's values, which are the same.
    """
    enable_checkpointing(trainer)
    batches = _drawn_batches(trainer, job.recipe.train.seed, job.prepared.encoded["train"])
    with trainer.compute_loss_context_manager():
        lean.prepare(cast(nn.Module, trainer.model), job.recipe, batches)


def _drawn_batches(trainer: LeanTrainer, seed: int, train: Dataset) -> Iterator[dict[str, Any]]:
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    count, rank = processes.count(), processes.rank()
    size = trainer.args.per_device_train_batch_size * count
    for start in range(0, len(order) - count + 1, size):
        batch = order[start : start + size]
        own = range(rank, len(batch) // count * count, count)  # as many in every process
        rows = [dict(train[batch[place]]) for place in own]
        yield trainer._prepare_inputs(trainer.data_collator(rows))


def _saved_bytes(trainer: LeanTrainer, train: Dataset) -> int:
    """Bytes kept by one step on the first rows of the train split: the same rows for every method."""
    rows = train.select(range(min(trainer.args.per_device_train_batch_size, len(train))))
    batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
    enable_checkpointing(trainer)
    model = cast(nn.Module, trainer.model)
    most = len(rows)
    while True:
        try:  # what does not fit at once is measured in parts: activations add up
            kept = 0
            for _, part in parts_of(batch, most):
                with trainer.compute_loss_context_manager(), lean.undisturbed(model):
                    kept += saved_activation_bytes(model, part)
            return kept
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release()
        if most == 1:
            raise trainer.too_large(1, batch["input_ids"].size(-1), training=True)
        most = math.ceil(most / 2)


def _run(trainer: LeanTrainer, job: Job, progress: ProgressBar, checkpoint: str | None) -> PeakMemory:
    """Train one stage to its end.

    Raises:
        Interrupted: A signal came; the checkpoint is saved.
    """
    stop = job.stop
    try:
        with stop.waiting(), PeakMemory(trainer.args.device) as peak:
            # dropout must not be the same in all processes
            set_seed((job.recipe.train.seed + _APART * processes.rank()) % 2**32)
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.close()
    if (number := stop.agreed()) is not None:
        trainer.save_now()  # the signal may have come after the last step had looked
        where = f"stopped after step {trainer.state.global_step}"
        raise processes.shared(Interrupted(f"{where}; {go_on(job.recipe)}", number))
    return peak


def _save(job: Job, trainer: LeanTrainer, whole: dict[str, Tensor] | None) -> None:
    """The trained weights, with the config (label names) and tokenizer that make them usable."""
    prepared = job.prepared
    place = job.folder.adapter if lean.is_adapted(prepared.model) else job.folder.model
    with whole_folder(place, sealed=True) as written, quiet_transformers():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(written, state_dict=whole)
        prepared.config.save_pretrained(written)
        prepared.tokenizer.save_pretrained(written)
