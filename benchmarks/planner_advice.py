"""Is `leantune plan --memory` right? Its advice, carried out under that very limit.

    OMP_NUM_THREADS=1 python benchmarks/planner_advice.py [--only NAME]

For six (model, limit) pairs whose recipe does not fit: the recipe that the plan proposes is run by `leantune
train` under the limit (RLIMIT_DATA: the kernel refuses the process every further byte of private writable
memory) and has to come through, without a batch that had to be split; then the next larger setting, twice the
proposed batch and else the same, which must not.

A process needs memory besides tensors: the interpreter, torch, transformers, the data. How much is measured
first, once a task, as the highest VmData of a model of next to nothing up to the end of its training (what
comes after needs fewer tensors and more libraries), less that run's own tensors; it is what `--reserve` is
given. Limits are that plus a round number. glibc is told to give memory back at once, so that the process's
figure follows its tensors.

Writes benchmarks/results/planner_advice.json; takes some ten minutes and 2 GB.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from leantune.planner import plan
from leantune.planner.rows import changed
from leantune.planner.table import typed_changes
from leantune.recipes import Recipe

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "planner_advice.json"
DATA = HERE.parent / "data" / "banking77"
MIB = 1 << 20
QUIET = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
VOCABULARY = 4000
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 6, "num_attention_heads": 8, "pad_token_id": 0,
    "max_position_embeddings": 512,
}  # fmt: skip
LORA, LAMDA = {"type": "lora", "r": 8}, {"type": "lamda", "r": 16}
# Name → (model, task, lean, batch, length, limit above the reserve in MiB).
PAIRS: dict[str, tuple[str, str, dict[str, Any], int, int, int]] = {
    "minilm-full": ("bundled:minilm", "classification", {}, 64, 64, 600),
    "minilm-lora": ("bundled:minilm", "classification", {"adapter": LORA}, 128, 64, 400),
    "bert-tokentune": ("bert", "classification", {"adapter": LORA, "tokens": {"keep": 0.25}}, 128, 64, 250),
    "llama-lora": ("llama", "causal-lm", {"adapter": LORA}, 16, 256, 400),
    "llama-full": ("llama", "causal-lm", {}, 16, 256, 900),
    "gpt2-lamda": ("gpt2", "causal-lm", {"adapter": LAMDA}, 16, 256, 250),
}
STEPS = 3
SPLIT = "out of memory with"  # what a run says when it halves a batch


def make_models(folder: Path) -> None:
    """Random ones with a tokenizer, as plain folders."""
    tokenizer = make_tokenizer()
    wide = {"hidden_size": 512, "intermediate_size": 1536}
    made = {
        "bert": lambda: BertModel(BertConfig(**SIZES, hidden_size=512, intermediate_size=2048)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **wide, num_key_value_heads=4)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
            vocab_size=VOCABULARY, n_embd=512, n_layer=6, n_head=8, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        )),
        "tiny-classification": lambda: BertModel(BertConfig(**SIZES | TINY)),
        "tiny-causal-lm": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | TINY)),
    }  # fmt: skip
    for name, make in made.items():
        make().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the data."""
    inner = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    with gzip.open(DATA / "train.jsonl.gz", "rt", encoding="utf-8") as rows:
        texts = [json.loads(row)["text"] for row in rows]
    trainer = trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=special)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", bos_token="[CLS]", model_max_length=512,
    )  # fmt: skip


def make_rows(folder: Path) -> None:
    """Ten requests a row, under the label of the first: every row is cut, so that all steps are alike."""
    (folder / "data").mkdir()
    for split, count in (("train", 3000), ("test", 256)):
        with gzip.open(DATA / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(row) for row in file][: count + 9]
        joined = [
            rows[first] | {"text": " ".join(row["text"] for row in rows[first : first + 10])}
            for first in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in joined)
        (folder / "data" / f"{split}.jsonl").write_text(text, encoding="utf-8")


def make_recipe(model: str, task: str, lean: dict[str, Any], batch: int, length: int, output: Path) -> Recipe:
    """A short run on rows that all reach `length`."""
    columns: dict[str, Any] = {"text": "text"}
    columns |= {"label": "label_text"} if task == "classification" else {}
    rows = {"max_length": length}
    return Recipe.model_validate({
        "model": {"path": model, "task": task},
        "data": {"path": str(output.parent / "data"), **columns, **rows},
        "lean": lean,
        "train": {"steps": STEPS, "batch_size": batch, "eval_batch_size": 2},
        "output": str(output),
    })  # fmt: skip


def run(recipe: Recipe, folder: Path, limit: int | None) -> dict[str, Any]:
    """`leantune train` under the limit; what became of it, and the most private writable memory seen."""
    shutil.rmtree(recipe.output, ignore_errors=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    command = [sys.executable, "-m", "leantune.cli", "train", str(file), "--overwrite"]

    def confine() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | QUIET, preexec_fn=confine
        )
        highest = training = 0
        saved = [Path(recipe.output) / name for name in ("adapter", "model")]
        while process.poll() is None:
            highest = max(highest, data_bytes(process.pid))
            if not any(place.exists() for place in saved):
                training = highest
            time.sleep(0.01)
    text = (folder / "said.txt").read_text(encoding="utf-8")
    lines = [row for row in text.splitlines() if "memory" in row.lower() or "Error" in row]
    return {
        "survived": process.returncode == 0, "exit_code": process.returncode, "in_parts": SPLIT in text,
        "highest_data_bytes": highest, "highest_in_training": training,
        "said": "" if process.returncode == 0 else (lines or text.splitlines() or [""])[-1].strip()[:200],
    }  # fmt: skip


