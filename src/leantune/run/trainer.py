"""transformers.Trainer with complete-or-absent checkpoints; arguments from a recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollator, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from leantune.errors import UserError
from leantune.recipes import Recipe
from leantune.recipes.training_arguments import current_names, translate
from leantune.run.checkpoints import keep_newest, seal
from leantune.run.tasks import Task
from leantune.run.tasks.token_metrics import IGNORED

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
    """Trainer with sealed checkpoints (written aside, listed, renamed) and orders that resume.

    Args:
        train_collator: Makes the batches that are trained on, where that takes another one than evaluation.
        head_averages: The head divides its loss by the tokens of its own batch, whatever it is told of the
            other micro-batches of the step.
        *args: As for `Trainer`.
        **kwargs: As for `Trainer`.
    """

    _staging: str | None = None

    def __init__(
        self,
        *args: Any,
        train_collator: DataCollator | None = None,
        head_averages: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.train_collator, self.head_averages = train_collator, head_averages

    def get_train_dataloader(self) -> DataLoader[Any]:
        """With the collator for training."""
        usual = self.data_collator
        self.data_collator = self.train_collator or usual
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = usual

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As `Trainer`; the mean of a head that averages enters the step by its share of the tokens."""
        if not self.head_averages or num_items_in_batch is None or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = (inputs["labels"] != IGNORED).sum() / num_items_in_batch
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        # num_items_in_batch counts the tokens of all processes, whose gradients are averaged
        loss = loss * share * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return EpochSampler(sampler, self.args.data_seed or self.args.seed)
        return sampler

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        place = Path(str(self.args.output_dir))
        place.mkdir(parents=True, exist_ok=True)
        step = self.state.global_step
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=place) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            seal(Path(staging) / f"checkpoint-{step}", place / f"checkpoint-{step}", step)
        keep_newest(place, self.args.save_total_limit or KEPT_CHECKPOINTS)


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
        own |= {"max_steps": max_steps, "eval_strategy": "no"}
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
    train_collator: DataCollator | None = None,
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
        train_collator=train_collator,
        head_averages=task.head_averages,
    )
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
