"""transformers.Trainer with complete-or-absent checkpoints; arguments from a recipe."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Sampler
from transformers import DataCollator, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from leantune.errors import RunError, UserError
from leantune.recipes import Recipe
from leantune.recipes.training_arguments import current_names, translate
from leantune.run import lean
from leantune.run.callbacks import RunLog, was_evaluated
from leantune.run.checkpoints import MANIFEST, WRITING, keep_newest, list_checkpoints, seal, whats_wrong
from leantune.run.facts import versions
from leantune.run.health import damaged_parameter, first_not_finite, rows_of, told_rows
from leantune.run.stopping import EvaluationStopped
from leantune.run.tasks import Task

KEPT_CHECKPOINTS = 2


class EpochSampler(Sampler[int]):
    """Another sampler, with an order that depends on the seed and the epoch alone.

    transformers' LengthGroupedSampler draws from the global generator, so a run that is resumed in the middle
    of an epoch would see other batches than the one that was not.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer (through accelerate's data loader) before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(self.sampler)


class LeanTrainer(Trainer):
    """Trainer with sealed checkpoints (written aside, listed, renamed) that a run resumes from exactly.

    A checkpoint may be written at an epoch's last step before the evaluation that belongs there (a stop came,
    or `save_strategy: steps` says so). Therefore evaluations draw no random numbers that training would miss,
    and one that is missing in the checkpoint is made up for when the run is resumed.
    """

    on_nan: str = "stop"
    _staging: str | None = None
    _sealed: Path | None = None
    _epoch: tuple[int, int] = (0, 1)  # number, and optimizer steps in it
    _skipped_now = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._batches: list[dict[str, Any]] = []  # of the optimizer step in progress
        self._losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return EpochSampler(sampler, self.args.data_seed or self.args.seed)
        return sampler

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        step = self.state.global_step
        place = folder / f"checkpoint-{step}"
        if self._sealed == place or (place.exists() and whats_wrong(place) is None):
            return  # at this very step: a stop, or the last step, and the end of an epoch
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RunLog):
                callback.flush()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=WRITING, dir=folder, ignore_cleanup_errors=True) as aside:
                self._staging = aside
                super()._save_checkpoint(model, trial)
                seal(Path(aside) / place.name, place, step, versions())
            self._sealed = place
            keep_newest(folder, self.args.save_total_limit or KEPT_CHECKPOINTS, step)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise _cannot_save(error, folder, step) from error
        finally:
            self._staging = None

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

    # -- losses and gradients that are not finite

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As Trainer's; remembers what the step is made of."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._batches.append(inputs)
        self._losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once before each optimizer step: the last moment at which the weights are still good."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        seen = torch.stack(self._losses).sum().detach()
        if self.accelerator.scaler is None:  # else an overflow is ordinary, and the scaler skips the step
            seen = seen + torch.as_tensor(norm, device=seen.device)
        # one number is read from the device; the log reads two a step in any case
        if not math.isfinite(together(seen)):
            if self.on_nan == "stop":
                raise RunError(self._what_is_not_finite(float(torch.stack(self._losses).sum())))
            self._skip_step(model)
        self._batches.clear()
        self._losses.clear()
        return norm

    def _skip_step(self, model: nn.Module) -> None:
        """The optimizers find no gradient: they leave weights and their own state alone."""
        model.zero_grad(set_to_none=True)
        lean.skip_step(model)
        self._tr_loss = torch.zeros_like(self._tr_loss)
        self._skipped_now = True

    def _what_is_not_finite(self, loss: float) -> str:
        step = self.state.global_step + 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        number, steps = self._epoch
        each = self.args.gradient_accumulation_steps
        first = (self.state.global_step - number * steps) * each
        rows = rows_of(self.callback_handler.train_dataloader, number, first, len(self._batches))
        batch = f"; its batch: rows {told_rows(rows)} of the train split" if rows else ""
        model = cast(nn.Module, self.model)
        where = damaged_parameter(model)
        if where is not None:
            origin = f"the weight {where} is not finite itself"
        else:
            module = first_not_finite(model, self._forward_again)
            origin = f"first in the output of {module}" if module else "all outputs are finite"
        return (
            f"step {step}: {what}{batch}; {origin}. Try a lower train.learning_rate (now "
            f"{self.args.learning_rate:g}), or train.on_nan: skip. Checkpoints from before are kept"
        )

    def _forward_again(self) -> None:
        model = cast(nn.Module, self.model)
        with lean.undisturbed(model), self.compute_loss_context_manager():
            for batch in self._batches:
                self.compute_loss(model, self._prepare_inputs(dict(batch)))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's; a skipped step's line says so and has no figures that are none."""
        if self._skipped_now and "learning_rate" in logs:
            self._skipped_now = False
            logs = {"learning_rate": logs["learning_rate"], "skipped": 1.0}
        super().log(logs, *args, **kwargs)

    # -- epochs

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._epoch = (kwargs["epoch"], kwargs["num_update_steps_per_epoch"])
        self._evaluate_what_is_owed()
        finished = self.state.global_step >= self.state.max_steps  # else resuming there would take one more
        if not finished and not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluate_what_is_owed()
        return super()._finalize_training(*args, **kwargs)


def together(value: torch.Tensor) -> float:
    """The sum over all processes, so that they all decide alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return float(value)


