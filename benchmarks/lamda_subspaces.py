"""How much of the task's gradient each start of LaMDA sees: MiniLM at the start of a run, held-out rows.

    python benchmarks/lamda_subspaces.py [--data ../shared/data/trec] [--label coarse_label]

A never moves, so at the first step only the part G A' of the gradient G = dL/dW reaches the adapter. For each
adapted layer: the energy of that part over the whole, |G A'|^2 / |G|^2, with A's rows made orthonormal. The
starts from data see 8 batches of 16 rows; G is that of 8 other batches, by plain autograd. `best possible` is
the leading r singular vectors of G itself.

Writes benchmarks/results/lamda_subspaces.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from torch import Tensor, nn

import leantune
from leantune.lamda.config import DATA_INITS, INITS
from leantune.lamda.model import lamda_layers
from leantune.recipes import Recipe
from leantune.run.inputs import Inputs, read_inputs
from leantune.run.models import load_base

RESULTS = Path(__file__).parent / "results" / "lamda_subspaces.json"
BATCHES, ROWS = 8, 16


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="../shared/data/trec")
    parser.add_argument("--label", default="coarse_label")
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = [f"data.path={arguments.data}", f"data.label={arguments.label}", "output=runs/unused"]
    recipe = Recipe.load("recipes/banking77.yaml", *data)
    inputs = read_inputs(recipe, Console(stderr=True))
    rows = []
    for seed in arguments.seeds:
        seen, held_out = batches(inputs, seed)
        whole = gradients(base(recipe, inputs, seed), held_out)
        for r in arguments.ranks:
            rows.append({"init": "best possible", "r": r, "seed": seed, **shares(whole, best(whole, r))})
            for init in INITS:
                started = time.process_time()
                A = projections(base(recipe, inputs, seed), init, r, seen)
                seconds = round(time.process_time() - started, 2)
                rows.append({"init": init, "r": r, "seed": seed, **shares(whole, A), "cpu_seconds": seconds})
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    result = {"command": "python benchmarks/lamda_subspaces.py", "versions": versions, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def batches(inputs: Inputs, seed: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Those that the starts from data see, and as many others."""
    train, collate = inputs.encoded["train"], inputs.task.collator(inputs.tokenizer)
    order = random.Random(seed).sample(range(len(train)), 2 * BATCHES * ROWS)
    made = [
        collate([dict(train[number]) for number in order[start : start + ROWS]])
        for start in range(0, len(order), ROWS)
    ]
    return made[:BATCHES], made[BATCHES:]


def base(recipe: Recipe, inputs: Inputs, seed: int) -> nn.Module:
    """The base model with the head that a run with this seed starts from."""
    torch.manual_seed(seed)
    return load_base(recipe.model, inputs.task.auto_class, inputs.config)


def gradients(model: nn.Module, held_out: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """dL/dW of every linear layer, by name."""
    model.eval()
    for batch in held_out:
        model(**batch).loss.backward()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer.weight.grad for name, layer in layers.items() if layer.weight.grad is not None}


def projections(model: nn.Module, init: str, r: int, seen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every layer's A, (r, d_in)."""
    config = leantune.LamdaConfig(r=r, target_modules="all-linear", task_type="SEQ_CLS", init=init)
    adapted = get_peft_model(model, config)
    if init in DATA_INITS:
        leantune.prepare_lamda(adapted, seen)
    layers = lamda_layers(adapted)
    return {
        name.removeprefix("base_model.model."): layer.lamda_A["default"] for name, layer in layers.items()
    }


def best(whole: dict[str, Tensor], r: int) -> dict[str, Tensor]:
    """The A that sees most of G."""
    return {
        name: torch.linalg.svd(G, full_matrices=False).Vh[:r] for name, G in whole.items() if min(G.shape) > r
    }


def shares(whole: dict[str, Tensor], projection: dict[str, Tensor]) -> dict[str, float]:
    """Share of the gradient's energy that A sees: mean, smallest and largest of the layers."""
    found = []
    for name, A in projection.items():
        Q = torch.linalg.qr(A.T)[0]  # (d_in, r)
        found.append(((whole[name] @ Q).square().sum() / whole[name].square().sum()).item())
    return {"mean": statistics.mean(found), "least": min(found), "most": max(found)}


def table(result: dict[str, Any]) -> str:
    """Inits × ranks: mean over layers ± standard deviation over seeds, in percent."""
    rows = result["rows"]
    ranks = sorted({row["r"] for row in rows})
    lines = [
        f"| start | {' | '.join(f'r = {r}' for r in ranks)} | CPU seconds |",
        "|---" * (len(ranks) + 2) + "|",
    ]
    for init in [*INITS, "best possible"]:
        cells = []
        for r in ranks:
            values = [100 * row["mean"] for row in rows if (row["init"], row["r"]) == (init, r)]
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{deviation}")
        seconds = [row["cpu_seconds"] for row in rows if row["init"] == init and "cpu_seconds" in row]
        cells.append(f"{statistics.median(seconds):.1f}" if seconds else "–")
        lines.append(f"| {init} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
