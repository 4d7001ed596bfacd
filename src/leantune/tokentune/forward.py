"""One training forward under TokenTune: choose, record, train, and the loss on the chosen tokens."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from leantune.anatomy import TOKENWISE, Side, decoder_inputs
from leantune.errors import UserError
from leantune.tokentune.choose import Candidates, choose, generator_for
from leantune.tokentune.config import CHOOSE_AHEAD, TokenTuneConfig
from leantune.tokentune.plan import Plan
from leantune.tokentune.record import Recording
from leantune.tokentune.rows import Rows
from leantune.tokentune.score import Scorer
from leantune.tokentune.train import Training

IGNORED = -100


class TokenTuner:
    """TokenTune attached to one model.

    Attributes:
        plan: The model's shape.
        config: What to choose.
        step: Training forwards done so far; with the seed and the rank it determines the next choice.
        chosen: Choice of the last training forward, per side.
        lengths: n of the last training forward, per side.
        part: (first row, rows in all) while a batch goes through the model in parts.
        on_chosen: Is told labels and chosen labels per row; then the forward ends, without its second pass.
    """

    def __init__(self, plan: Plan, config: TokenTuneConfig) -> None:
        self.plan, self.config, self.step = plan, config, 0
        self.part: tuple[int, int] | None = None
        self.on_chosen: Callable[[Tensor, Tensor], None] | None = None
        self.chosen: dict[Side, Tensor] = {}
        self.lengths: dict[Side, int] = {}
        self.handles: list[Any] = []
        self.collators: list[Any] = []  # ChoosingCollators that choose for this model
        self.positional = list(inspect.signature(type(plan.head).forward).parameters)[1:]

    def forward(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        """The two passes.

        Args:
            original: The head model's own forward.
            given: All arguments of the call, by name. `token_choice` (batch, k) may fix the choice.

        Returns:
            The model's output with `loss`, and `logits` of the chosen tokens (batch, k, …) for tokenwise
            heads.
        """
        inputs, targets, as_tuple = self.split(given)
        choose_now = Choosing(self, inputs, targets)
        self.step += 1
        sequence = self.plan.pooling is not None and self.plan.pooling.position is None
        scorer = Scorer(self.config.strategy, self.plan, choose_now.aligned, choose_now.pooled)
        recording = Recording(
            self.plan,
            choose_now.on_enter,
            stop_early=not sequence and not scorer.needs_output,
            shrink=self.plan.task in TOKENWISE and not scorer.needs_output,
            watch=scorer.watch,
            rerunnable=self._reruns(),
        )
        with recording.active():
            first = original(**inputs)
        choose_now.finish(scorer.scores(recording, first))
        del first
        recording.entering.clear()
        if self.on_chosen is not None:
            self.on_chosen(*choose_now.learned())
            return ModelOutput(loss=torch.zeros(()))
        rows = {side: Rows(choice, recording.sizes[side][1]) for side, choice in choose_now.choices.items()}
        self.chosen = choose_now.choices
        self.lengths = {side: n for side, (_, n) in recording.sizes.items()}
        if self.plan.task not in TOKENWISE:
            inputs = inputs | {name: targets[name] for name in wanted_targets(self.plan.task)}
        if targets["fused"]:  # TRL: it computes the loss from log-probabilities itself, of aligned labels
            target = rows["decoder"].fill(rows["decoder"].gather(choose_now.aligned(), 1), IGNORED)
            inputs |= {"fused_lm_head": True, "shift_labels": target}
        training = Training(self.plan, recording, rows, merge=sequence)
        del recording
        with training.active():
            output = original(**inputs)
        training.merged = None
        if not targets["fused"]:
            self._set_loss(output, targets, rows["decoder"], choose_now)
        return output.to_tuple() if as_tuple else output

    def _reruns(self) -> bool:
        wanted = self.config.checkpointed_kv == "recompute" and self.plan.reruns
        return wanted and all(getattr(layer, "gradient_checkpointing", False) for layer in self.plan.layers)

    def split(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], bool]:
        """Inputs of both passes, targets, and whether the caller wants a tuple."""
        inputs = {k: v for k, v in given.items() if v is not None and k != "full_labels"}
        targets: dict[str, Any] = {
            name: inputs.pop(name)
            for name in ("labels", "shift_labels", "start_positions", "end_positions", "token_choice")
            if name in inputs
        }
        targets["num_items"] = inputs.pop("num_items_in_batch", None)
        targets["fused"] = bool(inputs.pop("fused_lm_head", False))
        if targets["fused"] and "token_choice" not in targets:
            raise UserError(
                "TRL divides the loss outside the model, by the number of all labels: choose tokens in the "
                "collator, trainer.data_collator = ChoosingCollator(model, trainer.data_collator)"
            )
        wanted = wanted_targets(self.plan.task)
        if not all(name in targets for name in wanted):
            raise UserError(
                "TokenTune computes the loss on chosen tokens: a training forward needs "
                f"{' and '.join(wanted)} (Trainer's label smoothing and compute_loss_func take them away)"
            )
        if inputs.get("past_key_values") is not None:
            raise UserError("TokenTune cannot train with past_key_values (prefix tuning, or a filled cache)")
        as_tuple = inputs.pop("return_dict", True) is False
        if "use_cache" in self.plan.parameters:
            inputs["use_cache"] = False
        if self.plan.task == "seq2seq" and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
            inputs["decoder_input_ids"] = decoder_inputs(self.plan.head, targets["labels"])
        return inputs, targets, as_tuple

    def _set_loss(
        self, output: ModelOutput, targets: Mapping[str, Any], rows: Rows, chosen: Choosing
    ) -> None:
        num_items, labels = targets["num_items"], targets.get("labels")
        if self.plan.task in TOKENWISE:
            target = rows.fill(rows.gather(chosen.aligned(), 1), IGNORED)  # (batch, k)
            output["loss"] = self._token_loss(output["logits"], target)
            output.move_to_end("loss", last=False)
            labels = chosen.aligned()
        if num_items is not None and labels is not None:
            # the caller sums the losses of several forwards (accumulation, processes) and has counted all
            # labels: this one's mean enters by its share of them
            output["loss"] = output["loss"] * ((labels != IGNORED).sum() / num_items)

    def _token_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over the chosen tokens that bear a label; 0 if none does."""
        if not bool((target != IGNORED).any()):
            return logits.sum() * 0.0
        if (
            self.plan.task == "causal-lm" and self.plan.shifts
        ):  # `shift_labels`: they are aligned with the logits already
            return self.plan.head.loss_function(
                logits=logits, labels=target, vocab_size=logits.size(-1), shift_labels=target
            )
        return F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), ignore_index=IGNORED)


