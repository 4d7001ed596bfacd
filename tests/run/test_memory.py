"""Out of memory: the batch is split, with the loss and the gradient of the whole; evaluation likewise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import leantune
from leantune.errors import RunError
from leantune.run import Interrupted, callbacks, lean, pipeline, stages
from leantune.run.checkpoints import newest_complete
from leantune.run.folder import RunFolder
from leantune.run.parts import is_out_of_memory, parts_of
from tests.conftest import requests, write_jsonl
from tests.run.support import SETTINGS, printed, quiet, recipe
from tests.run.test_checkpoints import assert_same_run, weights


def test_what_counts_as_out_of_memory() -> None:
    allocator = "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        MemoryError(),
        RuntimeError(allocator),
        RuntimeError("[enforce fail] not enough memory: you tried to allocate 9 bytes"),
    ):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shape mismatch"), ValueError("not enough memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(other)


def test_parts_are_nearly_equal_and_complete() -> None:
    batch = {"input_ids": torch.arange(22).view(11, 2), "labels": torch.arange(11), "n": torch.tensor(3)}
    parts = list(parts_of(batch, 4))
    assert [first for first, _ in parts] == [0, 3, 7]
    assert torch.equal(torch.cat([part["input_ids"] for _, part in parts]), batch["input_ids"])
    assert all(part["n"] == 3 and len(part["input_ids"]) == len(part["labels"]) <= 4 for _, part in parts)


class Limit:
    """A machine on which more than `most` rows do not fit: forward or backward fails with more."""

    def __init__(self, most: int, backward: bool = False) -> None:
        self.most, self.backward, self.failures = most, backward, 0
        self.seen: list[int] = []

    def attach(self, model: torch.nn.Module) -> None:
        embeddings = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
        layers = [m for n, m in model.named_modules() if n.endswith(("layer.1", "layers.1"))]
        embeddings.register_forward_hook(self._forward)
        if self.backward:
            layers[0].register_full_backward_hook(self._backward)

    def _fail(self) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB (planted)")

    def _forward(self, module: Any, args: Any, output: torch.Tensor) -> None:
        rows = args[0].size(0)
        self.seen.append(rows)
        if rows > self.most and not (self.backward and module.training and torch.is_grad_enabled()):
            self._fail()

    def _backward(self, module: Any, grad_input: Any, grad_output: Any) -> None:
        if grad_output[0].size(0) > self.most:
            self._fail()


def train(monkeypatch: pytest.MonkeyPatch, made: Any, limit: Limit | None, **options: Any) -> tuple[Any, str]:
    """A run in float64, under a limit that begins once training does."""
    attach, console = lean.attach, quiet()
    pruned, began = pipeline.pruned_model, stages._run

    def prepared(build: Any) -> Any:
        return lambda *args: build(*args).double()

    def limited(trainer: Any, *args: Any) -> Any:
        if limit is not None:
            limit.attach(trainer.model)
        return began(trainer, *args)

    with monkeypatch.context() as patched:
        patched.setattr(lean, "attach", prepared(attach))
        patched.setattr(pipeline, "pruned_model", prepared(pruned))
        patched.setattr(stages, "_run", limited)
        done = leantune.train(made, console=console, **options)
    return done, printed(console)


LEAN = {
    "lora": {"adapter": {"type": "lora", "r": 4}},
    "lamda": SETTINGS["lamda"],
    "tokentune": SETTINGS["tokentune"],
    "scored": {"adapter": {"type": "lora", "r": 4}, "tokens": {"keep": 0.5, "strategy": "loss"}},
    "light-peft": {
        "adapter": {"type": "lora", "r": 4},
        "prune": {"modules": 0.25, "ranks": 0.25, "estimate_steps": 4},
    },
}
TWICE = {"gradient_accumulation_steps": 2}
CASES = [
    ("classification", "light-peft", {}, True),
    ("causal-lm", "lora", TWICE, False),
    ("causal-lm", "tokentune", TWICE, True),
    pytest.param("classification", "lora", {}, False, marks=pytest.mark.slow),
    pytest.param("classification", "lamda", TWICE, True, marks=pytest.mark.slow),
    pytest.param("classification", "tokentune", {}, False, marks=pytest.mark.slow),
    pytest.param("causal-lm", "scored", {}, False, marks=pytest.mark.slow),
]


def answers(count: int) -> list[dict[str, Any]]:
    """Prompts with answers of very different length: a mean of means is not the mean."""
    return [
        {"prompt": row["text"], "completion": " ".join(["card", "lost", "pin"][: 1 + n % 3] * (1 + n % 4))}
        for n, row in enumerate(requests(count, 3))
    ]


@pytest.mark.parametrize(("task", "method", "extra", "backward"), CASES)
def test_split_equals_whole(
    task: str,
    method: str,
    extra: dict[str, Any],
    backward: bool,
    bert_folder: Path,
    llama_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropout off: losses, gradient norms, weights, plan and evaluations to rounding (float64)."""
    data = data_folder
    if task == "causal-lm":
        (tmp_path / "data").mkdir()
        for split, count in (("train", 40), ("validation", 10)):
            write_jsonl(tmp_path / "data" / f"{split}.jsonl", answers(count))
        data = tmp_path / "data"
    base = without_dropout(bert_folder, tmp_path) if task == "classification" else llama_folder
    results = []
    for name, limit in (("whole", None), ("split", Limit(3, backward))):
        made = recipe(
            base, data, tmp_path / name, LEAN[method], model={"task": task},
            train={"batch_size": 10, "steps": 4, "eval_batch_size": 10, "learning_rate": 1e-3, **extra},
        )  # fmt: skip
        results.append(train(monkeypatch, made, limit))
        if limit is not None:
            assert limit.failures
            told = [line for line in results[1][1].splitlines() if "out of memory with" in line]
            stages = 1 + ("prune" in LEAN[method])
            assert [f"with {rows} rows" in line for rows, line in zip([10, 5] * stages, told, strict=False)]
            assert 2 * stages <= len(told) <= 4 * stages  # training (and evaluation) each halve twice
            training = [rows for rows in limit.seen if rows > 5]
            assert len(training) <= 4 * stages, "the smaller size is remembered"
    logs = [
        [
            line
            for stage in ("estimation", None)
            for line in callbacks.read_log(done.folder / "log.jsonl", stage)
        ]
        for done, _ in results
    ]
    for one, other in zip(*logs, strict=True):
        for key in one.keys() - {"step_seconds", "evaluation", "stage"}:
            assert one[key] == pytest.approx(other[key], rel=1e-7, abs=1e-9), (key, one, other)
    first, second = (weights(done.folder) for done, _ in results)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)  # AdamW divides by |g|
    if "prune" in LEAN[method]:
        plans = [leantune.PruningPlan.load(done.folder / "pruning" / "plan.json") for done, _ in results]
        assert plans[0].groups == plans[1].groups
        for name, module in plans[0].modules.items():
            assert module.kept == plans[1].modules[name].kept
            assert module.importance == pytest.approx(plans[1].modules[name].importance, rel=1e-6)


