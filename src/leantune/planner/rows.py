"""The rows of a plan: the recipe itself and what might stand in its place, as changes to the recipe.

A row's name is a method's, as `leantune compare` knows them, with what is varied beside it: `tokentune 10 %`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leantune.comparison.methods import changes as method_changes
from leantune.comparison.methods import parse_methods
from leantune.planner.setting import is_checkpointed
from leantune.recipes import Recipe
from leantune.recipes.schema import USUAL_LEARNING_RATE

Changes = dict[str, Any]
SHARES = (0.5, 0.25, 0.1)
RATIOS = ("1/3", "1/2")
CHECKPOINTING = "train.gradient_checkpointing"
# (method, what is varied in it); a checkpointed variant is left out where the recipe has checkpointing.
DEFAULT: tuple[tuple[str, Changes], ...] = (
    ("full", {}),
    ("full+ckpt", {}),
    ("lora", {}),
    ("lora+ckpt", {}),
    ("qlora", {}),
    ("qlora+ckpt", {}),
    ("lamda", {}),
    ("lamda+ckpt", {}),
    *(("tokentune", {"tokens": {"keep": share}}) for share in SHARES),
    *(("light-peft", {"prune": {"heads": ratio, "neurons": ratio}}) for ratio in RATIOS),
    ("lean", {}),
)


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


def alternatives(recipe: Recipe, methods: Sequence[str] | None = None) -> list[Row]:
    """What else could be done with the same model and data; without the recipe itself.

    Args:
        recipe: Whose own settings hold where they are of the same kind.
        methods: Names as of `leantune compare`; None: a usual choice.

    Raises:
        UserError: A name is unknown.
    """
    if methods is None:
        wanted = [(n, c) for n, c in DEFAULT if not (n.endswith("+ckpt") and is_checkpointed(recipe))]
    else:
        if methods:
            parse_methods(methods)
        wanted = [(name, {}) for name in methods if name != "recipe"]
    rows = [_row(recipe, name, varied) for name, varied in wanted]
    return [row for row in rows if not same(row.recipe, recipe)]


def _row(recipe: Recipe, name: str, varied: Changes) -> Row:
    lean, train = method_changes(name, recipe)
    for key, settings in varied.items():
        lean[key] = (lean.get(key) or {}) | settings
    changes: Changes = {f"lean.{key}": lean.get(key) for key in ("adapter", "prune", "tokens", "quantize")}
    changes |= {f"train.{key}": value for key, value in train.items()}
    return changed(recipe, changes, name + "".join(f" {_label(settings)}" for settings in varied.values()))


def _label(settings: Changes) -> str:
    if "keep" in settings:
        return _percent(settings["keep"])
    return str(settings["heads"])


def _percent(keep: float) -> str:
    return f"{100 * keep:g} %" if isinstance(keep, float) else f"{keep} tokens"


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


def same(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes train in the same way."""
    return one.lean == other.lean and is_checkpointed(one) == is_checkpointed(other)


def describe(recipe: Recipe) -> str:
    """The recipe's method, as `leantune compare` would name it, with what it keeps."""
    parts = recipe.method.split("+")
    if recipe.lean.tokens is not None:
        parts[parts.index("tokentune")] += f" {_percent(recipe.lean.tokens.keep)}"
    if is_checkpointed(recipe):
        parts.append("ckpt")
    return "+".join(parts)