def wanted_targets(task: str) -> tuple[str, ...]:
    """Names of the targets that a training forward must be given."""
    return ("start_positions", "end_positions") if task == "question-answering" else ("labels",)


class Choosing:
    """The choice of one forward: made when a sequence enters its stack, or (by scores) after pass 1."""

    def __init__(
        self,
        tuner: TokenTuner,
        inputs: Mapping[str, Any],
        targets: Mapping[str, Any],
        step: int | None = None,
    ) -> None:
        self.tuner, self.plan, self.config = tuner, tuner.plan, tuner.config
        self.inputs, self.targets = inputs, targets
        self.step = tuner.step if step is None else step
        self.choices: dict[Side, Tensor] = {}
        self.waiting: dict[Side, Candidates] = {}

    def aligned(self) -> Tensor:
        """Token labels, aligned with the tokens that predict them: (batch, n), -100 where there is none."""
        if "shift_labels" in self.targets:
            return self.targets["shift_labels"]
        labels = self.targets["labels"]
        if self.plan.task != "causal-lm" or not self.plan.shifts:
            return labels
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def pooled(self) -> Tensor | None:
        """The position (batch,) that feeds the head, of a choice that waits for pass 1; None if none does."""
        waiting = self.waiting.get("decoder")
        return None if waiting is None else waiting.pooled

    def on_enter(self, side: Side, batch: int, n: int, device: torch.device) -> int | None:
        """Choose for a sequence that enters its stack; returns how many leading positions are needed."""
        candidates = self._candidates(side, batch, n, device)
        given = self.targets.get("token_choice")
        if given is not None and side == "decoder":
            self.choices[side] = _checked(given.to(device), batch, n)
        elif self.config.strategy in CHOOSE_AHEAD:
            self.choices[side] = self._choose(side, candidates)
        else:
            self.waiting[side] = candidates
            return None
        needed = int(self.choices[side].max()) + 1
        return needed if self.plan.truncates and needed <= n - max(1, n // 32) else None

    def finish(self, scores: Mapping[Side, Tensor]) -> None:
        """Make the choices that waited for pass 1."""
        for side, candidates in self.waiting.items():
            candidates.score = scores.get(side)
            self.choices[side] = self._choose(side, candidates)

    def learned(self) -> tuple[Tensor, Tensor]:
        """Tokens (batch,) that bear a label, and how many of them are chosen. After the choice."""
        labels = self.aligned() != IGNORED
        rows = Rows(self.choices["decoder"], labels.size(1))
        return labels.sum(1), rows.fill(rows.gather(labels, 1), False).sum(1)

    def _choose(self, side: Side, candidates: Candidates) -> Tensor:
        generator = generator_for(self.config.seed, self.step, _rank(), side == "encoder")
        return choose(self.config, candidates, generator, self.tuner.part)

    def _candidates(self, side: Side, batch: int, n: int, device: torch.device) -> Candidates:
        real = self._real(side, batch, n, device)
        if side == "encoder":
            return Candidates(real)
        pooling, supervised, pooled = self.plan.pooling, None, None
        if self.plan.task in TOKENWISE:
            supervised = (self.aligned() != IGNORED).to(device)
            if supervised.shape != (batch, n):
                raise UserError(
                    f"labels of shape {tuple(supervised.shape)} do not fit the {batch} sequences of "
                    f"{n} tokens that the layers of {type(self.plan.head).__name__} see"
                )
        elif self.plan.task == "question-answering":
            ends = torch.stack([self.targets["start_positions"], self.targets["end_positions"]], 1).to(device)
            inside = torch.zeros(batch, n + 1, dtype=torch.bool, device=device)
            supervised = inside.scatter(1, ends.reshape(batch, -1).clamp(0, n), True)[:, :n]
        if pooling is not None and pooling.position is not None:
            pooled = pooling.position(self.inputs, n).to(device)
        special = None
        if self.plan.has_special:  # the first real token: [CLS], <s>
            special = torch.zeros_like(real).scatter(1, real.long().argmax(1, keepdim=True), True)
        return Candidates(real, supervised, pooled, special)

    def _real(self, side: Side, batch: int, n: int, device: torch.device) -> Tensor:
        names = ["attention_mask"]
        if side == "decoder" and len(self.plan.stacks) > 1:
            names = ["decoder_attention_mask"]
        for name in names:
            mask = self.inputs.get(name)
            if isinstance(mask, Tensor) and mask.dim() in (2, 3) and mask.size(-1) == n:
                return mask.reshape(-1, n).bool().to(device)
        if names == ["decoder_attention_mask"] and self.plan.task == "seq2seq":
            # no mask is customary here: what bears no label after the last label is padding
            labels = (self.targets["labels"] != IGNORED).to(device)
            return (
                labels.flip(1).cummax(1).values.flip(1)
                if bool(labels.any(1).all())
                else torch.ones_like(labels)
            )
        return torch.ones(batch, n, dtype=torch.bool, device=device)


def _checked(choice: Tensor, batch: int, n: int) -> Tensor:
    if choice.dim() != 2 or choice.size(0) != batch or int(choice.max()) >= n:
        raise UserError(
            f"token_choice of shape {tuple(choice.shape)} and largest entry {int(choice.max())} does not fit "
            f"{batch} sequences of {n} tokens"
        )
    return choice


def _rank() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