def data_bytes(pid: int) -> int:
    """VmData of a process now; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = [row.split()[1] for row in status.splitlines() if row.startswith("VmData:")]
    return int(found[0]) * 1024 if found else 0


def baselines(folder: Path, tasks: set[str]) -> dict[str, int]:
    """Task → bytes that a run takes besides its tensors; with small evaluations, so that training decides."""
    found = {}
    for task in sorted(tasks):
        length = 64 if task == "classification" else 256
        recipe = make_recipe(str(folder / f"tiny-{task}"), task, {"adapter": LORA}, 2, length, folder / "run")
        tensors = plan(recipe, methods=[], device="cpu").rows[0].needed or 0
        done = run(recipe, folder, None)
        if not done["survived"]:
            raise SystemExit(f"the baseline run failed: {done['said']}")
        found[task] = done["highest_in_training"] - tensors
        print(f"{task}: a run takes {found[task] / MIB:,.0f} MiB besides tensors", flush=True)
    return found


def examine(name: str, folder: Path, reserve: dict[str, int]) -> dict[str, Any]:
    """One pair: ask, follow the advice, then go one step too far."""
    model, task, lean, batch, length, room = PAIRS[name]
    path = model if model.startswith("bundled:") else str(folder / model)
    recipe = make_recipe(path, task, lean, batch, length, folder / "run")
    kept = reserve[task]
    limit = kept + room * MIB
    made = plan(recipe, memory=limit, reserve=kept, methods=[], device="cpu")
    best = None if made.advice is None else made.advice.best
    row: dict[str, Any] = {
        "name": name, "model": model, "method": recipe.method, "batch": batch, "length": made.length.tokens,
        "limit_bytes": limit, "reserve_bytes": kept, "recipe_needs": made.rows[0].needed,
    }  # fmt: skip
    if made.advice is None or best is None:
        return row | {"proposed": None}
    proposed = made.advice.recipes[best.name]
    row |= {"proposed": typed_changes(best.changes), "proposed_needs": best.needed}
    row["proposed_run"] = run(proposed, folder, limit)
    size = proposed.train.batch_size
    larger = changed(proposed, {"train.batch_size": 2 * size}).recipe
    row |= {"next": f"train.batch_size={2 * size}"}
    row["next_needs"] = plan(larger, methods=[], device="cpu").rows[0].needed
    row["next_run"] = run(larger, folder, limit)
    return row


def table(result: dict[str, Any]) -> str:
    """Pairs × (limit, proposal, what became of it), in markdown."""
    head = ["recipe", "batch × length", "limit, of it reserved", "proposed", "forecast → seen", "it"]
    head += ["twice its batch"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in result["pairs"]:
        limit, reserve = row["limit_bytes"] / MIB, row["reserve_bytes"] / MIB
        seen = (row["proposed_run"]["highest_in_training"] - row["reserve_bytes"]) / MIB
        cells = [row["name"], f"{row['batch']} × {row['length']}", f"{limit:,.0f}, {reserve:,.0f} MiB"]
        cells += [f"`{row['proposed']}`", f"{row['proposed_needs'] / MIB:,.0f} → {seen:,.0f} MiB"]
        cells += [became(row["proposed_run"]), became(row["next_run"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Right in {result['right']} of {len(result['pairs'])}."])


def became(done: dict[str, Any]) -> str:
    """What became of a run, in two or three words."""
    if not done["survived"]:
        return "out of memory"
    return "only with its batches split" if done["in_parts"] else "fits"


def is_right(row: dict[str, Any]) -> bool:
    """Whether the proposal came through as it is and the next larger setting did not."""
    return row["proposed"] is not None and fits(row["proposed_run"]) and not fits(row["next_run"])


def fits(done: dict[str, Any]) -> bool:
    """Whether a run came through with its batches whole."""
    return bool(done["survived"]) and not done["in_parts"]


def main() -> None:
    """Ask, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names, comma-separated; writes nothing")
    only = [name for name in parser.parse_args().only.split(",") if name]
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_models(folder)
        make_rows(folder)
        reserve = baselines(folder, {PAIRS[name][1] for name in only or PAIRS})
        for name in only or PAIRS:
            rows.append(examine(name, folder, reserve))
            print(json.dumps(rows[-1]), flush=True)
    right = [row for row in rows if is_right(row)]
    print(f"right: {len(right)} of {len(rows)}")
    if not only:
        result = {"reserve_bytes": reserve, "right": len(right), "pairs": rows}
        text = json.dumps(result, indent=1).replace(place, "MODELS")
        RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
