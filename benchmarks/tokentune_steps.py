"""Memory and time of a training step under TokenTune, against ordinary training and gradient checkpointing.

    OMP_NUM_THREADS=1 python benchmarks/tokentune_steps.py [--repeats 5]

Writes benchmarks/results/tokentune_steps.json. Memory is `saved_activation_bytes` (the same on every
machine); time is the median over interleaved steps (one of each variant in turn), in process CPU seconds,
which a busy machine disturbs less than wall time; both are in the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from leantune.anatomy import find_head
from leantune.measure import saved_activation_bytes
from leantune.tokentune import TokenTuneConfig, token_tune
from leantune.tokentune.attach import tuner_of

KEEPS = (0.5, 0.3, 0.2, 0.1)
RESULTS = Path(__file__).parent / "results" / "tokentune_steps.json"


def llama(kv_heads: int = 8) -> nn.Module:
    """8 layers × hidden 512, vocabulary 32,000."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    """BERT-base with 6 layers, dropout 0."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return transformers.BertForSequenceClassification(config)


def lora(model: nn.Module) -> nn.Module:
    """LoRA r 8 on all linears, dropout 0."""
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))


def causal_batch() -> dict[str, Any]:
    """2 sequences of 512 tokens, all supervised."""
    ids = torch.randint(0, 32000, (2, 512), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def class_batch() -> dict[str, Any]:
    """4 sequences of 512 tokens."""
    ids = torch.randint(1000, 30000, (4, 512), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 0, 1])}


SETTINGS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], bool]] = {
    "llama 8x512, full": (llama, causal_batch, False),
    "llama 8x512, full, checkpointing": (llama, causal_batch, True),
    "llama 8x512, LoRA": (lambda: lora(llama()), causal_batch, False),
    "llama 8x512, LoRA, checkpointing": (lambda: lora(llama()), causal_batch, True),
    "llama 8x512, 2 of 8 kv heads, full": (lambda: llama(2), causal_batch, False),
    "bert 6x768, full": (bert, class_batch, False),
}


class Variant:
    """One way to train: a model, its optimizer, and what was measured."""

    def __init__(
        self, model: nn.Module, batch: dict[str, Any], keep: float | None, checkpointing: bool
    ) -> None:
        self.model, self.batch, self.keep, self.checkpointing = model, batch, keep, checkpointing
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def step(self) -> None:
        """Forward, backward and update, timed."""
        self._set()
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    def bytes(self) -> int:
        """Kept for backward."""
        self._set()
        return saved_activation_bytes(self.model, self.batch)

    def _set(self) -> None:
        self.model.train()
        if self.checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
            if hasattr(self.model, "enable_input_require_grads"):
                self.model.enable_input_require_grads()
        else:
            self.model.activation_checkpointing_disable()
        head = find_head(self.model)
        if self.keep is None:
            token_tune(self.model, None)
        elif tuner_of(head) is None:
            token_tune(self.model, TokenTuneConfig(self.keep))
        else:  # attaching anew each time is slow
            tuner_of(head).config = TokenTuneConfig(self.keep)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """All variants of one setting on one model, interleaved."""
    build, make_batch, checkpointing = SETTINGS[name]
    model, batch = build(), make_batch()
    variants = {"ordinary": Variant(model, batch, None, checkpointing)}
    variants |= {f"keep {keep}": Variant(model, batch, keep, checkpointing) for keep in KEEPS}
    if name == "llama 8x512, LoRA":
        variants["gradient checkpointing"] = Variant(model, batch, None, True)
    rows = {label: {"bytes": variant.bytes()} for label, variant in variants.items()}
    for turn in range(repeats + 1):
        for variant in variants.values():
            variant.step()
            if turn == 0:  # warm-up
                variant.cpu.clear()
                variant.wall.clear()
    for label, variant in variants.items():
        row: dict[str, Any] = rows[label]
        row |= {"cpu_s": statistics.median(variant.cpu), "wall_s": statistics.median(variant.wall)}
        for what in ("bytes", "cpu_s", "wall_s"):
            row[f"{what}_ratio"] = round(row[what] / rows["ordinary"][what], 4)
    return rows


def main() -> None:
    """Measure everything and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="settings whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(arguments.out.read_text())["results"] if arguments.out.exists() else {}
    for name in SETTINGS:
        if arguments.only and arguments.only not in name:
            continue
        results[name] = measure(name, arguments.repeats)
        print(name)
        for label, row in results[name].items():
            print(
                f"  {label:24} {row['bytes'] / 2**20:8.1f} MiB {row['bytes_ratio']:6.3f}"
                f"   cpu {row['cpu_s']:6.3f} s {row['cpu_s_ratio']:6.3f}   wall {row['wall_s_ratio']:6.3f}",
                flush=True,
            )
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    conditions = {"versions": versions, "machine": platform.processor(), "threads": 1, "dtype": "float32"}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
