"""What `leantune plan` does with its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from leantune.errors import UserError
from leantune.planner.forecaster import Progress as OnRow
from leantune.planner.known import is_shape
from leantune.planner.planning import Plan, plan
from leantune.recipes import Recipe, yaml
from leantune.recipes.loading import parse_overrides, validate

DEFAULT_BATCH, DEFAULT_LENGTH = 8, 512
_LORA = {"type": "lora", "r": 8}


def plan_command(
    arguments: list[str],
    without_recipe: dict[str, Any],
    *,
    fast: bool,
    all_traced: bool,
    methods: str | None,
    write: Path | None,
    console: Console,
    **asked: Any,
) -> Plan:
    """Plan as the command line asks.

    Args:
        arguments: A recipe's path and `key=value` overrides; without a path, the overrides alone.
        without_recipe: `model`, `task`, `dtype`, `batch`, `length` as typed.
        fast: The closed form for all.
        all_traced: Nothing but traced figures.
        methods: Names with commas between.
        write: Where the recipe that fits goes.
        console: Where progress is shown.
        **asked: The rest of `plan`'s arguments, as typed.

    Raises:
        UserError: Any of it is not accepted.
    """
    if fast and all_traced:
        raise UserError("--fast and --trace exclude each other")
    if write is not None and asked["memory"] is None:
        raise UserError("--write needs --memory: it writes the recipe that fits in it")
    if write is not None and write.exists():
        raise UserError(f"--write = {str(write)!r}: exists already")
    recipe, batch, length = _recipe(arguments, without_recipe)
    if write is not None and is_shape(recipe.model.path):
        raise UserError(f"--write: model.path = {recipe.model.path!r} is a shape without weights")
    with _bar(console) as progress:
        made = plan(
            recipe,
            batch=batch,
            length=length,
            methods=None
            if methods is None
            else [name.strip() for name in methods.split(",") if name.strip()],
            trace="none" if fast else "all" if all_traced else "own",
            progress=progress,
            **asked,
        )
    if write is not None:
        _write(made, write)
    return made


def _recipe(arguments: list[str], given: dict[str, Any]) -> tuple[Recipe, int | None, int | None]:
    """The recipe, batch and length that were asked for."""
    paths = [text for text in arguments if "=" not in text]
    overrides = [text for text in arguments if "=" in text]
    if len(paths) + (given["model"] is not None) != 1:
        raise UserError("give one RECIPE.yaml, or --model NAME_OR_FOLDER")
    if paths:
        return Recipe.load(Path(paths[0]), *overrides), given["batch"], given["length"]
    batch = given["batch"] or DEFAULT_BATCH
    data: dict[str, Any] = {
        "model": {"path": given["model"], "task": given["task"], "dtype": given["dtype"]},
        "data": {"path": "data"},
        "lean": {"adapter": dict(_LORA)},
        "train": {"batch_size": batch, "eval_batch_size": batch},
        "output": "runs/planned",
    }
    for keys, value in parse_overrides(overrides):
        group = data
        for key in keys[:-1]:
            group = group.setdefault(key, {})
        group[keys[-1]] = value
    return validate(data, "--model"), None, given["length"] or DEFAULT_LENGTH


def _write(made: Plan, file: Path) -> None:
    """The least change that fits, as a recipe.

    Raises:
        UserError: Nothing fits.
    """
    best = None if made.advice is None else made.advice.best
    if made.advice is None or best is None:
        raise UserError(f"--write = {str(file)!r}: nothing fits in the memory given, so there is no recipe")
    text = yaml.dump(made.advice.recipes[best.name].to_dict())
    file.write_text(f"# leantune train {file}\n# planned: {best.name}\n{text}", encoding="utf-8")


@contextmanager
def _bar(console: Console) -> Iterator[OnRow]:
    """Shown while something is worked on, gone afterwards."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("planning", total=None)

        def on_row(number: int, count: int, name: str) -> None:
            bar.update(task, completed=number, total=count, description=f"planning {name}")

        yield on_row