def without_dropout(folder: Path, place: Path) -> Path:
    import json
    import shutil

    shutil.copytree(folder, place / "base")
    config = json.loads((place / "base" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (place / "base" / "config.json").write_text(json.dumps(config))
    return place / "base"


def test_one_row_that_does_not_fit(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(bert_folder, data_folder, tmp_path / "run", SETTINGS["lora"])
    with pytest.raises(RunError, match=r"step 1: one row of \d+ tokens does not fit in memory; "):
        train(monkeypatch, made, Limit(0))
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_resumed_run_splits_alike(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: the draws depend on the parts, so these are in the checkpoint."""
    from tests.run.test_checkpoints import Interrupt

    whole = recipe(bert_folder, data_folder, tmp_path / "whole", SETTINGS["lora"])
    train(monkeypatch, whole, Limit(5))
    made = recipe(bert_folder, data_folder, tmp_path / "run", SETTINGS["lora"])
    with monkeypatch.context() as patched:
        stop: list[TrainerCallback] = [Interrupt("on_step_end", 4)]
        patched.setattr(lean, "callbacks", lambda recipe: stop)
        with pytest.raises(Interrupted):
            train(monkeypatch, made, Limit(5))
    _, told = train(monkeypatch, made, Limit(5), resume=True)
    assert "out of memory with 16" not in told
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_out_of_memory_elsewhere_is_one_line(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    made = recipe(bert_folder, data_folder, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", full)
        with pytest.raises(RunError, match="out of memory: CUDA out of memory.; a smaller model"):
            leantune.train(made, console=quiet())
    with monkeypatch.context() as patched:
        from leantune.run import trainer

        patched.setattr(trainer, "seal", full)
        with pytest.raises(RunError, match="step 6: the checkpoint cannot be written"):
            leantune.train(made, resume=True, console=quiet())
    assert newest_complete(RunFolder(tmp_path / "run").checkpoints)[0] is None
    assert leantune.train(made, resume=True, console=quiet()).metrics["steps"] == 12


UNDER_A_LIMIT = """
import resource, sys, torch
from pathlib import Path
from transformers import BertConfig, BertModel
import leantune
from leantune.run import stages
from tests.conftest import make_tokenizer
from tests.run.support import recipe

torch.set_num_threads(1)
place, spare = Path(sys.argv[1]), int(sys.argv[2])
began = stages._run

def limited(*args):
    if spare:  # what the process has by now, and so much more
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare * 2**20,) * 2)
    return began(*args)

stages._run = limited
lean = {"adapter": {"type": "lora", "r": 4}}
train = {"batch_size": 96, "steps": 4, "eval_batch_size": 24}
made = recipe(place / "base", place / "data", place / f"run-{spare}", lean, train=train)
leantune.train(made)
"""


SPARE = 350  # MiB that 48 rows at once fit in and 96 do not
# What is freed goes back at once: else what was free before the limit would come on top of it.
GIVING_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@pytest.mark.slow
def test_under_a_real_limit(bert_folder: Path, tmp_path: Path) -> None:
    """RLIMIT_AS: the allocator itself refuses; the loss curve is that of the run without a limit."""
    from transformers import BertConfig, BertModel

    from tests.conftest import make_tokenizer

    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=40, max_position_embeddings=64, pad_token_id=0, **sizes, **off)
    ).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    rows = [{**row, "text": " ".join([row["text"]] * 9)} for row in requests(96, 0)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    write_jsonl(tmp_path / "data" / "test.jsonl", rows[:24])
    told = {}
    for spare in (0, SPARE):
        done = subprocess.run(
            [sys.executable, "-c", UNDER_A_LIMIT, str(tmp_path), str(spare)],
            capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=900,
            env=os.environ | GIVING_BACK,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        told[spare] = done.stderr
    assert "out of memory with 96 rows" in told[SPARE] and "out of memory" not in told[0]
    curves = [
        [line["loss"] for line in callbacks.read_log(tmp_path / f"run-{spare}" / "log.jsonl")]
        for spare in (0, SPARE)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
