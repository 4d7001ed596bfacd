"""transformers.Trainer with complete-or-absent checkpoints, and batches that fit."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollator, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from leantune.errors import RunError, first_line
from leantune.run import lean
from leantune.run.arguments import KEPT_CHECKPOINTS
from leantune.run.callbacks import RunLog, was_evaluated
from leantune.run.checkpoints import MANIFEST, WRITING, keep_newest, list_checkpoints, seal, whats_wrong
from leantune.run.facts import versions
from leantune.run.health import damaged_parameter, first_not_finite, rows_of, told_rows
from leantune.run.parts import RowsAtOnce, is_out_of_memory, parts_of, release, rows_in
from leantune.run.stopping import EvaluationStopped
from leantune.run.tasks import Task
from leantune.run.tasks.token_metrics import IGNORED


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

    Args:
        train_collator: Makes the batches that are trained on, where that takes another one than evaluation.
        head_averages: The head divides its loss by the tokens of its own batch, whatever it is told of the
            other micro-batches of the step.
        *args: As for `Trainer`.
        **kwargs: As for `Trainer`.

    A checkpoint may be written at an epoch's last step before the evaluation that belongs there (a stop came,
    or `save_strategy: steps` says so). Therefore evaluations draw no random numbers that training would miss,
    and one that is missing in the checkpoint is made up for when the run is resumed.
    """

    on_nan: str = "stop"
    reduce_logits: Callable[..., torch.Tensor] | None = None
    say: Callable[[str], object] = staticmethod(lambda text: None)
    _share = 1.0  # with which the next loss enters
    _tokens_before: dict[str, int] | None = None  # the optimizer step in progress
    _staging: str | None = None
    _sealed: Path | None = None
    _epoch: tuple[int, int] = (0, 1)  # number, and optimizer steps in it
    _skipped_now = False

    def __init__(
        self,
        *args: Any,
        train_collator: DataCollator | None = None,
        head_averages: bool = False,
        **kwargs: Any,
    ) -> None:
        self._batches: list[dict[str, Any]] = []  # of the optimizer step in progress
        self._losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)
        self.train_collator, self.head_averages = train_collator, head_averages
        self.add_callback(RowsAtOnce())

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

    # -- batches that do not fit in memory

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """As Trainer's; a batch that is too large goes through the model in parts."""
        if not self._batches:
            self._tokens_before = lean.tokens_now(model)
        self._batches.append(inputs)
        loss = self._whole_or_parts(model, inputs, num_items_in_batch)
        while loss is None:  # out of memory: what the step has done so far is done anew, in smaller parts
            model.zero_grad(set_to_none=True)
            lean.forget_step(model, self._tokens_before)
            release()
            for batch in self._batches:
                loss = self._whole_or_parts(model, batch, num_items_in_batch)
                if loss is None:
                    break
        self._losses.append(loss)
        return loss

    def _whole_or_parts(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> torch.Tensor | None:
        """Forward and backward of a batch; None if memory does not suffice, and smaller parts are due."""
        rows, most = rows_in(inputs), self._rows_at_once.training
        self._share = 1.0  # a pass that failed may have left its own
        try:
            if most is None or rows <= most:
                return super().training_step(model, inputs, items)
            return self._in_parts(model, inputs, items, rows, most)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._rows_at_once.training = self._fewer(rows, most, inputs)
        return None

    def _in_parts(
        self, model: nn.Module, inputs: dict[str, Any], items: Any, rows: int, most: int
    ) -> torch.Tensor:
        parts, before = list(parts_of(inputs, most)), lean.tokens_now(model)
        if self.model_accepts_loss_kwargs and items is not None:
            model.train()
            shares = lean.loss_shares(model, parts, rows, lambda part: model(**self._prepare_inputs(part)))
        else:  # means over rows
            shares = [rows_in(part) / rows for _, part in parts]
        losses = []
        for (first, part), self._share in zip(parts, shares, strict=True):
            with lean.part_of_batch(model, before, first, rows):
                losses.append(super().training_step(model, part, items))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As Trainer's; a head's own mean and a part's loss enter by their shares."""
        share, self._share = self._share, 1.0
        if self.head_averages and num_items_in_batch is not None and "labels" in inputs:
            # num_items_in_batch counts the tokens of all processes, whose gradients are averaged
            counted = (inputs["labels"] != IGNORED).sum() * self.accelerator.num_processes
            share, num_items_in_batch = share * counted / num_items_in_batch, None
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss if isinstance(share, float) and share == 1.0 else loss * share
        return (loss, outputs) if return_outputs else loss

    def _fewer(self, rows: int, most: int | None, inputs: dict[str, Any]) -> int:
        """Half as many rows at once as were too many.

        Raises:
            RunError: One row is too many, or several processes would have to agree.
        """
        tried = min(rows, most or rows)
        length = inputs["input_ids"].size(-1)
        if tried == 1 or self.args.world_size > 1:
            what = f"{tried} rows" if tried > 1 else "one row"
            raise RunError(
                f"step {self.state.global_step + 1}: {what} of {length} tokens does not fit in memory: lower "
                "data.max_length, set train.gradient_checkpointing: true or model.dtype: bfloat16, or take "
                "lean.tokens; fewer adapted layers (lean.adapter.target_modules) help, too"
                + (", and a lower train.batch_size" if tried > 1 else "")
            )
        fewer = math.ceil(tried / 2)
        self.say(
            f"out of memory with {tried} rows of {length} tokens at once: now {fewer}, the same batch a step"
        )
        return fewer

    @property
    def _rows_at_once(self) -> RowsAtOnce:
        return next(c for c in self.callback_handler.callbacks if isinstance(c, RowsAtOnce))

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """As Trainer's, but logits come back reduced; a batch that is too large is split."""
        rows, limit = rows_in(inputs), self._rows_at_once
        while True:
            try:
                return self._predict(
                    model, inputs, limit.evaluation or rows, prediction_loss_only, ignore_keys
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            release()
            limit.evaluation = self._fewer(rows, limit.evaluation, inputs)

    def _predict(
        self, model: nn.Module, inputs: dict[str, Any], most: int, loss_only: bool, ignore_keys: Any
    ) -> tuple[Any, Any, Any]:
        found: list[tuple[Any, Any, Any]] = []
        weights: list[float] = []
        for _, part in parts_of(inputs, most):
            loss, logits, labels = super().prediction_step(model, part, loss_only, ignore_keys)
            if logits is not None and self.reduce_logits is not None:
                logits = self.reduce_logits(logits, labels)
            found.append((loss, logits, labels))
            items = self._get_num_items_in_batch([part], self.args.device)
            by_rows = not self.model_accepts_loss_kwargs or items is None
            weights.append(rows_in(part) if by_rows else float(items))  # type: ignore[arg-type]
        if len(found) == 1:
            return found[0]
        losses, all_logits, all_labels = zip(*found, strict=True)
        loss = None
        if losses[0] is not None:
            loss = sum(one * weight for one, weight in zip(losses, weights, strict=True)) / sum(weights)
        logits = None if all_logits[0] is None else torch.cat(all_logits)
        return loss, logits, None if all_labels[0] is None else torch.cat(all_labels)

    # -- losses and gradients that are not finite

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
        callbacks=callbacks,
        train_collator=train_collator,
        head_averages=task.head_averages,
    )
    trainer.on_nan, trainer.reduce_logits = on_nan, task.reduce_logits
    if say is not None:
        trainer.say = say
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
