"""How far the planner's forecasts are from what the CPU's allocator measures.

    OMP_NUM_THREADS=1 python benchmarks/planner_error.py [--only llama,bert] [--large]

Small random models of eight architectures and two real shapes; the methods; batches with and without
padding, checkpointing, mixed precision, accumulation, quantised bases (where bitsandbytes is installed).
Measured: the allocator's reports under torch's profiler during one real training step on one thread, with the
optimizer's state in place; the same to the byte in every run. Traced: the same step on fake tensors. Closed
form: from shapes. Besides: saved activations, the peak of an evaluation batch, and processor time of a step.

Then Llama-2-7B, traced (seconds and the process's memory) and by the closed form, in a process of its own.
Writes benchmarks/results/planner_error.json after every case; the same command again goes on where it
stopped, and computes the closed form, which is instant, anew. Some ten minutes on an idle machine, and 2 GB.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    RobertaConfig,
)

from leantune.measure import peak_rss
from leantune.planner import Setting, Tracer, estimate
from leantune.planner.known import config_of
from leantune.planner.measured import measure, measure_saved
from leantune.recipes import Recipe

RESULTS = Path(__file__).parent / "results" / "planner_error.json"
SMALL: dict[str, Any] = {
    "vocab_size": 2000, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6,
    "intermediate_size": 512, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": 2000, "n_embd": 192, "n_layer": 4, "n_head": 6, "pad_token_id": 0}
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
LEAN = METHODS["lean"]
CHECKPOINTING = {"gradient_checkpointing": True}
Condition = tuple[tuple[str, ...], int, int, bool, str, dict[str, Any]]
# (methods, batch, length, padded, stage, TrainingArguments), for every model.
CONDITIONS: list[Condition] = [
    (tuple(METHODS), 4, 128, False, "train", {}),
    (("full", "lora", "lamda", "tokentune"), 2, 96, True, "train", CHECKPOINTING),
    (("lora",), 8, 256, True, "train", {}),
    (("lamda",), 4, 128, False, "frozen", {}),
]
# Conditions that concern the step and not the model: on one model.
MORE: list[Condition] = [
    (("full", "lora"), 4, 128, False, "train", {"bf16": True}),
    (("full", "lora"), 4, 128, False, "train", {"gradient_accumulation_steps": 2}),
    (("full",), 4, 128, False, "train", {"optim": "adamw_torch"}),
    (("lora+light-peft", "lean"), 4, 128, False, "estimate", {}),
]
# Real shapes: (shape, method, batch, length, padded).
REAL: list[tuple[str, str, int, int, bool]] = [
    ("bert-base", "lora+tokentune", 8, 128, True),
    ("gpt2", "lora+light-peft", 2, 256, False),
]
QUANTISED = ("nf4", "int8")


def setting(
    name: str, task: str, config: Any, lean: dict[str, Any], dtype: str = "float32", **how: Any
) -> Setting:
    """A recipe for the model, and the batch."""
    train = {"eval_batch_size": how["batch"], **how.pop("train")}
    recipe = Recipe.model_validate({
        "model": {"path": name, "task": task, "dtype": dtype}, "data": {"path": "unused"}, "lean": lean,
        "train": train, "output": "unused",
    })  # fmt: skip
    return Setting(recipe, config, **how)


def cases(only: list[str]) -> Iterator[tuple[dict[str, Any], Setting]]:
    """What is measured: how a row is called, and the setting."""
    if not only:
        yield from quantised_cases()
        yield from real_cases()
    for name, (task, config) in MODELS.items():
        if only and name not in only:
            continue
        for methods, batch, length, padded, stage, train in CONDITIONS + (MORE if name == "llama" else []):
            for method in methods:
                how = {"batch": batch, "length": length, "padded": padded, "stage": stage, "train": train}
                made = setting(name, task, config, METHODS[method], **how)
                yield {"model": name, "method": method, **how}, made


def real_cases() -> Iterator[tuple[dict[str, Any], Setting]]:
    """Of well-known models."""
    for name, method, batch, length, padded in REAL:
        how = {"batch": batch, "length": length, "padded": padded, "stage": "train", "train": {}}
        task = "classification" if name.startswith("bert") else "causal-lm"
        dtype = "bfloat16" if name.startswith("qwen") else "float32"
        made = setting(name, task, shape(name, task), METHODS[method], dtype, **how)
        yield {"model": name, "method": method, "dtype": dtype, **how}, made


def quantised_cases() -> Iterator[tuple[dict[str, Any], Setting]]:
    """On bitsandbytes' own layers."""
    if importlib.util.find_spec("bitsandbytes") is None:
        print("bitsandbytes is not installed: quantised bases are left out")
        return
    for storage in QUANTISED:
        for method, dtype in (("lora", "float32"), ("lora", "bfloat16"), ("lamda", "bfloat16")):
            how = {"batch": 4, "length": 128, "padded": False, "stage": "train", "train": {}}
            task, config = MODELS["llama"]
            made = setting("llama", task, config, METHODS[method] | {"quantize": storage}, dtype, **how)
            yield {"model": "llama", "method": f"{method}+{storage}", "dtype": dtype, **how}, made


