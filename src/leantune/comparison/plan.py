"""Which runs a comparison is made of: a recipe each, with its own folder, at one budget of steps for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leantune.comparison.methods import changes
from leantune.comparison.rates import Rate, rate_of
from leantune.errors import UserError
from leantune.recipes import Recipe
from leantune.recipes.loading import validate
from leantune.run.folder import RunFolder

USUAL_ESTIMATION = 100  # steps; no more than a quarter of the budget


@dataclass(frozen=True)
class Method:
    """A method as this comparison runs it.

    Attributes:
        name: As typed.
        settings: The whole of `lean`, and the changed keys of `train`.
        rate: Learning rate and where it comes from.
        estimation_steps: Optimizer steps of a pruned run's first stage, else 0.
        training_steps: Of the second or only stage; both together are the budget.
    """

    name: str
    settings: dict[str, Any]
    rate: Rate
    estimation_steps: int
    training_steps: int


@dataclass(frozen=True)
class Cell:
    """One run: a method at a seed."""

    method: Method
    seed: int
    recipe: Recipe
    folder: RunFolder
    recipe_file: Path

    @property
    def name(self) -> str:
        """As its folder is called."""
        return self.folder.path.name


def plan_methods(
    recipe: Recipe, names: Sequence[str], rates: Mapping[str, float], budget: int
) -> list[Method]:
    """Methods with their settings, rates and steps.

    Args:
        recipe: What is compared.
        names: Checked by `parse_methods`.
        rates: Checked by `check_rates`.
        budget: Optimizer steps of each run, estimation included.

    Raises:
        UserError: A method's settings are not accepted, leave no step for the training itself, or are
            another's as well.
    """
    methods = [_method(name, recipe, rates, budget) for name in names]
    for number, one in enumerate(methods):
        for other in methods[:number]:
            if (one.settings, one.rate.value) == (other.settings, other.rate.value):
                raise UserError(f"methods: with this recipe {other.name!r} and {one.name!r} are the same run")
    return methods


def _method(name: str, recipe: Recipe, rates: Mapping[str, float], budget: int) -> Method:
    lean, train = changes(name, recipe)
    estimation = 0
    if lean.get("prune") is not None:
        estimation = _estimation(lean["prune"].get("estimate_steps"), budget)
        lean["prune"] = {**lean["prune"], "estimate_steps": estimation}
    if estimation >= budget:
        raise UserError(
            f"methods: {name!r}: lean.prune.estimate_steps = {estimation} leaves none of {budget} steps; "
            f"lower it or raise train.steps"
        )
    data = {**recipe.to_dict(), "lean": lean}
    whole = validate(data, f"methods: {name!r}").to_dict()["lean"]
    rate = rate_of(name, whole["adapter"]["type"], recipe, rates)
    return Method(name, {"lean": whole, "train": train}, rate, estimation, budget - estimation)


def _estimation(wanted: int | float | None, budget: int) -> int:
    """Steps of the first stage within the budget; a share is of the second stage, as in any run."""
    if wanted is None:
        return max(2, min(USUAL_ESTIMATION, budget // 4))
    if isinstance(wanted, int):
        return wanted
    return max(2, round(budget * wanted / (1 + wanted)))


def plan_cells(recipe: Recipe, methods: Sequence[Method], seeds: Sequence[int], out: Path) -> list[Cell]:
    """Every run, seeds outside and methods inside: whenever it stops, methods can be compared.

    Raises:
        UserError: A run's folder holds something else.
    """
    cells = [_cell(recipe, method, seed, out) for seed in seeds for method in methods]
    for cell in cells:
        if cell.folder.path.exists():
            resume = cell.folder.recipe_file.is_file()
            cell.folder.check_free(cell.recipe, resume=resume, overwrite=False)
    return cells


def _cell(recipe: Recipe, method: Method, seed: int, out: Path) -> Cell:
    name = f"{method.name}-{seed}"
    data = recipe.to_dict()
    train = data["train"] | method.settings["train"]
    train |= {"learning_rate": method.rate.value, "seed": seed, "steps": method.training_steps}
    data |= {"lean": method.settings["lean"], "train": train, "output": str(out / name)}
    return Cell(method, seed, validate(data, name), RunFolder(out / name), out / "recipes" / f"{name}.yaml")
