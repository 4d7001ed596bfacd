"""The measured tables of TokenTune's card, made from benchmarks/results/*.json (scripts/readme_tables.py)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Data set → what is kept of it, as its grid `tokentune-NAME` says.
SETS = {
    "trec": "30 %",
    "sst2": "30 %",
    "mrpc": "30 %",
    "ag_news": "30 %",
    "20newsgroups": "16 of 256",
}


def sweep() -> str:
    """Counts per task, and the lists."""
    data = json.loads((RESULTS / "tokentune_sweep.json").read_text())
    kinds = ("exact", "refused", "wrong", "not built")
    lines = ["| architectures | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    total = dict.fromkeys(kinds, 0)
    for task, counts in data["counts"].items():
        lines.append(f"| {task} | " + " | ".join(str(counts.get(kind, 0)) for kind in kinds) + " |")
        total = {kind: total[kind] + counts.get(kind, 0) for kind in kinds}
    lines.append("| all | " + " | ".join(f"**{total[kind]}**" for kind in kinds) + " |")
    lines += [
        "",
        f"transformers {data['versions']['transformers']}; reasons in `benchmarks/results/`.",
    ]
    for kind in ("exact", "refused"):
        names = sorted(
            {name for rows in data["rows"].values() for name, (what, _) in rows.items() if what == kind}
        )
        lines += ["", f"<details><summary>{kind}: {len(names)}</summary>", "", ", ".join(names), "</details>"]
    return "\n".join(lines) + "\n"


def steps() -> str:
    """Memory and time per setting and variant."""
    data = json.loads((RESULTS / "tokentune_steps.json").read_text())
    lines = ["| setting | variant | MiB kept | ratio | step, CPU s | ratio |", "|---|---|---|---|---|---|"]
    for name, rows in data["results"].items():
        for label, row in rows.items():
            lines.append(
                f"| {name} | {label} | {row['bytes'] / 2**20:.1f} | {row['bytes_ratio']:.3f} "
                f"| {row['cpu_s']:.2f} | {row['cpu_s_ratio']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def accuracy() -> str:
    """Chosen tokens against all of them on real data: paired differences over seeds."""
    lines = [
        "| data, kept | method | seeds | all tokens: validation, test | by attention | by chance | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    means: dict[str, list[list[float]]] = {"full": [], "lora": []}
    for name, kept in SETS.items():
        if not (RESULTS / f"tokentune-{name}.json").exists():
            continue
        rows = json.loads((RESULTS / f"tokentune-{name}.json").read_text())["rows"]
        runs = {(row["variant"], row["seed"]): row["metrics"] for row in rows if "metrics" in row}
        for method, found in means.items():
            chosen = f"{method} keep {kept}"
            differences = _differences(runs, method, chosen)
            if not differences[0]:
                continue
            by_chance = _differences(runs, method, f"{chosen} random")
            found.append([statistics.mean(values) for values in differences])
            every = [metrics for (variant, _), metrics in runs.items() if variant == method]
            less = next(metrics for (variant, _), metrics in runs.items() if variant == chosen)
            kept_bytes = [metrics["memory"]["saved_activation_bytes"] for metrics in (less, every[0])]
            cells = [
                f"{name}, {kept}",
                METHODS[method],
                str(len(differences[0])),
                ", ".join(_spread([_accuracy(metrics, split) for metrics in every]) for split in SPLITS),
                ", ".join(_spread(values, sign="+") for values in differences),
                ", ".join(_spread(values, sign="+") for values in by_chance) if by_chance[0] else "",
                f"{kept_bytes[0] / kept_bytes[1]:.2f}×",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    for method, found in means.items():
        average = ", ".join(f"**{statistics.mean(values):+.1f}**" for values in zip(*found, strict=True))
        lines.append(f"| mean | {METHODS[method]} | | | {average} | | |")
    return "\n".join(lines) + "\n"


SPLITS = ("validation", "test")
METHODS = {"full": "full fine-tuning", "lora": "LoRA r 8"}


def _accuracy(metrics: dict[str, Any], split: str) -> float:
    return 100 * metrics["evaluation"][split]["accuracy"]


def _differences(runs: dict[tuple[str, int], Any], method: str, other: str) -> list[list[float]]:
    """Accuracy of `other` less that of `method`, of each seed that has both: validation, test."""
    seeds = [seed for variant, seed in runs if variant == other and (method, seed) in runs]
    return [
        [_accuracy(runs[other, seed], split) - _accuracy(runs[method, seed], split) for seed in seeds]
        for split in SPLITS
    ]


def _spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"
