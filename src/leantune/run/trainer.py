"""transformers.Trainer with complete-or-absent checkpoints that a run resumes from exactly."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollator, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from leantune.errors import RunError, first_line
from leantune.run import processes
from leantune.run.arguments import KEPT_CHECKPOINTS
from leantune.run.callbacks import RunLog, was_evaluated
from leantune.run.checkpoints import MANIFEST, WRITING, keep_newest, list_checkpoints, seal, whats_wrong
from leantune.run.dealing import EpochSampler
from leantune.run.facts import versions
from leantune.run.finite import FiniteTrainer
from leantune.run.sharding import shard_by_layers, shard_on_cpu, tied_in_one
from leantune.run.stopping import EvaluationStopped
from leantune.run.tasks import Task


class LeanTrainer(FiniteTrainer):
    """Trainer with sealed checkpoints (written aside, listed, renamed) that a run resumes from exactly.

    Args:
        train_collator: Makes the batches that are trained on, where that takes another one than evaluation.
        *args: As for `Trainer`.
        **kwargs: As for `Trainer`.

    A checkpoint may be written at an epoch's last step before the evaluation that belongs there (a stop came,
    or `save_strategy: steps` says so). Therefore evaluations draw no random numbers that training would miss,
    and one that is missing in the checkpoint is made up for when the run is resumed.
    """

    _staging: str | None = None
    _sealed: Path | None = None
    _order: EpochSampler | None = None

    def __init__(self, *args: Any, train_collator: DataCollator | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; on CPUs, where accelerate would silently take DDP instead of FSDP2, it is told."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            shard_on_cpu(self.accelerator, self.args)
            self.is_fsdp_enabled = True

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with tied_in_one(self.model) if self.is_fsdp_enabled else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """With the collator for training."""
        usual = self.data_collator
        self.data_collator = self.train_collator or usual
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = usual

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            self._order = EpochSampler(sampler, self.args.data_seed or self.args.seed, self.args.world_size)
            return self._order
        return sampler

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        step = self.state.global_step
        place = folder / f"checkpoint-{step}"
        if processes.from_main(
            lambda: self._sealed == place or (place.exists() and whats_wrong(place) is None)
        ):
            return  # at this very step: a stop, or the last step, and the end of an epoch
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunLog):
                callback.flush()
        try:
            self._staging = processes.from_main(lambda: _writing_place(folder, step))
            # writing sharded weights is an exchange itself: an error there cannot wait for the others
            in_step = nullcontext() if self.is_fsdp_enabled else processes.together()
            with in_step, _can_be_saved(folder, step):
                super()._save_checkpoint(model, trial)
            processes.from_main(lambda: self._seal(folder, place, step))
            self._sealed = place
        finally:
            if self._staging is not None and processes.is_main():
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _seal(self, folder: Path, place: Path, step: int) -> None:
        """The checkpoint is whole: all processes have written their part."""
        with _can_be_saved(folder, step):
            seal(Path(str(self._staging)) / place.name, place, step, versions(), processes.count())
            keep_newest(folder, self.args.save_total_limit or KEPT_CHECKPOINTS, step)

    def save_now(self) -> None:
        """Write a checkpoint of where training is, unless there is one."""
        self._save_checkpoint(self.model_wrapped, None)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices=devices):
                return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's; what its state has of earlier steps is let go: `log.jsonl` has it."""
        now = self.state.global_step
        self.state.log_history = [entry for entry in self.state.log_history if entry["step"] == now]
        super().log(logs, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    def _evaluate_what_is_owed(self) -> None:
        state, args = self.state, self.args
        epochs = state.epoch or 0.0
        if args.eval_strategy == "epoch":
            due = epochs >= args.eval_delay and (
                epochs == int(epochs) or state.global_step >= state.max_steps
            )
        elif args.eval_strategy == "steps":
            due = state.global_step >= args.eval_delay and state.global_step % state.eval_steps == 0
        else:
            due = False
        if due and state.global_step and not was_evaluated(state):
            self._evaluate(None, None)

    # -- epochs

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._epoch = (kwargs["epoch"], kwargs["num_update_steps_per_epoch"])
        if self._order is not None:  # wrappers around it (shards, skipped batches) do not always pass it on
            self._order.set_epoch(kwargs["epoch"])
        self._evaluate_what_is_owed()
        finished = self.state.global_step >= self.state.max_steps  # else resuming there would take one more
        if not finished and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluate_what_is_owed()
        return super()._finalize_training(*args, **kwargs)


def _writing_place(folder: Path, step: int) -> str:
    with _can_be_saved(folder, step):
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=WRITING, dir=folder)


@contextmanager
def _can_be_saved(folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if processes.is_lost(error):
            raise
        raise _cannot_save(error, folder, step) from error


def _cannot_save(error: Exception, folder: Path, step: int) -> RunError:
    """One line; the checkpoints from before are untouched."""
    kept = [path.name for path in list_checkpoints(folder) if (path / MANIFEST).is_file()]
    before = f"{kept[-1]} is kept: make room and go on with --resume" if kept else "there is none from before"
    what = f"the checkpoint cannot be written to {folder} ({first_line(error)})"
    return RunError(f"step {step}: {what}; {before}")


def build_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    collator: DataCollator,
    callbacks: list[TrainerCallback],
    train: Any = None,
    validation: Any = None,
    train_collator: DataCollator | None = None,
    on_nan: str = "stop",
    say: Callable[[str], object] | None = None,
    would_fit: Callable[[int, int], str] | None = None,
) -> LeanTrainer:
    """A Trainer for the task, silent but for `callbacks`.

    `would_fit` is asked when so many rows of so many tokens are too large for memory.
    """
    trainer = LeanTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=task.metrics,
        callbacks=callbacks,
        train_collator=train_collator,
        head_averages=task.head_averages,
    )
    trainer.on_nan, trainer.reduce_logits = on_nan, task.reduce_logits
    if say is not None:
        trainer.say = say
    if would_fit is not None:
        trainer.would_fit = would_fit
    if not task.counts_tokens:
        # transformers takes a forward with **kwargs for one that divides by the number of items. Heads whose
        # loss is a mean over rows do not: micro-batches would add up instead of being averaged.
        trainer.model_accepts_loss_kwargs = False
    if trainer.is_fsdp_enabled:
        shard_by_layers(trainer)
    for loud in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(loud)
    return trainer


def enable_checkpointing(trainer: Trainer) -> None:
    """Switch gradient checkpointing on as `trainer.train()` will, for what is measured before."""
    if not trainer.args.gradient_checkpointing:
        return
    model: Any = trainer.model
    # the new name within transformers 5; the old one warns there
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(trainer.args.gradient_checkpointing_kwargs)
