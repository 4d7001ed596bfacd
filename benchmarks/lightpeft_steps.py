"""Time and memory of a model pruned by Light-PEFT, against LoRA on the whole base.

    python benchmarks/lightpeft_steps.py [--layers 24] [--batch 32] [--repeats 3] [--threads 2]

RoBERTa-large's shape with random weights, sequences of 128 tokens, LoRA r 8 on all linear layers; plans are
drawn at random, heads and neurons evenly over the layers, 75 % of the adapter's modules and 50 % of the ranks
gone. Writes benchmarks/results/lightpeft_steps.json: medians over interleaved steps (one of each variant in
turn) in CPU seconds of the process, which a busy machine disturbs less than wall time (both are in the file),
bytes kept for backward, bytes of weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from leantune.lightpeft import LightPeftConfig, attach_masks, prune, random_plan
from leantune.lightpeft.estimation import estimation_of
from leantune.measure import saved_activation_bytes

RESULTS = Path(__file__).parent / "results" / "lightpeft_steps.json"
LENGTH = 128
RATIOS = ("1/3", 0.4, 0.5)
QUARTER = "LoRA, whole base (quarter)"


def roberta_large(layers: int) -> nn.Module:
    """Hidden 1,024, 16 heads, 4,096 neurons; dropout 0; LoRA r 8."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    model = transformers.RobertaForSequenceClassification(config)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    )


def pruned(layers: int, share: float | str) -> nn.Module:
    """The same, pruned."""
    model = roberta_large(layers)
    config = LightPeftConfig(heads=share, neurons=share, neurons_scope="layer", modules=0.75, ranks=0.5)
    return prune(model, random_plan(model, config, seed=0))


def estimating(layers: int) -> nn.Module:
    """The whole model in the first stage."""
    model = roberta_large(layers)
    attach_masks(model, LightPeftConfig(modules=0.75, ranks=0.5))
    return model


class Variant:
    """A way to train, and what was measured of it. The model is made anew for each step: five do not fit."""

    def __init__(self, make: Callable[[], nn.Module], batch: dict[str, Any]) -> None:
        self.make, self.batch = make, batch
        self.train: list[tuple[float, float]] = []
        self.inference: list[tuple[float, float]] = []
        self.facts: dict[str, Any] = {}

    def run(self) -> None:
        """A training step and a forward pass."""
        model = self.make()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.0)
        train_step(model, optimizer, {name: value[:2] for name, value in self.batch.items()})  # warm up
        start = clocks()
        train_step(model, optimizer, self.batch)
        self.train.append(since(start))
        model.eval()
        start = clocks()
        with torch.no_grad():
            model(**self.batch)
        self.inference.append(since(start))
        if not self.facts:
            kept = saved_activation_bytes(model.train(), {k: v[:2] for k, v in self.batch.items()})
            self.facts = {
                "saved_activation_bytes_of_2_rows": kept,
                "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
                "trained_parameters": sum(p.numel() for p in trained),
            }

    def row(self) -> dict[str, Any]:
        """One row of the result."""
        return {
            "train_seconds": statistics.median(cpu for cpu, _ in self.train),
            "train_cpu_and_wall": self.train,
            "inference_seconds": statistics.median(cpu for cpu, _ in self.inference),
            "inference_cpu_and_wall": self.inference,
            **self.facts,
        }


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    """Forward, backward and update."""
    estimation = estimation_of(model)
    model.train()
    if estimation is not None:
        estimation.begin_step(measure=True)
    model(**batch).loss.backward()
    if estimation is not None:
        estimation.step()
    optimizer.step()
    optimizer.zero_grad()


def clocks() -> tuple[float, float]:
    """CPU seconds of the process and wall time, now."""
    return time.process_time(), time.perf_counter()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Both, gone by."""
    cpu, wall = clocks()
    return cpu - start[0], wall - start[1]


def measure(layers: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Every variant, one step of each in turn."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50000, (batch_size, LENGTH), generator=draw)
    batch = {"input_ids": ids, "labels": torch.arange(batch_size) % 2}
    variants = {"LoRA, whole base": Variant(partial(roberta_large, layers), batch)}
    for share in RATIOS:
        variants[f"Light-PEFT {share} + {share}"] = Variant(partial(pruned, layers, share), batch)
    # Estimation keeps more: on a quarter of the batch, beside LoRA on the same.
    quarter = {name: value[: max(batch_size // 4, 1)] for name, value in batch.items()}
    variants[QUARTER] = Variant(partial(roberta_large, layers), quarter)
    variants["Light-PEFT, estimation step (quarter)"] = Variant(partial(estimating, layers), quarter)
    for number in range(1, repeats + 1):
        for name, variant in variants.items():
            variant.run()
            gc.collect()
            cpu = f"{variant.train[-1][0]:.1f} + {variant.inference[-1][0]:.1f} CPU seconds"
            print(f"{number}/{repeats} {name}: {cpu}", flush=True)
    return {name: variant.row() for name, variant in variants.items()}


def table(result: dict[str, Any]) -> str:
    """Ratios to LoRA on the whole base."""
    rows, first = [], next(iter(result["rows"].values()))
    for name, row in result["rows"].items():
        first = row if name == QUARTER else first
        step, inference = (first[k] / row[k] for k in ("train_seconds", "inference_seconds"))
        kept, weights = (row[k] / first[k] for k in ("saved_activation_bytes_of_2_rows", "weight_bytes"))
        trained = f"{row['trained_parameters']:,}"
        rows.append(f"| {name} | {step:.2f}× | {inference:.2f}× | {kept:.2f}× | {weights:.2f}× | {trained} |")
    head = (
        "| | training step, faster | inference, faster | kept for backward | weights | trained parameters |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "command": (
            f"python benchmarks/lightpeft_steps.py --layers {arguments.layers} --batch {arguments.batch} "
            f"--repeats {arguments.repeats} --threads {arguments.threads}"
        ),
        "machine": {"machine": platform.machine(), "threads": arguments.threads},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "rows": measure(arguments.layers, arguments.batch, arguments.repeats),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
