"""The rows of a plan: the recipe itself and what might stand in its place, as changes to the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leantune.planner.setting import is_checkpointed
from leantune.recipes import Recipe
from leantune.recipes.schema import USUAL_LEARNING_RATE

Changes = dict[str, Any]

LORA: Changes = {"type": "lora", "r": 8}
LAMDA: Changes = {"type": "lamda", "r": 32}
THIRD: Changes = {"heads": "1/3", "neurons": "1/3"}
SHARES = (0.5, 0.25, 0.1)
_CHECKPOINTING = "train.gradient_checkpointing"
_NAMES = {"lora": "LoRA", "lamda": "LaMDA", "bottleneck": "Adapter", "none": "full"}


@dataclass(frozen=True)
class Row:
    """A recipe with a name.

    Attributes:
        name: For the table.
        recipe: What is forecast.
        changes: Dotted key → value, against the recipe that the plan is for; empty for that recipe itself.
    """

    name: str
    recipe: Recipe
    changes: Changes


def own_row(recipe: Recipe) -> Row:
    """The recipe as it is."""
    return Row(describe(recipe), recipe, {})


def alternatives(recipe: Recipe) -> list[Row]:
    """What else could be done with the same model and data; without the recipe itself.

    Token selection is shown on top of the recipe's own adapter.
    """
    adapter = recipe.lean.adapter.model_dump()
    changes = [
        *(_lean(kind, checkpointing=on) for kind in ({"type": "none"}, LORA, LAMDA) for on in (False, True)),
        *(_lean(adapter, keep=share, checkpointing=is_checkpointed(recipe)) for share in SHARES),
        _lean(LORA, prune=THIRD),
        _lean(LAMDA, prune=THIRD, keep=0.25),
    ]
    rows = [changed(recipe, change) for change in changes]
    return [row for row in rows if not _same(row.recipe, recipe)]


def _lean(
    adapter: Changes, prune: Changes | None = None, keep: float | None = None, checkpointing: bool = False
) -> Changes:
    return {
        "lean.adapter": adapter,
        "lean.prune": prune,
        "lean.tokens": None if keep is None else {"keep": keep},
        _CHECKPOINTING: checkpointing,
    }


def changed(recipe: Recipe, changes: Changes, name: str | None = None) -> Row:
    """A row of the recipe with some keys changed.

    Args:
        recipe: To start from.
        changes: Dotted key → value.
        name: Default: says what the method is.
    """
    data = recipe.to_dict()
    if recipe.train.learning_rate == USUAL_LEARNING_RATE[recipe.lean.adapter.type]:
        data["train"]["learning_rate"] = None  # another method has another usual one
    for key, value in changes.items():
        group = data
        *path, last = key.split(".")
        for part in path:
            group = group[part]
        group[last] = value
    made = Recipe.model_validate(data)
    return Row(name or describe(made), made, _differences(recipe, changes))


def _differences(recipe: Recipe, changes: Changes) -> Changes:
    """The changes that change something."""
    before = recipe.to_dict()
    result = {}
    for key, value in changes.items():
        group, last = key.rsplit(".", 1)
        old: Any = before
        for part in group.split("."):
            old = old[part]
        if (old.get(last) or None) != (value or None):
            result[key] = value
    return result


def _same(one: Recipe, other: Recipe) -> bool:
    return one.lean == other.lean and is_checkpointed(one) == is_checkpointed(other)


def describe(recipe: Recipe) -> str:
    """The method in a few words: `LoRA r 8 + TokenTune 25 % + checkpointing`."""
    lean, adapter = recipe.lean, recipe.lean.adapter
    first = _NAMES[adapter.type] + ("" if adapter.type == "none" else f" r {adapter.r}")
    if lean.prune is not None and lean.tokens is not None and adapter.type == "lamda":
        parts = [f"lean: {first}"]
    else:
        parts = [first]
    if lean.prune is not None:
        parts.append(f"Light-PEFT {_share(lean.prune.heads)}, {_share(lean.prune.neurons)}")
    if lean.tokens is not None:
        keep = lean.tokens.keep
        parts.append(f"TokenTune {f'{keep:.0%}'.replace('%', ' %') if isinstance(keep, float) else keep}")
    if is_checkpointed(recipe):
        parts.append("checkpointing")
    return " + ".join(parts)


def _share(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