def shape(name: str, task: str) -> Any:
    """The config of a well-known model."""
    path = {"model": {"path": f"shape:{name}", "task": task}, "data": {"path": "x"}, "output": "x"}
    config = config_of(Recipe.model_validate(path).model)
    config.pad_token_id = 0
    return config


def compare(made: Setting) -> dict[str, Any]:
    """Measured and traced; bytes."""
    traced, real = Tracer().trace(made), measure(made)
    row: dict[str, Any] = {
        "measured": real.peak, "traced": traced.peak,
        "evaluation": {"measured": real.evaluation_peak, "traced": traced.evaluation_peak},
        "cpu_seconds": real.cpu_seconds, "flops": traced.flops,
    }  # fmt: skip
    if made.autocast is None and made.storage is None:
        row |= {"measured_saved": measure_saved(made), "traced_saved": traced.saved_activation_bytes}
    return row


def with_closed_form(row: dict[str, Any], made: Setting) -> dict[str, Any]:
    """The closed form beside them."""
    closed = estimate(made)
    row |= {"closed_form": closed.peak}
    if "evaluation" in row:
        row["evaluation"] |= {"closed_form": closed.evaluation_peak}
    return row


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    how = f"{row['batch']}×{row['length']} {row['stage']} {row['train'] or ''} {'padded' * row['padded']}"
    errors = f"traced {error(row, 'traced'):+8.3%}  closed form {error(row, 'closed_form'):+7.1%}"
    apart = row.get("evaluation", {"measured": 1, "traced": 1, "closed_form": 1})
    evaluation = f"evaluation {error(apart, 'traced'):+7.2%} {error(apart, 'closed_form'):+6.1%}"
    name = f"{row['model']:13}{row['method']:17}"
    return f"{name}{row['measured'] / 2**20:8.1f} MiB  {errors}  {evaluation}  {how}"


