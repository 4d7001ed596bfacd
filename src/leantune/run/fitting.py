"""A Trainer whose batches fit: what is too large for memory goes through the model in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from leantune.errors import RunError
from leantune.run import lean
from leantune.run.dealing import Dealt
from leantune.run.parts import RowsAtOnce, is_out_of_memory, parts_of, release, rows_between, rows_in
from leantune.run.tasks.token_metrics import IGNORED


class FittingTrainer(Trainer):
    """Trainer that splits a batch which does not fit in memory, in training and in evaluation.

    Args:
        head_averages: The head divides its loss by the tokens of its own batch, whatever it is told of the
            other micro-batches of the step.
        *args: As for `Trainer`.
        **kwargs: As for `Trainer`.
    """

    reduce_logits: Callable[..., torch.Tensor] | None = None
    say: Callable[[str], object] = staticmethod(lambda text: None)
    would_fit: Callable[[int, int], str] = staticmethod(lambda rows, length: "lower the batch or the length")
    _share = 1.0  # with which the next loss enters
    _tokens_before: dict[str, int] | None = None  # the optimizer step in progress
    _dealt: Dealt | None = None  # the step's last batch, if it is an epoch's and not full

    def __init__(self, *args: Any, head_averages: bool = False, **kwargs: Any) -> None:
        self._batches: list[dict[str, Any]] = []  # of the optimizer step in progress
        self._losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)
        self.head_averages = head_averages
        self.add_callback(RowsAtOnce())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As Trainer's; an epoch's last batch loses the rows that it was filled up with (see dealing.py)."""
        batches = list(islice(epoch_iterator, num_batches))
        counted, self._dealt = batches, None
        left = self._left_over() if batches and self.accelerator.gradient_state.end_of_dataloader else 0
        if left:
            last = batches[-1]
            self._dealt = Dealt(left, rows_in(last), self.args.process_index, self.args.world_size)
            # one row stays in any case: all processes take part in every step
            batches[-1] = last = rows_between(last, 0, max(self._dealt.own, 1))
            if not self._dealt.own and "labels" in last:
                counted = [*batches[:-1], {**last, "labels": torch.full_like(last["labels"], IGNORED)}]
        return batches, self._get_num_items_in_batch(counted, device)

    def _left_over(self) -> int:
        """Rows in an epoch's last batch, if several processes share it and it is not full."""
        args: Any = self.args
        if args.world_size == 1 or args.dataloader_drop_last:
            return 0
        # accelerate's own `remainder` is not known in an epoch that is resumed in the middle
        return len(cast(Sized, self.train_dataset)) % (args.per_device_train_batch_size * args.world_size)

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
        self._share = self._own_share(items)  # a pass that failed may have left its own
        try:
            if most is None or rows <= most:
                with nullcontext() if self._share else lean.unmeasured(model):
                    return super().training_step(model, inputs, items)
            return self._in_parts(model, inputs, items, rows, most)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._rows_at_once.training = self._fewer(rows, most, inputs)
        return None

    def _own_share(self, items: Any) -> float:
        """With which a batch's loss enters, whose rows were dealt to several processes."""
        last = len(self._batches) == self.current_gradient_accumulation_steps
        if self._dealt is None or not last:
            return 1.0
        if self.model_accepts_loss_kwargs and items is not None:  # divided by the items of all processes
            return float(self._dealt.own > 0)
        return self._dealt.share

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
            raise self.too_large(tried, length, training=bool(self._batches))
        fewer = math.ceil(tried / 2)
        self.say(
            f"out of memory with {tried} rows of {length} tokens at once: now {fewer}, the same batch a step"
        )
        return fewer

    def too_large(self, rows: int, length: int, training: bool) -> RunError:
        """The error of a batch that cannot be made smaller, with what would have fitted."""
        what = f"{rows} rows of {length} tokens do" if rows > 1 else f"one row of {length} tokens does"
        where = f"step {self.state.global_step + 1}" + ("" if training else ", evaluation")
        helps = self.would_fit(rows, length) if training else "lower data.max_length"
        return RunError(f"{where}: {what} not fit in memory; {helps}")

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
