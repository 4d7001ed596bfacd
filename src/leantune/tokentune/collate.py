"""Choose tokens where batches are made, so that whoever normalises the loss counts chosen tokens.

`Trainer` counts the labels of all micro-batches of an optimizer step before the model sees the first; TRL
divides outside the model. Choosing inside the forward comes too late for both: each forward then enters by
its share of *all* labels (an average of means, off by how unevenly the choice fell). With the choice made
here, labels of unchosen tokens are gone before anyone counts, and the loss is the mean over all chosen
tokens of the step, at any accumulation and any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from leantune.anatomy import TOKENWISE, decoder_inputs, find_head
from leantune.errors import UserError
from leantune.tokentune.config import CHOOSE_AHEAD
from leantune.tokentune.forward import IGNORED, Choosing, TokenTuner


class ChoosingCollator:
    """A data collator that also chooses: adds `token_choice` and takes the labels of unchosen tokens out.

        token_tune(model, TokenTuneConfig(0.25))
        trainer = Trainer(model, data_collator=ChoosingCollator(model, collator), ...)

    Calls are counted as forwards are: the same seed, call and rank give the same choice, and `TokenTuneState`
    sets the count when a run is resumed. Use no DataLoader workers. In evaluation the model goes back to all
    labels (they travel as `full_labels`); `compute_metrics` still sees those of chosen tokens only.

    Args:
        model: With TokenTune attached, and a tokenwise head.
        collator: Makes a batch (a mapping of tensors, with `labels`) of features.

    Raises:
        UserError: The head pools (then there is nothing to count), or the strategy needs scores from a
            forward.
    """

    def __init__(self, model: nn.Module, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        tuner = find_head(model).__dict__.get("_leantune_tokens")
        if not isinstance(tuner, TokenTuner):
            raise UserError("ChoosingCollator needs a model with TokenTune attached: call token_tune first")
        if tuner.plan.task not in TOKENWISE:
            raise UserError(f"ChoosingCollator is for losses over tokens; this head does {tuner.plan.task}")
        if tuner.config.strategy not in CHOOSE_AHEAD:
            raise UserError(
                f"strategy={tuner.config.strategy!r} needs scores from a forward; in a collator only "
                f"{', '.join(CHOOSE_AHEAD)} can choose"
            )
        self.tuner, self.collator, self.calls = tuner, collator, tuner.step
        tuner.collators.append(self)

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """Make a batch and choose."""
        batch = dict(self.collator(features))
        return self.choose(batch)

    def choose(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `token_choice` (batch, k), labels of chosen tokens only, and `full_labels`.

        Raises:
            UserError: It has no labels.
        """
        if "labels" not in batch:
            raise UserError("ChoosingCollator: the batch has no labels")
        tuner, labels = self.tuner, batch["labels"]
        if tuner.plan.task == "seq2seq" and "decoder_input_ids" not in batch:  # the decoder reads all labels
            batch["decoder_input_ids"] = decoder_inputs(tuner.plan.head, labels)
        choosing = Choosing(tuner, batch, {"labels": labels}, step=self.calls)
        self.calls += 1
        choosing.on_enter("decoder", labels.size(0), labels.size(1), labels.device)
        batch["token_choice"] = choosing.choices["decoder"]
        batch["full_labels"] = labels
        batch["labels"] = _only(labels, batch["token_choice"], tuner)
        return batch


def _only(labels: Tensor, choice: Tensor, tuner: TokenTuner) -> Tensor:
    """Labels (batch, n) of chosen tokens; the others -100."""
    n = labels.size(1)
    chosen = (
        labels.new_zeros(labels.size(0), n + 1).scatter(1, choice.masked_fill(choice < 0, n), 1)[:, :n].bool()
    )
    if tuner.plan.task == "causal-lm" and tuner.plan.shifts:  # token t predicts label t + 1
        chosen = chosen.roll(1, 1)
        chosen[:, 0] = False
    return labels.masked_fill(~chosen, IGNORED)
