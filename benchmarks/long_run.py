"""One long run: are memory and time a step flat, and what it leaves behind well-formed?

    OMP_NUM_THREADS=1 python benchmarks/long_run.py [--steps 20000] [--out FILE]

A tiny random BERT, `lean` (LaMDA, pruned after 100 steps, half of the tokens), a checkpoint every 1,000
steps and an evaluation every epoch. From outside, the process's resident memory is read every half second,
with the step that the log has reached. Flat means: from the first tenth of the run (the very first part, in
which caches fill, left out) to the last, resident memory grows by less than 16 MiB (what the log of so many
steps may take) and the median step by less than a tenth. Writes benchmarks/results/long_run.json; takes
six minutes on an idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from leantune.run.callbacks import read_log
from leantune.run.checkpoints import list_checkpoints, whats_wrong
from leantune.run.facts import versions
from leantune.run.folder import RunFolder

RESULTS = Path(__file__).parent / "results" / "long_run.json"
MIB = 1 << 20
WORDS = ["card", "cash", "pin", *(f"w{number}" for number in range(29))]
LABELS = {"card": "lost", "cash": "missing", "pin": "blocked"}
EVERY = 1000
PARTS = 20


def make_base(folder: Path) -> None:
    """Two layers of width 16, and a tokenizer of whole words."""
    torch.manual_seed(0)
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS]
    inner = Tokenizer(
        models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(names), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def make_rows(folder: Path) -> None:
    """Texts with one of three words that tell; every tenth label is wrong, so that the loss stays."""
    draw = random.Random(0)
    folder.mkdir()
    for split, count in (("train", 4000), ("test", 100)):
        rows = []
        for _ in range(count):
            tells = draw.choice(list(LABELS))
            words = [tells, *draw.choices(WORDS[3:], k=draw.randint(2, 12))]
            draw.shuffle(words)
            label = LABELS[tells] if draw.random() < 0.9 else draw.choice(list(LABELS.values()))
            rows.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def make_recipe(place: Path, steps: int) -> Path:
    """`lean`, with checkpoints."""
    recipe = {
        "model": {"path": str(place / "base"), "task": "classification"},
        "data": {"path": str(place / "data"), "validation_fraction": 0.05},
        "lean": {
            "adapter": {"type": "lamda", "r": 4},
            "prune": {"heads": "1/2", "neurons": "1/4", "estimate_steps": 100},
            "tokens": {"keep": 0.5},
        },
        "train": {
            "steps": steps, "batch_size": 8, "learning_rate": 1e-3, "eval_strategy": "epoch",
            "save_strategy": "steps", "save_steps": EVERY, "save_total_limit": steps,
        },
        "output": str(place / "run"),
    }  # fmt: skip
    file = place / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def watch(command: list[str], log: Path, said: Path) -> list[tuple[float, int, int]]:
    """Run it; (seconds since the start, bytes of the log, resident bytes), twice a second.

    Raises:
        SystemExit: The run failed; with what it said.
    """
    seen = []
    began = time.monotonic()
    with said.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            written = log.stat().st_size if log.is_file() else 0
            seen.append((time.monotonic() - began, written, resident(process.pid)))
            time.sleep(0.5)
    if process.returncode != 0:
        raise SystemExit(f"the run failed:\n{said.read_text(encoding='utf-8')[-2000:]}")
    return seen


def resident(pid: int) -> int:
    """VmRSS of a process now; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith("VmRSS:")), 0)


def by_part(seen: list[tuple[float, int, int]], log: Path, steps: int) -> list[dict[str, Any]]:
    """Per twentieth of the run: resident memory, wall seconds and the median step."""
    ends: dict[int, int] = {}  # step → bytes of the log up to its line
    size = 0
    for line in log.read_bytes().splitlines(keepends=True):
        size += len(line)
        content = json.loads(line)
        if content.get("stage") is None and "evaluation" not in content:
            ends[content["step"]] = size
    lines = {row["step"]: row["step_seconds"] for row in read_log(log) if "evaluation" not in row}
    parts = []
    for number in range(PARTS):
        first, last = number * steps // PARTS + 1, (number + 1) * steps // PARTS
        within = [row for row in seen if ends[first] <= row[1] <= ends[last]]
        parts.append({
            "steps": [first, last],
            "resident_bytes": int(statistics.median(row[2] for row in within)),
            "wall_seconds": within[-1][0] - within[0][0],
            "step_seconds_median": statistics.median(lines[step] for step in range(first, last + 1)),
        })  # fmt: skip
    return parts


def well_formed(folder: RunFolder, steps: int) -> dict[str, Any]:
    """What the run left: every step once and in order, every checkpoint whole."""
    rows = read_log(folder.log_file)
    trained = [row["step"] for row in rows if "evaluation" not in row]
    found = list_checkpoints(folder.checkpoints)
    return {
        "log_lines": len(rows),
        "every_step_once": trained == list(range(1, steps + 1)),
        "losses_finite": all(abs(row["loss"]) < float("inf") for row in rows),
        "checkpoints": len(found),
        "checkpoints_broken": [name.name for name in found if whats_wrong(name) is not None],
        "checkpoint_bytes": [sum(f.stat().st_size for f in name.rglob("*") if f.is_file()) for name in found],
        "report_bytes": folder.report_file.stat().st_size,
    }


def main() -> None:
    """Run, look, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_base(place / "base")
        make_rows(place / "data")
        recipe = make_recipe(place, arguments.steps)
        folder = RunFolder(place / "run")
        command = [sys.executable, "-m", "leantune.cli", "train", str(recipe)]
        with Console(stderr=True).status(f"training for {arguments.steps:,} steps"):
            seen = watch(command, folder.log_file, place / "said.txt")
        parts = by_part(seen, folder.log_file, arguments.steps)
        left = well_formed(folder, arguments.steps)
    tenth = PARTS // 10
    first, last = parts[1 : 1 + tenth], parts[-tenth:]  # the very first part still fills caches
    growth = last[-1]["resident_bytes"] - first[0]["resident_bytes"]
    slower = statistics.median(part["step_seconds_median"] for part in last) / statistics.median(
        part["step_seconds_median"] for part in first
    )
    result = {
        "command": "python benchmarks/long_run.py", "steps": arguments.steps, "versions": versions(),
        "load_average": [load, os.getloadavg()], "resident_growth_bytes": growth, "step_ratio": slower,
        "left": left, "parts": parts,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"resident memory grew by {growth / MIB:.1f} MiB, the median step is {slower:.2f} of the first's")
    whole = left["every_step_once"] and left["losses_finite"] and not left["checkpoints_broken"]
    print(f"log and {left['checkpoints']} checkpoints: {'well-formed' if whole else 'NOT well-formed'}")
    if growth > 16 * MIB or slower > 1.1 or not whole:
        raise SystemExit("not flat")


if __name__ == "__main__":
    main()
