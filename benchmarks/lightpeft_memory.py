"""Loading a pruned model, and switching between tasks over one base: what memory it takes.

    python benchmarks/lightpeft_memory.py RUN RUN [--switches 100]

1. A model of RoBERTa-large's shape with random weights in a temporary folder; a new process loads it whole,
   another one pruned (heads and neurons 1/3): high-water marks above an empty process.
2. `TaskSwitcher` over the runs given (pruned or not, one base): each switch's logits against `leantune.load`,
   bit for bit, and resident memory after every tenth.

Writes benchmarks/results/lightpeft_memory.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import leantune
from leantune.anatomy import find_groups
from leantune.lightpeft import LightPeftConfig, make_plan

RESULTS = Path(__file__).parent / "results" / "lightpeft_memory.json"
QUIET_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "OMP_NUM_THREADS": "1",
}
LOAD = """
import re, sys, transformers, torch
from transformers import AutoConfig, AutoModel
from leantune.lightpeft import PruningPlan, Weights, load_pruned
transformers.logging.set_verbosity_error()
folder, how = sys.argv[1:]
config = AutoConfig.from_pretrained(folder)
with torch.device("meta"):
    AutoModel.from_config(config)  # what building costs is no part of the difference
def high():
    # not getrusage: its mark is inherited from the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = high()
if how == "whole":
    model = AutoModel.from_pretrained(folder)
else:
    plan = PruningPlan.load(folder + "/plan.json")
    model = load_pruned(AutoModel, config, plan, Weights.from_files(folder), folder)
total = sum(p.sum().item() for p in model.parameters())  # every page touched
print(high() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def loading() -> dict[str, Any]:
    """Peak memory of loading whole and pruned."""
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.RobertaConfig(
            vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
            intermediate_size=4096,
        )  # fmt: skip
        model = transformers.RobertaModel(config)
        model.save_pretrained(folder)
        groups = find_groups(model)
        scores = {group.name: torch.rand(group.count) for group in groups}
        make_plan(model, LightPeftConfig(), scores, groups).save(Path(folder) / "plan.json")
        del model
        rows = {}
        for how in ("whole", "pruned"):
            command = [sys.executable, "-c", LOAD, folder, how]
            out = subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, **QUIET_MALLOC}
            ).stdout
            peak, weights = map(int, out.split())
            rows[how] = {"peak_bytes": peak, "weight_bytes": weights}
            print(
                f"loading {how}: peak {peak / 2**20:.0f} MiB, weights {weights / 2**20:.0f} MiB", flush=True
            )
    return rows


def resident() -> int:
    """Bytes of this process in memory now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def switching(runs: list[str], switches: int) -> dict[str, Any]:
    """Logits against loading each task alone, memory and time."""
    text = "Where is my card?"
    expected = {}
    for run in runs:
        model, tokenizer = leantune.load(run)
        expected[run] = model(**tokenizer(text, return_tensors="pt")).logits
    del model
    tasks = leantune.TaskSwitcher(runs)
    equal, memory, seconds = 0, [], []
    for number in range(switches):
        run = runs[number % len(runs)]
        start = time.perf_counter()
        model = tasks.switch(run)
        seconds.append(time.perf_counter() - start)
        logits = model(**tasks.tokenizer(run)(text, return_tensors="pt")).logits
        equal += torch.equal(logits, expected[run])
        del model
        if number % 10 == 9:
            memory.append(resident())
    seconds.sort()
    first, last = (round(value / 2**20) for value in (memory[0], memory[-1]))
    print(f"{equal} of {switches} bit-equal; {first} MiB after 10 switches, {last} MiB after {switches}")
    return {
        "switches": switches,
        "bit_equal": equal,
        "resident_bytes": memory,
        "seconds_median": seconds[switches // 2],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--switches", type=int, default=100)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    result = {
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
        "switching": switching(arguments.runs, arguments.switches),
        "loading": loading(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
