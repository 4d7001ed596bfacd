"""The run folder: what lies where, and writing it so that nothing is ever half there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leantune.errors import UserError
from leantune.recipes import Recipe, yaml
from leantune.recipes.loading import validate
from leantune.run import manifest


class RunFolder:
    """Paths and files of one run (DESIGN.md, "Run folder")."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.recipe_file = self.path / "recipe.yaml"
        self.metrics_file = self.path / "metrics.json"
        self.log_file = self.path / "log.jsonl"
        self.predictions_file = self.path / "predictions.jsonl"
        self.report_file = self.path / "report.html"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.pruning = self.path / "pruning"
        self.plan_file = self.pruning / "plan.json"
        self.checkpoints = self.path / "checkpoints"
        self.estimation = self.checkpoints / "estimation"
        self.warm_start = self.checkpoints / "warm-start"
        self._folders = (self.adapter, self.model, self.checkpoints, self.pruning)
        self._files = (self.metrics_file, self.log_file, self.predictions_file, self.report_file)

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """A run folder that holds a run.

        Raises:
            UserError: It does not.
        """
        folder = cls(path)
        if not folder.path.is_dir():
            raise UserError(f"{path}: no such run folder")
        if not folder.recipe_file.is_file():
            raise UserError(f"{path}: not a run folder (no recipe.yaml in it)")
        folder.refuse_links()
        return folder

    def recipe(self) -> Recipe:
        """The run's resolved recipe."""
        data = yaml.read(self.recipe_file)
        if not isinstance(data, dict):
            raise UserError(f"{self.recipe_file}: not a recipe")
        return validate(data, str(self.recipe_file))

    def metrics(self) -> dict[str, Any] | None:
        """The finished run's metrics; None while there are none."""
        if not self.metrics_file.is_file():
            return None
        try:
            return json.loads(self.metrics_file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise UserError(f"{self.metrics_file}: not valid JSON") from None

    def saved_weights(self) -> Path:
        """Where the finished run's weights lie: `adapter/`, or `model/` after full fine-tuning.

        Raises:
            UserError: The run has not finished.
        """
        for folder in (self.adapter, self.model):
            if folder.is_dir():
                return folder
        raise UserError(
            f"{self.path}: the run has not finished (no adapter/ or model/); continue it with --resume"
        )

    def check_undamaged(self) -> None:
        """See that weights, plan and the adapter between the stages are what was written.

        Raises:
            UserError: A file is not what its folder's manifest says.
        """
        for folder in (self.adapter, self.model, self.pruning, self.warm_start):
            manifest.check(folder)

    def check_free(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        """See that a run of `recipe` may start (or go on) here. Changes nothing.

        Raises:
            UserError: Another run, or something that is no run, lies here.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output = {str(self.path)!r}: is a file")
        self.refuse_links()
        if self._is_empty():
            if resume:
                raise UserError(f"output = {str(self.path)!r}: no run to resume")
            return
        if not self.recipe_file.is_file():
            raise UserError(f"output = {str(self.path)!r}: the folder is not empty and holds no run")
        if resume:
            self._check_same(recipe)
        elif not overwrite:
            raise UserError(f"output = {str(self.path)!r}: holds a run already; use --resume or --overwrite")

    def _is_empty(self) -> bool:
        """Whether nothing lies here but a recipe that a killed process was about to write."""
        return not self.path.is_dir() or all(
            entry == _temporary(self.recipe_file) for entry in self.path.iterdir()
        )

    def refuse_links(self) -> None:
        """A run's own files lie in its folder: what is written there must not land elsewhere.

        Raises:
            UserError: One of them, or a checkpoint, is a symbolic link.
        """
        inside = [place for folder in (self.checkpoints, self.estimation) for place in folder.glob("*")]
        for place in [*self._folders, self.estimation, self.warm_start, *self._files, *inside]:
            if place.is_symlink():
                raise UserError(f"{place}: is a symbolic link; a run's folder may hold none")

    def _check_same(self, recipe: Recipe) -> None:
        old, new = _flat(self.recipe().to_dict()), _flat(recipe.to_dict())
        different = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if different:
            told = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in different)
            raise UserError(f"output = {str(self.path)!r}: holds a run of another recipe ({told})")

    def begin(self, recipe: Recipe, overwrite: bool) -> None:
        """Make the folder ready: an old run goes, if it may, and the recipe is written."""
        if overwrite:
            self.clear()
        self._sweep()
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe_file, yaml.dump(recipe.to_dict()))

    def _sweep(self) -> None:
        """What a killed process was about to write or to remove, under names that only this module gives."""
        for place in self._folders:
            for leftover in (_temporary(place), _doomed(place)):
                shutil.rmtree(leftover, ignore_errors=True)
        for place in (*self._files, self.recipe_file):
            _temporary(place).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove a run's own files and folders, nothing else."""
        for file in self._files:  # metrics first: without them the rest is no finished run
            file.unlink(missing_ok=True)
        for folder in self._folders:
            if folder.is_dir():
                remove_folder(folder)
        self.recipe_file.unlink(missing_ok=True)  # last: while it is there, the folder is a run's


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; it is on the disk when this returns."""
    temporary = _temporary(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(path: Path, sealed: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place at the end; on an error nothing is left.

    A folder that stood there stays until the new one is complete.

    Args:
        path: Its name from then on.
        sealed: With a manifest of its files, for `RunFolder.check_undamaged`.
    """
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if sealed:
            write_json(temporary / manifest.MANIFEST, manifest.describe(temporary))
        flush(temporary)
        take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_place(written: Path, place: Path) -> None:
    """Rename a complete folder to `place`; one that stood there goes."""
    if place.exists():
        remove_folder(place)
    written.replace(place)
    sync(place.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder: gone under its name at once, so that no half of it can be taken for the whole."""
    doomed = _doomed(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.replace(doomed)
    shutil.rmtree(doomed)


def flush(folder: Path) -> None:
    """Force all files of a folder, and the folders' own entries, to disk."""
    for entry in [*folder.rglob("*"), folder]:
        sync(entry)


def sync(entry: Path) -> None:
    """Force one file's content, or one folder's entries, to disk."""
    handle = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _doomed(path: Path) -> Path:
    return path.with_name(f".{path.name}.gone")


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    return {
        k: v for key, value in data.items() for k, v in _flat(value, f"{prefix}.{key}".strip(".")).items()
    }
