"""Run one recipe in several variants and seeds, and write what came out as JSON and as a table.

    python benchmarks/grid.py benchmarks/grids/banking77.yaml [--only NAME ...] [--table]

A grid file names a recipe, overrides for all runs, seeds, and variants (name → overrides). Runs land
under `runs/grids/GRID/VARIANT-SEED`; finished ones are not run again, so an interrupted grid goes on.
The result, `benchmarks/results/GRID.json`, holds every run's metrics, with failures as rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run what is missing, then write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--only", nargs="*", help="variants to run (default: all)")
    parser.add_argument("--table", action="store_true", help="run nothing, only write the result again")
    arguments = parser.parse_args()
    grid = yaml.safe_load(arguments.grid.read_text())
    if not arguments.table:
        for name, seed, overrides, folder in cells(grid, arguments.grid.stem):
            if (not arguments.only or name in arguments.only) and not (folder / "metrics.json").exists():
                run(grid["recipe"], overrides, folder, f"{name}, seed {seed}")
    write(grid, arguments.grid.stem)


def cells(grid: dict[str, Any], name: str) -> Iterator[tuple[str, int, list[str], Path]]:
    """Every run of the grid: variant, seed, overrides, run folder."""
    for seed in grid["seeds"]:
        for variant, own in grid["variants"].items():
            folder = Path("runs/grids") / name / f"{variant.replace(' ', '_').replace('/', '_')}-{seed}"
            overrides = [*grid.get("overrides", []), *own, f"train.seed={seed}", f"output={folder}"]
            yield variant, seed, overrides, folder


def run(recipe: str, overrides: list[str], folder: Path, what: str) -> None:
    """One run in a process of its own: no run can disturb another."""
    print(what, flush=True)
    command = [sys.executable, "-m", "leantune.cli", "train", recipe, *overrides, "--json"]
    command.append("--resume" if (folder / "recipe.yaml").exists() else "--overwrite")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        folder.mkdir(parents=True, exist_ok=True)
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
        (folder / "failed.txt").write_text(last + "\n")
        print(f"  failed: {last}", flush=True)


def write(grid: dict[str, Any], name: str) -> None:
    """Collect the finished runs; one JSON file and a table in markdown."""
    rows = []
    for variant, seed, overrides, folder in cells(grid, name):
        row: dict[str, Any] = {"variant": variant, "seed": seed, "overrides": overrides}
        if (folder / "metrics.json").exists():
            rows.append(row | {"metrics": json.loads((folder / "metrics.json").read_text())})
        elif (folder / "failed.txt").exists():
            rows.append(row | {"failed": (folder / "failed.txt").read_text().strip()})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "command": f"python benchmarks/grid.py benchmarks/grids/{name}.yaml",
        "commit": commit,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    Console(soft_wrap=True, highlight=False).print(table(result), markup=False)


def table(result: dict[str, Any]) -> str:
    """Variants × figures: mean ± standard deviation over seeds."""
    lines = [
        "| variant | seeds | validation | test | trained at the end (head) | kept | step |",
        "|---|---|---|---|---|---|---|",
    ]
    variants: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        variants.setdefault(row["variant"], []).append(row)
    for variant, rows in variants.items():
        good = [row["metrics"] for row in rows if "metrics" in row]
        if not good:
            lines.append(f"| {variant} | 0 | failed: {rows[0]['failed']} | | | | |")
            continue
        counts = good[0]["parameters"]
        adapter = counts["trainable_end"] - counts["head"]
        kept = good[0]["memory"]["saved_activation_bytes"] / 2**20
        step = statistics.median(metrics["speed"]["step_seconds_median"] for metrics in good)
        cells = [variant, str(len(good)), spread(good, "validation"), spread(good, "test")]
        cells += [f"{adapter:,} (+{counts['head']:,})", f"{kept:.1f} MiB", f"{step * 1000:.0f} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(metrics: list[dict[str, Any]], split: str) -> str:
    """Mean ± standard deviation of a split's main metric, in points."""
    main_metrics = ("accuracy", "pearson", "loss")
    found = [entry["evaluation"][split] for entry in metrics if split in entry["evaluation"]]
    name = next((name for name in main_metrics if found and name in found[0]), None)
    if name is None:
        return "–"
    scale = 1 if name == "loss" else 100
    values = [entry[name] * scale for entry in found]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
