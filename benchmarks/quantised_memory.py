"""What a quantised base keeps: bytes of its weights, and bytes saved for backward, beside the whole base.

    python benchmarks/quantised_memory.py

Writes `benchmarks/results/quantised_memory.json` and prints it as a table. The model is MiniLM-L6 (the `demo`
extra) with a classifier of 77 labels; one batch of 16 rows of 64 random tokens. Both figures are the same on
every machine of the same kind (the CPU's and the GPU's kernels keep different things).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import leantune
from leantune.measure import saved_activation_bytes
from leantune.recipes import ModelRecipe
from leantune.run.facts import versions
from leantune.run.models import load_base, load_config
from leantune.run.quantization import KINDS, weight_bytes

RESULT = Path(__file__).parent / "results" / "quantised_memory.json"
COMMON: dict[str, Any] = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
ADAPTERS = {"lora": LoraConfig(r=8, **COMMON), "lamda": leantune.LamdaConfig(r=32, **COMMON)}


def main() -> None:
    """Every kind with every adapter, in float32 and bfloat16."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (16, 64), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 77}
    rows = []
    for dtype in ("float32", "bfloat16"):
        for kind in (None, *KINDS):
            for name, config in ADAPTERS.items():
                recipe = ModelRecipe(path="bundled:minilm", task="classification", dtype=dtype)
                base = load_base(
                    recipe,
                    AutoModelForSequenceClassification,
                    load_config(recipe, num_labels=77),
                    quantize=kind,
                )
                row = {"dtype": dtype, "quantize": kind, "adapter": name, "weight_bytes": weight_bytes(base)}
                model = get_peft_model(base, config)
                rows.append(row | {"saved_activation_bytes": saved_activation_bytes(model, batch)})
    found = versions("nf4") | versions("int8-torchao")
    RESULT.write_text(json.dumps({"versions": found, "rows": rows}, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Kinds down, adapters across, in MiB."""
    lines = ["| base | weights | saved, LoRA r 8 | saved, LaMDA r 32 |", "|---|---|---|---|"]
    for lora, lamda in zip(rows[::2], rows[1::2], strict=True):
        cells = [f"{row / 2**20:.1f} MiB" for row in (
            lora["weight_bytes"], lora["saved_activation_bytes"], lamda["saved_activation_bytes"]
        )]  # fmt: skip
        lines.append(f"| {lora['quantize'] or 'whole'}, {lora['dtype']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