def error(row: dict[str, Any], engine: str) -> float:
    """Relative to what was measured."""
    return row[engine] / row["measured"] - 1


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst absolute error of both engines."""
    result: dict[str, Any] = {"cases": len(rows), "models": len({row["model"] for row in rows})}
    evaluated = [row["evaluation"] for row in rows if "evaluation" in row]
    result["evaluation_cases"] = len(evaluated)
    for engine in ("traced", "closed_form"):
        result[engine] = _spread([error(row, engine) for row in rows])
        result[f"{engine}_evaluation"] = _spread([error(row, engine) for row in evaluated])
    saved = [abs(row["traced_saved"] / row["measured_saved"] - 1) for row in rows if "traced_saved" in row]
    result["saved_activation_bytes_worst"] = max(saved, default=None)
    return result


def _spread(errors: list[float]) -> dict[str, float]:
    sizes = [abs(each) for each in errors]
    return {"median": statistics.median(sizes), "worst": max(sizes)} if sizes else {}


def large_cases() -> Iterator[dict[str, Any]]:
    """Llama, bf16: how long tracing takes; and, by the closed form alone, conditions of published figures."""
    for name, method, storage, batch, length, train, traced in (
        ("llama-2-7b", "lora", None, 1, 2048, {}, True),
        ("llama-2-7b", "lora", "nf4", 1, 2048, {}, True),
        ("llama-2-7b", "lean", None, 1, 2048, {}, True),
        ("llama-2-7b", "lora", None, 4, 512, CHECKPOINTING, True),
        ("llama-2-7b", "full", None, 4, 512, {}, False),
        ("llama-2-7b", "lora", None, 4, 512, {}, False),
        ("llama-2-7b", "lamda", None, 4, 512, {}, False),
        ("llama-2-7b", "lora", None, 1, 1304, {}, False),
        ("llama-2-7b", "lora", "nf4", 1, 1304, {}, False),
        ("llama-3.1-8b", "lora", None, 2, 2048, CHECKPOINTING, False),
        ("llama-3.1-8b", "lora", "nf4", 2, 2048, CHECKPOINTING, False),
        ("llama-3.2-3b", "full", None, 4, 768, {}, False),
        ("llama-3.2-3b", "lora", None, 4, 768, {}, False),
    ):
        how: dict[str, Any] = {"batch": batch, "length": length, "padded": False, "train": train}
        config, lean = shape(name, "causal-lm"), METHODS[method] | {"quantize": storage}
        made = setting(name, "causal-lm", config, lean, "bfloat16", **how)
        row = {"model": name, "method": method if storage is None else f"{method}+{storage}", **how}
        closed = estimate(made)
        row |= {"closed_form": closed.peak, "closed_form_memory": vars(closed.memory)}
        yield row | (timed_trace(made) if traced else {})


def timed_trace(made: Setting) -> dict[str, Any]:
    """Traced, with what that took."""
    began, cpu = time.perf_counter(), time.process_time()
    figures = Tracer().trace(made)
    return {
        "traced": figures.peak, "memory": vars(figures.memory), "evaluation": figures.evaluation_peak,
        "flops": figures.flops, "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1), "process_peak_bytes": peak_rss(),
    }  # fmt: skip


def large_in_own_process() -> list[dict[str, Any]]:
    """Whose memory is that of tracing alone."""
    command = [sys.executable, __file__, "--large"]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    return [json.loads(row) for row in said.stdout.splitlines()]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models, comma-separated; writes nothing")
    parser.add_argument("--large", action="store_true", help="Llama-2-7B alone, a JSON object a line")
    asked = parser.parse_args()
    only = [name for name in asked.only.split(",") if name]
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if asked.large:
        for row in large_cases():
            print(json.dumps(row), flush=True)
        return
    written = {} if only or not RESULTS.is_file() else json.loads(RESULTS.read_text(encoding="utf-8"))
    known = {_key(row): row for row in written.get("cases", [])}
    rows = []
    for name, made in cases(only):
        row = known.get(_key(name)) or name | compare(made)
        rows.append(with_closed_form(row, made))
        print(line(row), flush=True)
        if not only:
            write(rows, written)
    print(json.dumps(summary(rows), indent=2))
    if not only and "large" not in written:
        write(rows, {"large": large_in_own_process()})


def _key(row: dict[str, Any]) -> str:
    """What a case is called."""
    names = ("model", "method", "batch", "length", "padded", "stage", "train", "dtype")
    return json.dumps([row.get(name) for name in names])


def write(rows: list[dict[str, Any]], written: dict[str, Any]) -> None:
    """The result so far; cases that are still to come stay as they were written before."""
    now = {_key(row) for row in rows}
    later = [row for row in written.get("cases", []) if _key(row) not in now and "closed_form" in row]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    result = {"versions": versions, "summary": summary(rows + later)}
    result |= {"cases": rows + later} | {key: value for key, value in written.items() if key == "large"}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
