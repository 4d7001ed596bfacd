"""Measure a suite: the papers' figures and the peers, side by side.

    python benchmarks/run.py SUITE [--device cuda|cpu] [--budget-minutes N] [--out DIR]

SUITE: lamda-memory, light-peft-speed, tokentune-memory, lean, accuracy, or all (the first four, sharing the
budget). Writes DIR/SUITE-DEVICE.json after every case; the same command again goes on with what is missing.
`python benchmarks/tables.py` makes the tables of it. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Notes of torch's profiler are not for the terminal; both are read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402
import transformers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from benchmarks.suites.accuracy import run_accuracy  # noqa: E402
from benchmarks.suites.cases import ACCURACY, SUITES  # noqa: E402
from benchmarks.suites.engine import ROUNDS, How, run_suite  # noqa: E402
from benchmarks.suites.record import Results  # noqa: E402
from benchmarks.suites.shapes import SCALES  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "suites"
ALL = "all"
NAMES = (*SUITES, ACCURACY, ALL)
DEVICES = ("cuda", "cpu")


class Parser(argparse.ArgumentParser):
    """argparse, with one line instead of a page when an argument is wrong."""

    def error(self, message: str) -> NoReturn:
        """Say it and leave with exit code 2."""
        self.exit(2, f"{message}\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; exits with code 2 and one line where it is wrong."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("suite", metavar="SUITE", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--budget-minutes", type=float, help="begin nothing new after so long")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/suites)")
    parser.add_argument("--scale", help="full (default on cuda), small (default on cpu), tiny (for tests)")
    parser.add_argument(
        "--rounds", type=int, help="times each method is timed (default: 3 on cpu, 2 on cuda)"
    )
    parser.add_argument("--memory-gib", type=float, help="more, by forecast, is a row `out of memory`")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--only", help="accuracy: data sets and methods whose name contains this")
    asked = parser.parse_args(arguments)
    asked.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    asked.scale = asked.scale or ("full" if asked.device == "cuda" else "small")
    mistake = _mistake(asked)
    if mistake:
        parser.error(mistake)
    asked.rounds = asked.rounds or ROUNDS[asked.device]
    asked.out = asked.out or RESULTS
    return asked


def _mistake(asked: argparse.Namespace) -> str | None:
    """What is wrong with the command line, in one line."""
    for name, value, accepted in (
        ("SUITE", asked.suite, NAMES), ("--device", asked.device, DEVICES), ("--scale", asked.scale, SCALES),
    ):  # fmt: skip
        if value not in accepted:
            return f"{name} = {value!r}: accepted are {', '.join(accepted)}"
    if asked.device == "cuda" and not torch.cuda.is_available():
        return f"--device = 'cuda': torch {torch.__version__} sees no CUDA device here; accepted is cpu"
    for name in ("budget_minutes", "rounds", "memory_gib", "threads"):
        value = getattr(asked, name)
        if value is not None and not value > 0:
            return f"--{name.replace('_', '-')} = {value}: must be above 0"
    if asked.scale == "tiny" and asked.out is None:
        return "--scale = 'tiny' is for tests and no result: name a folder with --out"
    if asked.only is not None and asked.suite != ACCURACY:
        return f"--only = {asked.only!r}: goes with the suite accuracy alone"
    return None


def main() -> int:
    """Measure; exit code 0 when all is there or the budget is used up, 2 for wrong arguments."""
    asked = parse()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(asked.threads)
    console = Console(stderr=True)
    end = time.monotonic() + (asked.budget_minutes * 60 if asked.budget_minutes else float("inf"))
    if asked.suite == ACCURACY:
        done = run_accuracy(asked.out / "accuracy.json", end, asked.only, console)
    else:
        done = _suites(asked, end, console)
    console.print("done" if done else "stopped at the budget: the same command again goes on", style="bold")
    return 0


def _suites(asked: argparse.Namespace, end: float, console: Console) -> bool:
    """One suite, or all, each with its share of what is left of the time."""
    names = list(SUITES) if asked.suite == ALL else [asked.suite]
    memory = round(asked.memory_gib * 2**30) if asked.memory_gib else None
    results = {name: _results(name, asked) for name in names}
    complete, columns = True, (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for number, name in enumerate(names):
            weight = SUITES[name].weight / sum(SUITES[each].weight for each in names[number:])
            now = time.monotonic()
            how = How(asked.device, asked.scale, now + (end - now) * weight, asked.rounds, memory)
            complete = run_suite(name, how, results[name], progress) and complete
    return complete


def _results(name: str, asked: argparse.Namespace) -> Any:
    try:
        return Results(asked.out / f"{name}-{asked.device}.json", name, asked.device, asked.scale)
    except ValueError as error:
        Parser().error(str(error))


if __name__ == "__main__":
    sys.exit(main())
