"""Labels, numbers or text from a finished run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from leantune.errors import UserError
from leantune.run.loading import LoadedRun, open_run
from leantune.run.tasks import Prediction
from leantune.run.tasks.base import effective_max_length


def predict(run: str | Path, texts: Sequence[str | tuple[str, str]]) -> list[Prediction]:
    """Ask a finished run.

    Args:
        run: The run folder.
        texts: Inputs; pairs of texts for a run on text pairs.

    Returns:
        One `Prediction` an input, in order: `.predicted` is a label's name, a number, or the text that
        continues the prompt; `.score` the label's probability.

    Raises:
        UserError: There is no such run, or its task takes pairs and these are none (or the reverse).
    """
    loaded = open_run(run)
    return list(predict_with(loaded, [typed_input(loaded, text) for text in texts]))


def typed_input(loaded: LoadedRun, text: str | tuple[str, str]) -> tuple[str, str | None]:
    """What a person types → an input of the run's task."""
    return (loaded.task.as_input(text, loaded.tokenizer), None) if isinstance(text, str) else text


def predict_with(loaded: LoadedRun, inputs: Sequence[tuple[str, str | None]]) -> Iterator[Prediction]:
    """As `predict`, with a run that is open already."""
    wants_pair = loaded.recipe.data.text_pair is not None
    for _, second in inputs:
        if (second is not None) != wants_pair:
            what = "pairs of texts (give the second with --pair)" if wants_pair else "single texts"
            raise UserError(f"{loaded.folder.path}: this run takes {what}")
    length = effective_max_length(loaded.recipe, loaded.config, loaded.tokenizer)
    return loaded.task.predict(loaded.model, loaded.tokenizer, inputs, length)  # type: ignore[arg-type]


def read_inputs(file: Path, loaded: LoadedRun) -> list[tuple[str, str | None]]:
    """Inputs of a file: one text a line, or JSON lines with the columns of the run's data.

    Raises:
        UserError: The file is missing, not UTF-8, or a line lacks the columns.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    if file.suffix != ".jsonl":
        return [typed_input(loaded, line) for line in lines if line.strip()]
    inputs = []
    for number, line in enumerate(lines, 1):
        try:
            row: dict[str, Any] = json.loads(line)
            inputs.append(loaded.task.read_input(row, loaded.tokenizer))
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError):
            raise UserError(
                f"{file}, line {number}: no JSON object with the text column of this run"
            ) from None
    return inputs


def sample_predictions(loaded: LoadedRun, split: Dataset, count: int) -> list[Prediction]:
    """Predictions on evenly spaced rows of a split, beside what was expected."""
    step = max(1, len(split) // count)
    rows = [split[index] for index in range(0, len(split), step)][:count]
    inputs = [loaded.task.read_input(row, loaded.tokenizer) for row in rows]
    said = predict_with(loaded, inputs)
    return [
        Prediction(one.input, one.predicted, one.score, loaded.task.read_label(row))
        for one, row in zip(said, rows, strict=True)
    ]
