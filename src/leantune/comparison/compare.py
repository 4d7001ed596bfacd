"""Compare methods on one recipe: plan, run, time, judge, write."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from leantune.comparison import timing as clock
from leantune.comparison.methods import DEFAULT_METHODS, parse_methods
from leantune.comparison.plan import Cell, Method, plan_cells, plan_methods
from leantune.comparison.progress import RunsProgress
from leantune.comparison.rates import check_rates
from leantune.comparison.results import FILE, SCHEMA, collect, pick_baseline, read_comparison
from leantune.comparison.runs import Stopped, execute, finished, write_base
from leantune.errors import RunError, UserError
from leantune.recipes import Recipe
from leantune.report.comparison import write_comparison
from leantune.run.estimation import training_steps
from leantune.run.facts import hardware, versions
from leantune.run.folder import write_json
from leantune.run.inputs import Inputs, read_inputs
from leantune.run.stopping import Interrupted


@dataclass(frozen=True)
class Comparison:
    """A comparison that is done; some of its runs may have failed.

    Attributes:
        folder: With `compare.json`, `compare.html` and a run folder for each method and seed.
        result: What `compare.json` holds.
    """

    folder: Path
    result: dict[str, Any]

    @property
    def verdict(self) -> str:
        """Which method to take, in one paragraph."""
        return self.result["verdict"]


@dataclass
class _Work:
    """What one call of `compare` knows from the start."""

    out: Path
    recipe: Recipe
    methods: list[Method]
    seeds: list[int]
    cells: list[Cell]
    inputs: Inputs
    command: str = ""
    failures: dict[str, str] = field(default_factory=dict)

    def write(self, timing: Mapping[str, Any] | None) -> dict[str, Any]:
        """`compare.json` of what there is by now."""
        summary = timing["methods"] if timing else {}
        result = {
            "schema": SCHEMA,
            "complete": all(finished(cell) or cell.name in self.failures for cell in self.cells),
            "command": self.command,
            "recipe": self.recipe.to_dict(),
            "seeds": self.seeds,
            "budget_steps": self.methods[0].estimation_steps + self.methods[0].training_steps,
            **collect(self.cells, self.methods, self.failures, summary),
            "timing": None if timing is None else {k: v for k, v in timing.items() if k != "methods"},
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(self.out / FILE, result)
        return result


def compare(
    recipe: Recipe | str | Path,
    methods: str | Sequence[str] = DEFAULT_METHODS,
    seeds: int = 3,
    out: str | Path | None = None,
    *,
    lr: Mapping[str, float] | None = None,
    console: Console | None = None,
    command: str | None = None,
) -> Comparison:
    """Run every method at every seed on the recipe's model and data, and say what each costs and gives.

    All have the same budget of optimizer steps; a pruned run's estimation is part of it. Each run is an
    ordinary run folder and a process of its own. Runs that are finished are kept and ones that were
    interrupted go on, so the same call again continues; one that fails is a row of the result. In the end all
    methods' steps are timed turn by turn in this process.

    Args:
        recipe: From `Recipe.load`, or its file.
        methods: Names from `leantune.comparison.PARTS`, joined by "+" where they go together.
        seeds: How many, from the recipe's own on.
        out: The comparison's folder; default: the recipe's `output` with "-compare" behind.
        lr: Learning rates by method or adapter; the others are scaled to the recipe's own (`rates.rate_of`).
        console: Where progress is shown; default: standard error.
        command: What repeats the comparison, for the page; default: made from the arguments.

    Raises:
        UserError: Recipe, data, methods, rates or folder do not allow it; nothing was written then.
        RunError: Every run failed.
        Interrupted: SIGINT or SIGTERM came; the same call goes on.
    """
    console = console or Console(stderr=True)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise UserError(f"seeds = {seeds!r}: must be a whole number above 0")
    names, rates = parse_methods(methods), dict(lr or {})
    check_rates(rates, names)
    place = Path(out) if out is not None else Path(f"{recipe.output}-compare")
    before = read_comparison(place)
    work = _plan(place, recipe, names, rates, seeds, console)
    work.command = command or _command(work, rates)
    work.failures.update({run["folder"]: run["failed"] for run in before.get("runs", ()) if "failed" in run})
    write_base(place, recipe.to_dict())
    timing = _kept_timing(before, work)
    executed = _execute(work, timing, console)
    if executed or timing is None:
        timing = _time(work, console)
    result = work.write(timing)
    write_comparison(place)
    if not any(finished(cell) for cell in work.cells):
        raise RunError(f"every run failed, the first with: {next(iter(work.failures.values()))}")
    return Comparison(place, result)


def _plan(
    out: Path,
    recipe: Recipe,
    names: Sequence[str],
    rates: Mapping[str, float],
    seeds: int,
    console: Console,
) -> _Work:
    """What can go wrong with recipe, data and folder goes wrong here, before anything is written."""
    with console.status("reading data and model"):
        inputs = read_inputs(recipe, console)
    methods = plan_methods(recipe, names, rates, training_steps(recipe, len(inputs.encoded["train"])))
    numbers = [recipe.train.seed + number for number in range(seeds)]
    cells = plan_cells(recipe, methods, numbers, out)
    return _Work(out, recipe, methods, numbers, cells, inputs)


def _command(work: _Work, rates: Mapping[str, float]) -> str:
    words = ["leantune", "compare", str(work.out / "recipes" / "recipe.yaml")]
    words += ["--methods", ",".join(method.name for method in work.methods)]
    words += ["--seeds", str(len(work.seeds)), "--out", str(work.out)]
    for name, value in rates.items():
        words += ["--lr", f"{name}={value:g}"]
    return shlex.join(words)


def _execute(work: _Work, timing: Mapping[str, Any] | None, console: Console) -> int:
    """Run what is missing; `compare.json` is up to date after each run."""
    work.write(timing)
    try:
        with RunsProgress(console, len(work.cells)) as progress:
            return execute(work.cells, work.failures, progress, lambda: work.write(timing))
    except Stopped as stopped:
        work.write(timing)
        write_comparison(work.out)
        raise _interrupted(work, stopped.signal_number) from None


def _interrupted(work: _Work, signal_number: int) -> Interrupted:
    done = sum(finished(cell) for cell in work.cells)
    told = f"stopped with {done} of {len(work.cells)} runs done; go on with: {work.command}"
    return Interrupted(told, signal_number)


def _kept_timing(before: Mapping[str, Any], work: _Work) -> dict[str, Any] | None:
    """An earlier call's timing, if it is of these very methods on this machine."""
    timing = before.get("timing")
    entries = before.get("methods", {})
    if not timing or before["hardware"] != hardware():
        return None
    if list(entries) != [method.name for method in work.methods]:
        return None
    return {**timing, "methods": {name: e["timing"] for name, e in entries.items() if e["timing"]}}


def _time(work: _Work, console: Console) -> dict[str, Any] | None:
    """Time one finished run of each method, the first seed's that there is."""
    first: dict[str, Cell] = {}
    for cell in work.cells:
        if finished(cell):
            first.setdefault(cell.method.name, cell)
    if not first:
        return None
    try:
        with console.status(f"timing {len(first)} methods, turn by turn"):
            measured = clock.measure(list(first.values()), work.inputs)
    except KeyboardInterrupt:
        raise _interrupted(work, signal.SIGINT) from None
    summary = clock.summarize(measured, pick_baseline([method.name for method in work.methods]))
    return {**asdict(measured), "methods": summary}
