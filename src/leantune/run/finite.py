"""A Trainer that sees a loss or a gradient which is not finite while the weights are still good."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn

from leantune.errors import RunError
from leantune.run import lean, processes
from leantune.run.fitting import FittingTrainer
from leantune.run.health import damaged_parameter, first_not_finite, rows_of, told_rows


class FiniteTrainer(FittingTrainer):
    """Trainer that stops, or skips the step, where loss or gradient are not finite (`on_nan`)."""

    on_nan: str = "stop"
    _epoch: tuple[int, int] = (0, 1)  # number, and optimizer steps in it
    _skipped_now = False

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once before each optimizer step: the last moment at which the weights are still good."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()  # of sharded gradients
        seen = torch.stack(self._losses).sum().detach()
        if self.accelerator.scaler is None:  # else an overflow is ordinary, and the scaler skips the step
            seen = seen + torch.as_tensor(norm, device=seen.device)
        # one number is read from the device; the log reads two a step in any case
        if processes.any_of(int(not math.isfinite(seen))):
            if self.on_nan == "stop":
                raise processes.shared(RunError(self._what_is_not_finite()))
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

    def _what_is_not_finite(self) -> str:
        """What to tell; with several processes, of the first whose own loss is not finite."""
        loss = float(torch.stack(self._losses).sum())
        losses = processes.gathered(loss)
        rank = next((number for number, one in enumerate(losses) if not math.isfinite(one)), 0)
        told = processes.gathered(self._where_it_began(loss) if rank == processes.rank() else "")[rank]
        return told if len(losses) == 1 else f"process {rank}: {told}"

    def _where_it_began(self, loss: float) -> str:
        step = self.state.global_step + 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        number, steps = self._epoch
        each = self.args.gradient_accumulation_steps
        first = (self.state.global_step - number * steps) * each
        rows = rows_of(self.callback_handler.train_dataloader, number, first, len(self._batches))
        batch = f"; its batch: rows {told_rows(rows)} of the train split" if rows else ""
        model = cast(nn.Module, self.model)
        where = None if self.is_fsdp_enabled else damaged_parameter(model)
        if self.is_fsdp_enabled:  # its forward needs all processes
            origin = "where it began is not looked for with train.fsdp"
        elif where is not None:
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
