"""What tasks that write text share: how rows are made, batches padded, and tokens counted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PretrainedConfig, PreTrainedTokenizerBase

from leantune.recipes import Recipe
from leantune.run.tasks.base import Task
from leantune.run.tasks.token_metrics import IGNORED, mean_metrics

MAX_NEW_TOKENS = 128


class Writing(Task):
    """A loss for each token; the form of the rows is found in the data and kept in the model's config."""

    counts_tokens = True
    main_metric: ClassVar[str] = "loss"
    usual_form: ClassVar[str]

    def __init__(self, recipe: Recipe, config: PretrainedConfig | None = None) -> None:
        super().__init__(recipe, config)
        self.form: str = getattr(config, "row_format", self.usual_form)

    def fit(self, splits: DatasetDict) -> dict[str, Any]:
        """See that the columns exist, and remember how rows are made."""
        forms = [self._check(split, f"the {name} split") for name, split in splits.items()]
        self.form = forms[0]
        return {"row_format": self.form}

    @abstractmethod
    def _check(self, split: Dataset, where: str) -> str:
        """The form of a split's rows."""

    def collator(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pad to the batch's longest row, labels with -100."""
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Mean loss over all counted tokens (not over batches), perplexity, next-token accuracy."""
        return mean_metrics(prediction.predictions)
