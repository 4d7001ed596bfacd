"""The methods that can be compared: what each name changes in a recipe, and how names combine with "+".

A method changes `lean` and `train` and nothing else, so data, model and schedule are the recipe's own. Where
the recipe has settings of its own for what a method needs (its LoRA's rank, its share of tokens), they hold.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from leantune.errors import UserError
from leantune.recipes import Recipe

LORA = {"type": "lora", "r": 8}
LAMDA = {"type": "lamda", "r": 32}
LAMDA_RANKS = {**LAMDA, "spectral_ranks": {"budget": 32}}
THIRDS = {"heads": "1/3", "neurons": "1/3"}
TOKENS = {"keep": 0.25}
# Where one position feeds the head, what it attends to says which tokens matter. The tokens of a language
# model have a loss each, and chance is fair to them.
ATTENDED = {"keep": 0.5, "strategy": "attention"}
POOLED = {"classification", "regression"}


@dataclass(frozen=True)
class Part:
    """One name: what it is, and what it sets under `lean` and `train`.

    Attributes:
        what: In words.
        lean: Its settings.
        train: Its settings.
        pooled: In `lean` as well, where one position of a text feeds the head.
    """

    what: str
    lean: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    pooled: dict[str, dict[str, Any]] = field(default_factory=dict)


# One row a name. Without an adapter among its parts a method trains LoRA.
PARTS: dict[str, Part] = {
    "full": Part("every weight is trained", {"adapter": {"type": "none"}}),
    "lora": Part("PEFT's LoRA", {"adapter": LORA}),
    "rslora": Part("LoRA scaled by 1/sqrt(r)", {"adapter": LORA | {"variant": "rslora"}}),
    "dora": Part("LoRA on directions, beside lengths", {"adapter": LORA | {"variant": "dora"}}),
    "adalora": Part("LoRA that gives up ranks on the way", {"adapter": LORA | {"variant": "adalora"}}),
    "vera": Part("vectors beside shared random matrices", {"adapter": LORA | {"variant": "vera", "r": 256}}),
    "lora-fa": Part("LoRA with A frozen", {"adapter": LORA | {"variant": "lora-fa"}}),
    "lamda": Part("adapter B·S·A, A and gradually B frozen", {"adapter": LAMDA}),
    "lamda++": Part("LaMDA, ranks by layer from the spectra", {"adapter": LAMDA_RANKS}),
    "bottleneck": Part("the serial Adapter", {"adapter": {"type": "bottleneck"}}),
    "ckpt": Part("gradient checkpointing", train={"gradient_checkpointing": True}),
    "tokentune": Part("back-propagates through some tokens", {"tokens": TOKENS}),
    "light-peft": Part("prunes base and adapter early", {"prune": {**THIRDS, "modules": 0.5, "ranks": 0.5}}),
    "lean": Part(
        "LaMDA, pruned base and chosen tokens",
        {"adapter": LAMDA, "prune": THIRDS, "tokens": TOKENS},
        pooled={"tokens": ATTENDED},
    ),
    "nf4": Part("base in 4 bits (NF4)", {"quantize": "nf4"}),
    "qlora": Part("LoRA on a base in 4 bits (NF4)", {"adapter": LORA, "quantize": "nf4"}),
    "recipe": Part("the recipe as it stands"),
}
DEFAULT_METHODS = ("full", "lora", "lamda", "tokentune", "light-peft", "lean")
# Adapters on the same layers as each other; a bottleneck sits behind blocks instead.
_ON_LAYERS = {"lora", "lamda"}


def parse_methods(names: str | Sequence[str]) -> list[str]:
    """Names as typed, each checked.

    Args:
        names: A list, or one text with commas between.

    Raises:
        UserError: A name is unknown, given twice, or joins what excludes each other; or there is none.
    """
    listed = names.split(",") if isinstance(names, str) else list(names)
    listed = [name.strip() for name in listed if name.strip()]
    if not listed:
        raise UserError(f"methods: none is named (accepted: {_accepted()})")
    for name in listed:
        _check(name)
        if listed.count(name) > 1:
            raise UserError(f"methods: {name!r} is named twice")
    return listed


def _check(name: str) -> None:
    parts = _parts(name)
    for part in parts:
        if part not in PARTS:
            near = difflib.get_close_matches(part, PARTS, n=1, cutoff=0.5)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"methods: {part!r} is unknown{guess} (accepted: {_accepted()})")
    homes: dict[str, str] = {}
    for part in parts:
        for key in [*PARTS[part].lean, *PARTS[part].train]:
            if key in homes:
                raise UserError(f"methods: {name!r}: {homes[key]} and {part} both set {key}")
            homes[key] = part
    if "recipe" in parts and any(PARTS[part].lean for part in parts):
        raise UserError(f"methods: {name!r}: recipe says all of lean itself")
    if "full" in parts and "nf4" in parts:
        raise UserError(f"methods: {name!r}: full trains the base itself, which packed weights do not allow")
    if "nf4" in parts and {"light-peft", "lean"} & set(parts):
        raise UserError(f"methods: {name!r}: packed weights cannot be pruned")
    if "full" in parts and "light-peft" in parts:
        raise UserError(
            f"methods: {name!r}: light-peft prunes base and adapter together, full has no adapter"
        )


def _parts(name: str) -> list[str]:
    """Names joined by "+"; a plus at the end of a name (lamda++) belongs to it."""
    return re.split(r"\+(?=[^+])", name)


def _accepted() -> str:
    return f"{', '.join(PARTS)}; joined by + where they go together, lamda+tokentune say"


def describe(name: str) -> str:
    """A method in words."""
    return " + ".join(PARTS[part].what for part in _parts(name))


def changes(name: str, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the method makes of a recipe.

    Args:
        name: Checked by `parse_methods`.
        recipe: Whose own settings hold where they are of the same kind.

    Returns:
        The whole of `lean`, and changes to `train`.
    """
    lean: dict[str, Any] = {}
    train: dict[str, Any] = {}
    own = recipe.to_dict()["lean"]
    for part in _parts(name):
        lean |= own if part == "recipe" else PARTS[part].lean
        lean |= PARTS[part].pooled if recipe.model.task in POOLED else {}
        train |= PARTS[part].train
    adapter = lean.get("adapter", LORA)
    lean["adapter"] = _adapter(adapter, own["adapter"])
    for key in ("prune", "tokens"):
        if lean.get(key) is not None and own[key] is not None:
            lean[key] = own[key]
    return lean, train


def _adapter(wanted: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The recipe's own adapter where it is of that type; else the table's, on the recipe's layers."""
    if wanted["type"] == own["type"]:
        if own["type"] == "lamda":
            return _ranked(wanted, own)
        return _variant(wanted, own) if own["type"] == "lora" else own
    if {wanted["type"], own["type"]} <= _ON_LAYERS:
        return wanted | {key: own[key] for key in ("target_modules", "exclude_modules")}
    return wanted


def _variant(wanted: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Another variant of LoRA at the recipe's own rank; VeRA's, of fixed matrices, is another."""
    variants = wanted.get("variant", "lora"), own["variant"]
    if variants[0] == variants[1]:
        return own
    return own | {"variant": variants[0], "r": wanted["r"] if "vera" in variants else own["r"]}


def _ranked(wanted: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """LaMDA and LaMDA++ differ in `spectral_ranks` alone: taken away, or put in at the recipe's own rank."""
    if wanted == own:
        return own
    if "spectral_ranks" not in wanted:
        return own | {"spectral_ranks": None}
    ranks = own["spectral_ranks"] or {"budget": own["r"]}
    return own | {"spectral_ranks": ranks, "rank_pattern": {}}