def _cannot_save(error: Exception, folder: Path, step: int) -> RunError:
    """One line; the checkpoints from before are untouched."""
    kept = [path.name for path in list_checkpoints(folder) if (path / MANIFEST).is_file()]
    before = f"{kept[-1]} is kept: make room and go on with --resume" if kept else "there is none from before"
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return RunError(f"step {step}: the checkpoint cannot be written to {folder} ({reason}); {before}")


def training_arguments(
    recipe: Recipe, checkpoints: Path, has_validation: bool, max_steps: int | None = None
) -> TrainingArguments:
    """The recipe's `train` as TrainingArguments, with leantune's defaults for what it does not name.

    Args:
        recipe: The run's.
        checkpoints: Where they go.
        has_validation: Whether to evaluate at the end of each epoch.
        max_steps: Train this long instead of as long as the recipe says, and evaluate nothing.

    Raises:
        UserError: transformers does not accept a value.
    """
    defaults: dict[str, Any] = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch" if has_validation else "no",
        "report_to": "none",  # local and silent unless asked
        "save_total_limit": KEPT_CHECKPOINTS,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "group_by_length",  # rows of like length together: less padding
    }
    own: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a step that is not finite must be seen as such
        "disable_tqdm": True,  # the progress bar is ours
        "restore_callback_states_from_checkpoint": True,
        "include_num_input_tokens_seen": "non_padding",
    }
    if max_steps is not None:
        own |= {"max_steps": max_steps}
    if max_steps is not None or not has_validation:
        own |= {"eval_strategy": "no"}
    try:
        arguments = TrainingArguments(**(current_names(defaults) | translate(recipe.train) | own))
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(_which_key(recipe, str(error).strip().split("\n")[0])) from None
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the Trainer would use DataParallel, which copies the model in every step
    return arguments


def _which_key(recipe: Recipe, reason: str) -> str:
    """transformers says what it does not like of a value, seldom of which key."""
    for key, value in (recipe.train.model_extra or {}).items():
        if key in reason or (isinstance(value, str) and value in reason):
            return f"train.{key} = {value!r}: {reason}"
    return f"train: {reason}"


def build_trainer(
    model: nn.Module,
    arguments: TrainingArguments,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    collator: DataCollator,
    callbacks: list[TrainerCallback],
    train: Any = None,
    validation: Any = None,
    on_nan: str = "stop",
) -> LeanTrainer:
    """A Trainer for the task, silent but for `callbacks`."""
    trainer = LeanTrainer(
        model=model,
        args=arguments,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=task.metrics,
        preprocess_logits_for_metrics=task.reduce_logits,
        callbacks=callbacks,
    )
    trainer.on_nan = on_nan
    if not task.counts_tokens:
        # transformers takes a forward with **kwargs for one that divides by the number of items. Heads whose
        # loss is a mean over rows do not: micro-batches would add up instead of being averaged.
        trainer.model_accepts_loss_kwargs = False
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
