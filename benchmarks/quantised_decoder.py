"""A real decoder on an NF4 base against the same on its bfloat16 base: losses, bytes, exports.

    python benchmarks/quantised_decoder.py [--seeds 0 1]

Gemma 3 270M (`pip install 'leantune[gemma,quant]'`; its terms apply) on instructions, which are not shipped
(`../shared/data/alpaca`). Within a seed all four runs see the same batches at equal steps, each adapter at
one rate. Runs are those of `leantune train` without its sample of written answers, which costs more than the
training here. Writes `benchmarks/results/quantised-decoder.json` after every run, and goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

import leantune
from leantune.recipes import Recipe
from leantune.run import pipeline
from leantune.run.callbacks import read_log

PLACE = Path("runs/quantised-decoder")
RESULT = Path(__file__).parent / "results" / "quantised-decoder.json"
RECIPE = Path(__file__).parent / "recipes" / "gemma-alpaca.yaml"
COMMON = ("train.batch_size=2", "train.steps=20", "data.max_length=64", "data.evaluation_rows=16")
LAMDA = ("lean.adapter={type: lamda, r: 32}", "train.learning_rate=2.0e-3")
NF4 = ("lean.quantize=nf4",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "lamda nf4": (*LAMDA, *NF4),
    "lamda": LAMDA,
    "lora nf4": NF4,
    "lora": (),
}


def main() -> None:
    """What is missing, in order; seeds outside."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    pipeline.sample_predictions = lambda *_: []
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    for seed in parser.parse_args().seeds:
        for variant, overrides in VARIANTS.items():
            if any((row["variant"], row["seed"]) == (variant, seed) for row in rows):
                continue
            rows.append(run(variant, seed, [*COMMON, *overrides]))
            RESULT.write_text(
                json.dumps({"command": "python benchmarks/quantised_decoder.py", "rows": rows}, indent=1)
                + "\n"
            )
            print(table(rows), flush=True)


def run(variant: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run; of the quantised ones both exports as well, which compare themselves with the run."""
    folder = PLACE / f"{variant.replace(' ', '_')}-{seed}"
    recipe = Recipe.load(RECIPE, *overrides, f"train.seed={seed}", f"output={folder}")
    done = leantune.train(recipe, overwrite=True, console=Console(quiet=True))
    losses = [
        line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line and "evaluation" not in line
    ]
    row = {
        "variant": variant,
        "seed": seed,
        "overrides": overrides,
        "losses": losses,
        "metrics": done.metrics,
    }
    if seed == 0 and recipe.lean.quantize is not None:
        for kind in ("lora", "merged"):
            out = PLACE / "export"
            shutil.rmtree(out, ignore_errors=True)
            row[f"export {kind} difference"] = leantune.export(folder, kind, out).max_abs_difference
        shutil.rmtree(out)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the last ten training losses, held-out loss, bytes."""
    lines = [
        "| run | seed | training loss, last 10 steps | held-out loss | weights | saved for backward | step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        metrics, last = row["metrics"], row["losses"][-10:]
        memory = metrics["memory"]
        cells = [row["variant"], str(row["seed"]), f"{sum(last) / len(last):.4f}"]
        cells += [f"{metrics['evaluation']['validation']['loss']:.4f}"]
        cells += [f"{memory[key] / 2**20:.0f} MiB" for key in ("weight_bytes", "saved_activation_bytes")]
        lines.append(f"| {' | '.join([*cells, f'''{metrics['speed']['step_seconds_median']:.1f} s'''])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
