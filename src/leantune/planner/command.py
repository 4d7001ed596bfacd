"""What `leantune plan` does with its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from leantune.errors import UserError
from leantune.planner.planning import Plan, plan
from leantune.planner.planning import Progress as OnRow
from leantune.planner.rows import LORA, changed
from leantune.planner.sizes import parse_size
from leantune.recipes import Recipe
from leantune.recipes.loading import parse_overrides, validate

DEFAULT_BATCH, DEFAULT_LENGTH = 8, 512


@dataclass
class _Asked:
    recipe: Recipe
    batch: int | None
    length: int | None


def plan_command(
    arguments: list[str],
    without_recipe: dict[str, Any],
    *,
    memory: str | None,
    device: str | None,
    fast: bool,
    alone: bool,
    write: Path | None,
    console: Console,
) -> Plan:
    """Plan as the command line asks.

    Args:
        arguments: A recipe's path and `key=value` overrides; without a path, the overrides alone.
        without_recipe: `model`, `task`, `dtype`, `batch`, `length` as typed.
        memory: A size with a unit.
        device: `cpu`, `cuda`, or None for what is here.
        fast: The closed form.
        alone: No alternatives.
        write: Where the recipe that fits goes.
        console: Where progress is shown.

    Raises:
        UserError: Any of it is not accepted.
    """
    limit = None if memory is None else parse_size(memory)
    if write is not None and limit is None:
        raise UserError("--write needs --memory: it writes the recipe that fits in it")
    if write is not None and write.exists():
        raise UserError(f"--write = {str(write)!r}: exists already")
    asked = _recipe(arguments, without_recipe)
    with _bar(console) as progress:
        made = plan(
            asked.recipe,
            batch=asked.batch,
            length=asked.length,
            memory=limit,
            engine="closed form" if fast else "traced",
            device=_device(device),
            compare=not alone,
            progress=progress,
        )
    if write is not None:
        _write(made, asked.recipe, write)
    return made


def _recipe(arguments: list[str], given: dict[str, Any]) -> _Asked:
    paths = [text for text in arguments if "=" not in text]
    overrides = [text for text in arguments if "=" in text]
    if len(paths) + (given["model"] is not None) != 1:
        raise UserError("give one RECIPE.yaml, or --model NAME_OR_FOLDER")
    if paths:
        return _Asked(Recipe.load(Path(paths[0]), *overrides), given["batch"], given["length"])
    data: dict[str, Any] = {
        "model": {"path": given["model"], "task": given["task"], "dtype": given["dtype"]},
        "data": {"path": "unused"},
        "lean": {"adapter": dict(LORA)},
        "train": {"batch_size": given["batch"] or DEFAULT_BATCH},
        "output": "unused",
    }
    recipe = validate(data, "--model")
    for keys, value in parse_overrides(overrides):
        recipe = changed(recipe, {".".join(keys): value}).recipe
    return _Asked(recipe, None, given["length"] or DEFAULT_LENGTH)


def _device(asked: str | None) -> Any:
    import torch

    if asked not in (None, "cpu", "cuda"):
        raise UserError(f"--device = {asked!r}: accepted are cpu, cuda")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _write(made: Plan, recipe: Recipe, file: Path) -> None:
    """The first of what fits, as a recipe.

    Raises:
        UserError: Nothing fits.
    """
    if not made.fitting:
        raise UserError(f"--write = {str(file)!r}: nothing fits in the memory given, so there is no recipe")
    first = made.fitting[0]
    fitting = changed(recipe, first.changes).recipe if first.changes else recipe
    text = yaml.safe_dump(fitting.to_dict(), sort_keys=False, allow_unicode=True)
    file.write_text(f"# leantune train {file}\n# planned: {first.name}\n{text}", encoding="utf-8")


@contextmanager
def _bar(console: Console) -> Iterator[OnRow]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("planning", total=None)

        def on_row(number: int, count: int, name: str) -> None:
            bar.update(task, completed=number, total=count, description=name)

        yield on_row
