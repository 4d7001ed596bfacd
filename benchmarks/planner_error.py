"""How far the planner's forecasts are from what the CPU's allocator measures.

    python benchmarks/planner_error.py [--only llama,bert]

Small random models of nine architectures, the methods, batches with and without padding, checkpointing, mixed
precision and accumulation. Measured: the allocator's reports under torch's profiler during one real training
step on one thread, the optimizer's state in place; the same to the byte in every run. Traced: the same step
on fake tensors. Closed form: from shapes. Besides the peak, `leantune.saved_activation_bytes`.

Then models too large for this machine, traced and by the closed form: against the figures of earlier
estimates, with the conditions. Writes benchmarks/results/planner_error.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    RobertaConfig,
)

from leantune.planner import Setting, Tracer, estimate
from leantune.planner.measured import measure_peak, measure_saved
from leantune.recipes import Recipe

RESULTS = Path(__file__).parent / "results" / "planner_error.json"
SMALL: dict[str, Any] = {
    "vocab_size": 2000, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6,
    "intermediate_size": 512, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": 2000, "n_embd": 192, "n_layer": 4, "n_head": 6, "pad_token_id": 0}
DISTIL: dict[str, Any] = {"vocab_size": 2000, "dim": 192, "n_layers": 4, "n_heads": 6, "hidden_dim": 512}
DEBERTA: dict[str, Any] = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 64,
    "norm_rel_ebd": "layer_norm", "share_att_key": True,
}  # fmt: skip
OPT: dict[str, Any] = {"ffn_dim": 512, "word_embed_proj_dim": 192}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 32}
MODELS: dict[str, tuple[str, Any]] = {
    "llama": ("causal-lm", LlamaConfig(**SMALL, num_key_value_heads=2)),
    "qwen3": ("causal-lm", Qwen3Config(**SMALL, **GROUPED)),
    "gemma3": ("causal-lm", Gemma3TextConfig(**SMALL, **GROUPED, sliding_window=64)),
    "gpt2": ("causal-lm", GPT2Config(**GPT2)),
    "opt": ("causal-lm", OPTConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, **OPT)),
    "bert": ("classification", BertConfig(**SMALL)),
    "roberta": ("classification", RobertaConfig(**SMALL)),
    "distilbert": ("classification", DistilBertConfig(**DISTIL)),
    "deberta": ("classification", DebertaV2Config(**SMALL, **DEBERTA)),
}
LORA, LAMDA = {"type": "lora", "r": 8}, {"type": "lamda", "r": 32}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": LORA},
    "lamda": {"adapter": LAMDA},
    "tokentune": {"tokens": {"keep": 0.25}},
    "lora+tokentune": {"adapter": LORA, "tokens": {"keep": 0.25}},
    "lora+light-peft": {"adapter": LORA, "prune": {}},
    "lean": {"adapter": LAMDA, "prune": {}, "tokens": {"keep": 0.25}},
}
CHECKPOINTING = {"gradient_checkpointing": True}
# (methods, batch, length, padded, stage, TrainingArguments), for every model.
CONDITIONS: list[tuple[tuple[str, ...], int, int, bool, str, dict[str, Any]]] = [
    (tuple(METHODS), 4, 128, False, "train", {}),
    (("full", "lora", "lamda", "tokentune"), 2, 96, True, "train", CHECKPOINTING),
    (("lora",), 8, 256, True, "train", {}),
    (("lamda",), 4, 128, False, "frozen", {}),
]
# Conditions that concern the step and not the model: on one model.
MORE: list[tuple[tuple[str, ...], int, int, bool, str, dict[str, Any]]] = [
    (("full", "lora"), 4, 128, False, "train", {"bf16": True}),
    (("full", "lora"), 4, 128, False, "train", {"gradient_accumulation_steps": 2}),
    (("full",), 4, 128, False, "train", {"optim": "adamw_torch"}),
    (("lora+light-peft", "lean"), 4, 128, False, "estimate", {}),
]


def setting(
    name: str, task: str, config: Any, lean: dict[str, Any], dtype: str = "float32", **how: Any
) -> Setting:
    """A recipe for the model, and the batch."""
    recipe = Recipe.model_validate({
        "model": {"path": name, "task": task, "dtype": dtype}, "data": {"path": "unused"}, "lean": lean,
        "train": how.pop("train"), "output": "unused",
    })  # fmt: skip
    return Setting(recipe, config, **how)


def small_cases(only: list[str]) -> list[dict[str, Any]]:
    """Every model under every condition."""
    rows = []
    for name, (task, config) in MODELS.items():
        if only and name not in only:
            continue
        for methods, batch, length, padded, stage, train in CONDITIONS + (MORE if name == "llama" else []):
            for method in methods:
                how = {"batch": batch, "length": length, "padded": padded, "stage": stage, "train": train}
                made = setting(name, task, config, METHODS[method], **how)
                rows.append({"model": name, "method": method, **how} | compare(made))
                print(line(rows[-1]), flush=True)
    return rows


def compare(made: Setting) -> dict[str, Any]:
    """Measured, traced, closed form; bytes."""
    traced, closed = Tracer().trace(made), estimate(made)
    row = {"measured": measure_peak(made), "traced": traced.peak, "closed_form": closed.peak}
    if made.autocast is None:
        row |= {"measured_saved": measure_saved(made), "traced_saved": traced.saved_activation_bytes}
    return row


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    how = f"{row['batch']}×{row['length']} {row['stage']} {row['train'] or ''} {'padded' * row['padded']}"
    errors = f"traced {error(row, 'traced'):+8.3%}  closed form {error(row, 'closed_form'):+7.1%}"
    return f"{row['model']:11}{row['method']:17}{row['measured'] / 2**20:8.1f} MiB  {errors}  {how}"


def error(row: dict[str, Any], engine: str) -> float:
    """Relative to what was measured."""
    return row[engine] / row["measured"] - 1


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst absolute error of both engines."""
    result: dict[str, Any] = {"cases": len(rows)}
    for engine in ("traced", "closed_form"):
        errors = [abs(error(row, engine)) for row in rows]
        result[engine] = {"median": statistics.median(errors), "worst": max(errors)}
    saved = [row for row in rows if "traced_saved" in row]
    result["saved_activation_bytes_worst"] = max(
        abs(row["traced_saved"] / row["measured_saved"] - 1) for row in saved
    )
    return result


