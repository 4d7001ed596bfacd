"""What a model's output head does with the tokens that come out of the stack.

    tokens      every token has its own output (language models, token classification)
    pooled      one position of each row feeds the output (the first, the last real one, …)
    sequence    all positions do (mean pooling, question answering)

Tokenwise heads are known by their class (transformers' own auto-model tables). Whether a classifier pools one
position, and which, is measured: the gradient of its output with respect to what leaves the last layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from leantune.errors import UserError

Task = Literal[
    "causal-lm", "masked-lm", "token-classification", "seq2seq", "question-answering", "classification"
]

_TABLES: tuple[tuple[Task, tuple[Mapping[str, Any], ...]], ...] = (
    ("seq2seq", (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,)),
    ("causal-lm", (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,)),
    ("masked-lm", (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,)),
    ("token-classification", (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,)),
    ("question-answering", (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,)),
    (
        "classification",
        (
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
            auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
        ),
    ),
)
TOKENWISE: frozenset[str] = frozenset({"causal-lm", "masked-lm", "token-classification", "seq2seq"})


def find_task(head: PreTrainedModel) -> Task:
    """The head's task, by its class.

    Raises:
        UserError: The class has no head, or one whose loss we do not know.
    """
    names = [cls.__name__ for cls in type(head).__mro__]
    for name in names:
        for task, tables in _TABLES:
            if any(name in _flat(table) for table in tables):
                return task
    known = ", ".join(task for task, _ in _TABLES)
    raise UserError(f"{names[0]} is no model with a head for one of: {known}")


def _flat(table: Mapping[str, Any]) -> set[str]:
    return {n for value in table.values() for n in ((value,) if isinstance(value, str) else value)}


def decoder_inputs(head: Any, labels: Tensor) -> Tensor:
    """What a sequence-to-sequence model's decoder reads, given labels (batch, n): they, shifted right.

    Raises:
        UserError: The model does not say how.
    """
    if hasattr(head, "prepare_decoder_input_ids_from_labels"):
        return head.prepare_decoder_input_ids_from_labels(labels=labels)
    shift = getattr(sys.modules[type(head).__module__], "shift_tokens_right", None)
    if shift is None:
        raise UserError(
            f"{type(head).__name__} cannot make decoder inputs from labels: give decoder_input_ids"
        )
    return shift(labels, head.config.pad_token_id, head.config.decoder_start_token_id)


@dataclass(frozen=True)
class Pooling:
    """Which position of each row feeds the head.

    Attributes:
        name: `first`, `last`, `final`, `eos`, or `sequence` for all of them.
        position: Maps the forward's keyword arguments and the sequence's length n to positions (batch,); None
            for `sequence`.
    """

    name: str
    position: Callable[[Mapping[str, Any], int], Tensor] | None


def poolings(head: PreTrainedModel) -> list[Pooling]:
    """The rules that stock heads follow, in the order in which they are tried."""
    config = head.config.get_text_config()
    pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    rules = [
        Pooling("first", lambda batch, n: torch.zeros(_rows(batch), dtype=torch.long, device=_device(batch)))
    ]
    if pad is not None:
        rules.append(Pooling("last", lambda batch, n: _last(batch, n, lambda ids: ids != pad)))
    rules.append(Pooling("final", lambda batch, n: _last(batch, n, torch.ones_like)))
    if isinstance(eos, int):
        rules.append(Pooling("eos", lambda batch, n: _last(batch, n, lambda ids: ids == eos)))
    return rules


def _main(batch: Mapping[str, Any]) -> Tensor:
    for name in ("input_ids", "inputs_embeds", "pixel_values"):
        if batch.get(name) is not None:
            return batch[name]
    raise UserError("the forward has none of input_ids, inputs_embeds, pixel_values")


def _rows(batch: Mapping[str, Any]) -> int:
    main = _main(batch)
    # multiple choice: (batch, choices, n) are batch · choices rows
    return main.shape[:-1].numel() if batch.get("input_ids") is not None else main.size(0)


def _device(batch: Mapping[str, Any]) -> torch.device:
    return _main(batch).device


def _last(batch: Mapping[str, Any], n: int, test: Callable[[Tensor], Tensor]) -> Tensor:
    """Last position of each row that passes `test` (n - 1 where the tokens cannot be seen); (batch,)."""
    ids = batch.get("input_ids")
    if ids is None or ids.size(-1) != n:
        return torch.full((_rows(batch),), n - 1, device=_device(batch))
    passes = test(ids.flatten(0, -2)).long()  # (batch, n)
    return (passes * torch.arange(n, device=ids.device)).argmax(-1)
