"""Open a data set: a folder of split files, one file, or a hub name → named splits of rows.

Reading is Hugging Face `datasets`' work; what is here finds the files, checks them, and turns whatever goes
wrong into one line.
"""

from __future__ import annotations

import difflib
import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset
from datasets.utils import logging as datasets_logging

from leantune.errors import UserError, first_line
from leantune.recipes import DataRecipe

SPLITS = ("train", "validation", "test")
# File name ending → the builder of `datasets` that reads it.
BUILDERS = {
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".json.gz": "json",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".parquet": "parquet",
}


def open_splits(recipe: DataRecipe, seed: int, need_train: bool = True) -> DatasetDict:
    """The data set's splits, sampled and divided as the recipe says.

    Args:
        recipe: The recipe's `data`.
        seed: Decides which rows a sample or the set-aside validation part takes.
        need_train: Refuse data without a train split.

    Returns:
        `train`, `validation`, `test` as far as they exist, each with at least one row.

    Raises:
        UserError: Nothing is there, it cannot be read, or a split is empty.
    """
    disable_progress_bars()
    path = Path(recipe.path).expanduser()
    splits = _open_files(_split_files(path)) if path.exists() else _open_hub(recipe.path)
    for name, split in splits.items():
        if len(split) == 0:
            raise UserError(f"data.path = {recipe.path!r}: the {name} split is empty")
    if need_train and "train" not in splits:
        raise UserError(f"data.path = {recipe.path!r}: no train split (found: {', '.join(splits)})")
    return _sample(splits, recipe, seed)


def check_columns(split: Dataset, named: dict[str, str | None], where: str) -> None:
    """See that the columns that the recipe names exist.

    Args:
        split: Any split of the data.
        named: Recipe key → column name (null keys are passed over).
        where: What to call the data in the error.

    Raises:
        UserError: One line for each column that is not there.
    """
    lines = []
    for key, column in named.items():
        if column is not None and column not in split.column_names:
            near = difflib.get_close_matches(column, split.column_names, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            columns = ", ".join(split.column_names)
            lines.append(f"data.{key} = {column!r}: {where} has no such column{guess} (columns: {columns})")
    if lines:
        raise UserError("\n".join(lines))


def find_column(split: Dataset, usual: Iterable[str], key: str, where: str) -> str:
    """The first of the usual names that is a column.

    Raises:
        UserError: None is; the line says which recipe key to set.
    """
    for name in usual:
        if name in split.column_names:
            return name
    columns = ", ".join(split.column_names)
    raise UserError(f"data.{key} is missing: name the column of {where} (columns: {columns})")


def _ending(path: Path) -> str | None:
    return next(
        (ending for ending in sorted(BUILDERS, key=len, reverse=True) if path.name.endswith(ending)), None
    )


def _split_files(path: Path) -> dict[str, Path]:
    """Split name → file. A single file is `train`, unless its name says another split."""
    accepted = ", ".join(BUILDERS)
    if path.is_file():
        if _ending(path) is None:
            raise UserError(f"data.path = {str(path)!r}: the file's ending is none of {accepted}")
        name = path.name.split(".")[0]
        return {name if name in SPLITS else "train": path}
    files: dict[str, Path] = {}
    for split in SPLITS:
        found = [file for file in sorted(path.glob(f"{split}.*")) if _ending(file)]
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise UserError(f"data.path = {str(path)!r}: the {split} split is there twice ({names})")
        if found:
            files[split] = found[0]
    if not files:
        raise UserError(
            f"data.path = {str(path)!r}: holds no train, validation or test file (endings: {accepted})"
        )
    return files


def _open_files(files: dict[str, Path]) -> DatasetDict:
    splits = DatasetDict()
    for name, file in files.items():
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the {name} split is empty")
        builder = BUILDERS[_ending(file) or ""]
        if builder != "parquet":
            _check_text(file)
        try:
            with _quiet_datasets():  # it logs the failure, which is told below
                splits[name] = load_dataset(builder, data_files={name: str(file)}, split=name)
        except (
            Exception
        ) as error:  # pyarrow's, pandas' and datasets' own kinds; to a person they mean the same
            raise UserError(f"{file}: cannot be read as {builder}: {_reason(error)}") from None
    return splits


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    verbosity = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity)


def _check_text(file: Path) -> None:
    """pyarrow takes any bytes for text and fails much later.

    Raises:
        UserError: The file is not UTF-8, or a gzip file is cut short.
    """
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as stream:
            while stream.read(1 << 20):
                pass
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def _open_hub(name: str) -> DatasetDict:
    try:
        found = load_dataset(name)
    except Exception as error:  # the hub's client raises a dozen kinds: to a person they all mean this
        where = "no such file or folder here, and not to be had from the hub"
        raise UserError(f"data.path = {name!r}: {where}: {_reason(error)}") from None
    return DatasetDict({split: found[split] for split in SPLITS if split in found})


def _reason(error: BaseException) -> str:
    """The innermost cause's first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _sample(splits: DatasetDict, recipe: DataRecipe, seed: int) -> DatasetDict:
    """Set validation aside and cut splits down, the same way each time."""
    if recipe.validation_fraction and "train" in splits:
        if "validation" in splits:
            raise UserError("data.validation_fraction: the data has a validation split of its own")
        if int(len(splits["train"]) * recipe.validation_fraction) < 1:
            raise UserError(
                f"data.validation_fraction = {recipe.validation_fraction}: leaves no validation row "
                f"of {len(splits['train'])}"
            )
        parts = splits["train"].train_test_split(recipe.validation_fraction, seed=0)
        splits = DatasetDict({**splits, "train": parts["train"], "validation": parts["test"]})
    if recipe.train_rows and "train" in splits:
        train = splits["train"].shuffle(seed=seed)
        splits["train"] = train.select(range(min(recipe.train_rows, len(train))))
    if recipe.evaluation_rows:
        for name in ("validation", "test"):
            if name in splits:
                rows = splits[name].shuffle(seed=0)  # files are often sorted by label
                splits[name] = rows.select(range(min(recipe.evaluation_rows, len(rows))))
    return DatasetDict({name: splits[name] for name in SPLITS if name in splits})