LLAMA_7B: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "pad_token_id": 0,
}  # fmt: skip
LEAN = {"adapter": LAMDA, "prune": {}, "tokens": {"keep": 0.25}}


def large_cases() -> list[dict[str, Any]]:
    """Llama-2-7B, bf16: what earlier estimates say, and how long tracing takes."""
    rows = []
    for name, lean, batch, length, train in (
        ("full", {}, 4, 512, {}),
        ("lora", {"adapter": LORA}, 4, 512, {}),
        ("lora", {"adapter": LORA}, 4, 512, CHECKPOINTING),
        ("lamda", {"adapter": LAMDA}, 4, 512, {}),
        ("lora", {"adapter": LORA}, 1, 2048, {}),
        ("lean", LEAN, 1, 2048, {}),
    ):
        how = {"batch": batch, "length": length, "padded": False, "train": train}
        made = setting("llama-2-7b", "causal-lm", LlamaConfig(**LLAMA_7B), lean, "bfloat16", **how)
        began = time.process_time()
        traced = Tracer().trace(made)
        seconds = time.process_time() - began
        rows.append({
            "method": name, **how, "traced": traced.peak, "closed_form": estimate(made).peak,
            "memory": vars(traced.memory), "cpu_seconds": round(seconds, 1),
            "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        })  # fmt: skip
        peaks = f"{traced.peak / 2**30:6.2f} GiB, closed form {rows[-1]['closed_form'] / 2**30:6.2f}"
        print(f"7B {name:8}{batch}×{length} {train or '':32} {peaks}, {seconds:.0f} CPU-seconds", flush=True)
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models, comma-separated; writes nothing")
    only = [name for name in parser.parse_args().only.split(",") if name]
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = small_cases(only)
    print(json.dumps(summary(rows), indent=2))
    if only:
        return
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {"versions": versions, "summary": summary(rows), "cases": rows, "large": large_cases()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
