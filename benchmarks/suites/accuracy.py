"""Real models and data: every method on every data set, run by run through `leantune train`.

The grid is `benchmarks/grids/accuracy.yaml`. Runs land under `runs/grids/accuracy/`; finished ones are not
run again, and one that the budget cuts off saves a checkpoint and goes on next time.
"""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track

from benchmarks.suites.record import command_line, finish, record

ROOT = Path(__file__).resolve().parents[2]
GRID = ROOT / "benchmarks" / "grids" / "accuracy.yaml"
RUNS = Path("runs/grids/accuracy")
PATIENCE = 60  # seconds that a run is given to save itself


@dataclass(frozen=True)
class Cell:
    """One run: a method on a data set with a seed."""

    data: str
    method: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Its run folder."""
        name = f"{self.data}-{self.method}-{self.seed}"
        return RUNS / "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)

    @property
    def is_done(self) -> bool:
        """Whether it ended, one way or the other."""
        return (self.folder / "metrics.json").exists() or (self.folder / "failed.txt").exists()


def cells(grid: dict[str, Any]) -> Iterator[Cell]:
    """Every run, a whole table of one seed before the next seed."""
    for seed in grid["seeds"]:
        for data, about in grid["data"].items():
            kind = grid["kinds"][about["kind"]]
            for method, own in kind["methods"].items():
                overrides = [*kind.get("overrides", []), *about["overrides"], *own, f"train.seed={seed}"]
                yield Cell(data, method, seed, kind["recipe"], tuple(overrides))


def run_accuracy(file: Path, end: float, only: str | None, console: Console) -> bool:
    """Run what is missing until the time is up, then write the result.

    Args:
        file: JSON with a row for every finished run.
        end: `time.monotonic()` at which the run in progress is stopped.
        only: Cells whose data set or method contains this.
        console: For progress.

    Returns:
        Whether all is done.
    """
    grid = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    conditions = record("cpu" if not _has_cuda() else "cuda", command_line(), len(grid["seeds"]))
    wanted = [cell for cell in cells(grid) if only is None or only in cell.data or only in cell.method]
    prepare(grid)
    for cell in track([cell for cell in wanted if not cell.is_done], "accuracy", console=console):
        if time.monotonic() >= end:
            break
        console.print(f"{cell.data}: {cell.method}, seed {cell.seed}")
        run(cell, end)
        write(file, grid, conditions)
    write(file, grid, conditions)
    return all(cell.is_done for cell in wanted)


def run(cell: Cell, end: float) -> None:
    """One run in a process of its own; at the end of the time it is asked to save and stop."""
    words = ["train", cell.recipe, *cell.overrides, f"output={cell.folder}", "--json"]
    words.append("--resume" if (cell.folder / "recipe.yaml").exists() else "--overwrite")
    said = cell.folder.with_suffix(".log")
    said.parent.mkdir(parents=True, exist_ok=True)
    with said.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "leantune.cli", *words], stdout=subprocess.DEVNULL, stderr=log
        )
        try:
            code = process.wait(None if end == float("inf") else max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            stop(process)
            return
    if code:
        lines = said.read_text(encoding="utf-8").strip().splitlines()
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "failed.txt").write_text((lines[-1] if lines else f"exit {code}") + "\n")


def stop(process: subprocess.Popen[Any]) -> None:
    """SIGTERM, as `leantune train` saves then; what does not stop is ended."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def prepare(grid: dict[str, Any]) -> None:
    """Data sets whose rows have to be written as prompt and completion, once, under `runs/`."""
    for name, about in grid["data"].items():
        source = about.get("multiple_choice")
        if source is None:
            continue
        folder = RUNS.parent / "data" / name
        for file in sorted(Path(source).glob("*.jsonl.gz")):
            new = folder / file.name.removesuffix(".gz")
            if not new.exists():
                folder.mkdir(parents=True, exist_ok=True)
                with gzip.open(file, "rt", encoding="utf-8") as rows:
                    lines = [json.dumps(as_prompt(json.loads(row)), ensure_ascii=False) for row in rows]
                new.write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_prompt(row: dict[str, Any]) -> dict[str, str]:
    """ARC's columns → the question with lettered options, and the letter of the right one."""
    choices = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
    options = "\n".join(f"{letter}. {text}" for letter, text in choices)
    return {"prompt": f"{row['question']}\n{options}\nAnswer:", "completion": f" {row['answerKey']}"}


def write(file: Path, grid: dict[str, Any], conditions: dict[str, Any]) -> None:
    """Collect the finished runs."""
    rows = []
    for cell in cells(grid):
        row: dict[str, Any] = {"data": cell.data, "method": cell.method, "seed": cell.seed}
        row["overrides"] = list(cell.overrides)
        if (cell.folder / "metrics.json").exists():
            metrics = json.loads((cell.folder / "metrics.json").read_text(encoding="utf-8"))
            rows.append(row | {"metrics": metrics})
        elif (cell.folder / "failed.txt").exists():
            rows.append(row | {"failed": (cell.folder / "failed.txt").read_text().strip()})
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    result = {"suite": "accuracy", "record": finish(conditions), "rows": rows}
    new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    new.replace(file)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
