"""Kill a run at random moments, resume it, and compare the result bit for bit with a run that was not killed.

    OMP_NUM_THREADS=1 python benchmarks/crash_test.py [--methods lamda,tokentune,light-peft,lean] [--kills 16]
        [--kinds operation,system-call,time,stop] [--seed 0] [--out FILE]

A tiny random BERT learns to classify synthetic rows in 40 steps (an epoch is 10), a checkpoint every 3 steps
and an evaluation every epoch, adapter dropout on. The kinds of moments:

    operation    SIGKILL before the n-th file operation of Python's on the run folder (open, rename, fsync,
                 mkdir, remove), all kinds of places alike (checkpoints, prune, adapter, metrics, …)
    system-call  SIGKILL at the n-th write, fsync, rename, mkdir or unlink of the process, native code's own
                 included (strace's fault injection)
    time         SIGKILL after a random time
    stop         SIGINT after a random time; where training had begun a checkpoint must have been saved

Every third run is killed twice. Compared: weights, plan, masks and predictions (files), every line of the log
and metrics.json, without times and the process's memory. Nothing is imported twice: children are forked from
a process that has imported everything and computed nothing. Writes benchmarks/results/crash_test.json.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from rich.console import Console
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from leantune.recipes.loading import validate
from leantune.run import Interrupted, train
from leantune.run.checkpoints import newest_complete
from leantune.run.facts import versions
from leantune.run.folder import RunFolder

RESULTS = Path(__file__).parent / "results" / "crash_test.json"
WORDS = [
    "card",
    "cash",
    "pin",
    "the",
    "a",
    "my",
    "your",
    "money",
    "transfer",
    "lost",
    "found",
    "late",
    "not",
    "yet",
]
LABELS = {"card": "lost", "cash": "missing", "pin": "blocked"}
LORA = {"type": "lora", "r": 4, "dropout": 0.1}
LAMDA = {"type": "lamda", "r": 4, "dropout": 0.1}
ESTIMATE = {"estimate_steps": 11, "modules": 0.25, "ranks": 0.25}
METHODS: dict[str, dict[str, Any]] = {
    "lamda": {"adapter": LAMDA},
    "tokentune": {"adapter": LORA, "tokens": {"keep": 0.5}},
    "light-peft": {"adapter": LORA, "prune": ESTIMATE},
    "lean": {"adapter": LAMDA, "prune": {"estimate_steps": 11}, "tokens": {"keep": 0.5}},
}
KINDS = ("operation", "system-call", "time", "stop")
CALLS = ("write", "pwrite64", "fsync", "rename", "mkdir", "mkdirat", "unlink", "unlinkat", "ftruncate")
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def prepare(place: Path) -> None:
    """A base model with its tokenizer, and data."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", model_max_length=32
    ).save_pretrained(place / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(
        BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, pad_token_id=0, **sizes)
    ).save_pretrained(place / "base")
    draw = random.Random(0)
    (place / "data").mkdir()
    for split, count in (("train", 80), ("validation", 16), ("test", 16)):
        rows = []
        for _ in range(count):
            subject = draw.choice(list(LABELS))
            words = [
                subject,
                *draw.choices([word for word in WORDS if word not in LABELS], k=draw.randint(2, 7)),
            ]
            draw.shuffle(words)
            rows.append({"text": " ".join(words), "label": LABELS[subject]})
        (place / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(place: Path, output: Path, method: str) -> None:
    """Train, or go on where there is something to go on from."""
    recipe = validate(
        {
            "model": {"path": str(place / "base"), "task": "classification"},
            "data": {"path": str(place / "data")},
            "lean": METHODS[method],
            "train": {
                "epochs": 4,
                "batch_size": 8,
                "learning_rate": 5e-3,
                "weight_decay": 0.1,
                "save_strategy": "steps",
                "save_steps": 3,
            },
            "output": str(output),
        },
        "crash test",
    )
    resume = RunFolder(output).recipe_file.is_file()
    train(recipe, resume=resume, console=Console(file=io.StringIO()))


# -- children ------------------------------------------------------------------------------------------------


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        work()
        code = 0
    except Interrupted:
        code = 130
    except BaseException:  # what the child did wrong is the parent's to tell
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Exit code, or minus the signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_operations(output: Path, act: Callable[[int, str], None]) -> None:
    """Call `act(number, what)` before each file operation of Python's on the run folder, in this process."""
    root, number, last = str(output), 0, ""

    def step(what: str) -> None:
        nonlocal number
        number += 1
        act(number, what)

    def heard(event: str, args: tuple[Any, ...]) -> None:
        nonlocal last
        if event in EVENTS and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(root):
            last = os.path.relpath(os.fspath(args[0]), root)
            step(f"{event} {last}")

    sync = os.fsync

    def fsync(handle: int) -> None:
        step(f"fsync {last}")
        sync(handle)

    os.fsync = fsync
    sys.addaudithook(heard)


def place_of(what: str) -> str:
    """The kind of place that an operation is on: `checkpoints`, `pruning`, `adapter`, `metrics.json`, …"""
    path = what.partition(" ")[2]
    for name in ("estimation", "warm-start", "pruning", "checkpoints", "adapter", "log.jsonl", "recipe.yaml"):
        if name in path:
            return name
    return path.strip(".").removesuffix(".tmp") or "folder"


# -- moments -------------------------------------------------------------------------------------------------


class Reference:
    """A run that is not killed, and what there is to count in it."""

    def __init__(self, place: Path, method: str) -> None:
        self.place, self.method, self.folder = place, method, place / f"{method}-whole"
        self.operations = place / f"{method}-operations"
        began = time.monotonic()
        assert wait(fork(self._recorded)) == 0, "the run without a kill failed"
        self.seconds = time.monotonic() - began
        self.by_place: dict[str, list[int]] = {}
        for number, what in enumerate(self.operations.read_text().splitlines(), 1):
            self.by_place.setdefault(place_of(what), []).append(number)
        self.result = digest(self.folder)
        self.calls: Counter[str] = Counter()

    def _recorded(self) -> None:
        with self.operations.open("w") as file:
            count_operations(self.folder, lambda number, what: (file.write(what + "\n"), None)[1])
            run(self.place, self.folder, self.method)

    def count_calls(self) -> None:
        """System calls by name, of one more run."""
        trace = self.place / "trace"
        child = under_strace(
            lambda: run(self.place, self.place / "counted", self.method),
            [f"-etrace={','.join(CALLS)}"],
            trace,
        )
        assert wait(child) == 0, "the run under strace failed"
        shutil.rmtree(self.place / "counted")
        for line in trace.read_text(errors="replace").splitlines():
            name = line.split("(")[0].split()[-1]
            if name in CALLS:
                self.calls[name] += 1


def under_strace(work: Callable[[], None], options: list[str], trace: Path) -> int:
    """A child that begins once strace has attached to it."""
    reading, writing = os.pipe()
    child = fork(lambda: (os.read(reading, 1), work(), None)[2])
    subprocess.Popen(
        ["strace", "-qq", "-o", str(trace), *options, "-p", str(child)], stderr=subprocess.DEVNULL
    )
    while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
        time.sleep(0.01)
    os.write(writing, b"x")
    os.close(reading)
    os.close(writing)
    return child


def strike(kind: str, reference: Reference, output: Path, draw: random.Random) -> tuple[str, int]:
    """Run (or go on) and be struck at a random moment; returns where it was, and the exit code."""
    place, method = reference.place, reference.method

    def work() -> None:
        run(place, output, method)

    if kind == "operation":
        where = draw.choice(sorted(reference.by_place))
        chosen = draw.choice(reference.by_place[where])

        def bombed() -> None:
            def act(number: int, what: str) -> None:
                if number == chosen:
                    os.kill(os.getpid(), signal.SIGKILL)

            count_operations(output, act)
            work()

        return f"operation {chosen} ({where})", wait(fork(bombed))
    if kind == "system-call":
        call = draw.choice(sorted(reference.calls))
        chosen = draw.randint(1, reference.calls[call])
        options = [f"-etrace={call}", f"-einject={call}:signal=SIGKILL:when={chosen}"]
        return f"{call} {chosen}", wait(under_strace(work, options, place / "trace"))
    after = draw.uniform(0, reference.seconds)
    child = fork(work)
    time.sleep(after)
    os.kill(child, signal.SIGKILL if kind == "time" else signal.SIGINT)
    return f"{after:.3f} s", wait(child)


def trial(kind: str, reference: Reference, number: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """One run with its kills; the last one carries the outcome."""
    output = reference.place / "run"
    shutil.rmtree(output, ignore_errors=True)
    strikes = []
    for _ in range(2 if number % 3 == 0 else 1):
        where, code = strike(kind, reference, output, draw)
        struck = code in (-signal.SIGKILL, 130, -signal.SIGINT)
        log = output / "log.jsonl"
        begun = log.is_file() and log.stat().st_size > 0
        strikes.append({"where": where, "struck": struck, "exit": code, "state": state(output)})
        if kind == "stop" and code == 130 and begun and not saved(output):
            strikes[-1]["saved_nothing"] = True
    code = wait(fork(lambda: run(reference.place, output, reference.method)))
    outcome = "lost" if code else "same" if digest(output) == reference.result else "different"
    if outcome == "different":
        shutil.copytree(output, reference.place / f"different-{kind}-{number}")
    for strike_ in strikes:
        yield {"method": reference.method, "kind": kind, **strike_, "outcome": outcome}


def state(output: Path) -> str:
    """How far a run had come."""
    folder = RunFolder(output)
    steps = [
        ("finished", folder.metrics_file),
        ("weights saved", folder.adapter),
        ("training", folder.plan_file),
        ("at the prune", folder.warm_start),
        ("estimation", folder.estimation),
        ("training", folder.checkpoints),
        ("begun", folder.recipe_file),
    ]
    return next((name for name, there in steps if there.exists()), "nothing written")


def saved(output: Path) -> bool:
    """Whether there is something to go on from."""
    folder = RunFolder(output)
    return folder.adapter.is_dir() or any(
        newest_complete(place)[0] is not None for place in (folder.checkpoints, folder.estimation)
    )


def digest(output: Path) -> dict[str, Any]:
    """Everything that must not depend on whether a run was interrupted."""
    folder = RunFolder(output)
    files = [*folder.adapter.glob("*.safetensors"), *folder.pruning.glob("*"), folder.predictions_file]
    lines = [json.loads(line) for line in folder.log_file.read_text().splitlines()]
    metrics = folder.metrics() or {}
    metrics.pop("speed")
    for of_the_process in ("peak_bytes", "process_bytes_before_model"):
        metrics["memory"].pop(of_the_process)
    return {
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)},
        "log": [{key: value for key, value in line.items() if key != "step_seconds"} for line in lines],
        "metrics": metrics,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and everything that went wrong."""
    struck = [row for row in rows if row["struck"]]
    return {
        "struck": len(struck),
        "lost": sum(row["outcome"] == "lost" for row in rows),
        "different": sum(row["outcome"] == "different" for row in rows),
        "stops_that_saved_nothing": sum(row.get("saved_nothing", False) for row in rows),
        "by_method": dict(Counter(row["method"] for row in struck)),
        "by_kind": dict(Counter(row["kind"] for row in struck)),
        "by_state": dict(Counter(row["state"] for row in struck)),
        "wrong": [row for row in rows if row["outcome"] != "same" or row.get("saved_nothing")],
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--kills", type=int, default=16, help="runs of each kind and method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    place = Path(tempfile.mkdtemp(prefix="crash-"))
    os.environ["HF_DATASETS_CACHE"] = str(place / "cache")
    import datasets

    datasets.config.HF_DATASETS_CACHE = place / "cache"
    # in a child: what computes may start threads, which a fork would lose
    assert wait(fork(lambda: prepare(place))) == 0
    draw, rows = random.Random(given.seed), []
    kinds = given.kinds.split(",")
    for method in given.methods.split(","):
        reference = Reference(place, method)
        if "system-call" in kinds:
            reference.count_calls()
        for kind in kinds:
            for number in range(given.kills):
                rows += trial(kind, reference, number, draw)
        told = summary([row for row in rows if row["method"] == method])
        print(method, {key: told[key] for key in ("struck", "lost", "different")}, flush=True)
    result = {"versions": versions(), "seed": given.seed, **summary(rows), "strikes": rows}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("strikes", "versions")}))
    wrong = bool(result["wrong"])
    if not wrong:
        shutil.rmtree(place)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
