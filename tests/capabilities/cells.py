"""What a method can do on an architecture, found out by doing it: one cell of the capability table.

    examine("lora+tokentune", "llama", "causal-lm", folder)  ->  {"resume": True, "export merged": True, …}

The table in `leantune methods` and the README is written from these (`python scripts/capabilities.py`), and
tests do the same again and compare.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import leantune
from leantune.errors import UserError
from leantune.recipes import Recipe
from leantune.run import Interrupted, lean
from leantune.run.folder import RunFolder
from tests.conftest import make_tokenizer, requests, write_jsonl
from tests.run.support import SETTINGS, quiet, recipe
from tests.tiny_models import tiny
from tests.together import together

# Architecture, task; the first three shapes stand for encoder, decoder and both.
FAMILIES: tuple[tuple[str, str], ...] = (
    ("bert", "classification"),
    ("llama", "causal-lm"),
    ("bart", "seq2seq"),
    ("deberta-v3", "classification"),
    ("bart", "classification"),
)
STEPS, STOP = 6, 3


@dataclass(frozen=True)
class Cell:
    """A method on an architecture, with the run that all abilities start from."""

    method: str
    task: str
    base: Path
    rows: Path
    place: Path

    def recipe(self, name: str, **train: Any) -> Recipe:
        """A recipe of six steps (and three of estimation), with a checkpoint in the middle."""
        settings = dict(SETTINGS[self.method]) | train.pop("lean", {})
        if "prune" in settings:
            settings["prune"] = {**settings["prune"], "estimate_steps": STOP}
        model = {"task": self.task} | train.pop("model", {})
        train = {"steps": STEPS, "epochs": 2, "batch_size": 8, **train}
        return recipe(self.base, self.rows, self.place / name, settings, model=model, train=train)

    @property
    def whole(self) -> Path:
        """The uninterrupted run."""
        folder = self.place / "whole"
        if not (folder / "metrics.json").is_file():
            leantune.train(self.recipe("whole"), console=quiet())
        return folder


def build(method: str, family: str, task: str, place: Path) -> Cell:
    """Tiny model, tokenizer and data on disk."""
    base, rows = place / "base", place / "rows"
    for folder in (base, rows):
        folder.mkdir(parents=True)
    tiny(family, task, dtype=torch.float32).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    for number, (split, count) in enumerate((("train", 40), ("test", 8))):
        made = requests(count, number)
        if task != "classification":
            made = [{"prompt": row["text"], "completion": "my " + row["text"]} for row in made]
        write_jsonl(rows / f"{split}.jsonl", made)
    return Cell(method, task, base, rows, place)


def _trains(cell: Cell) -> None:
    """Losses are finite, and what was saved says the same when it is opened again."""
    run = RunFolder(cell.whole)
    metrics = run.metrics()
    assert metrics is not None
    assert all(math.isfinite(value) for value in metrics["evaluation"]["test"].values())
    assert leantune.evaluate(cell.whole) == metrics["evaluation"]
    assert leantune.predict(cell.whole, ["my card has not arrived"])[0].predicted is not None


class _StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOP:
            os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def _stopping() -> Iterator[None]:
    needed = lean.callbacks
    lean.callbacks = lambda recipe: [_StopAt(), *needed(recipe)]
    try:
        yield
    finally:
        lean.callbacks = needed


def _resume(cell: Cell) -> None:
    """Stopped in the middle and resumed, the weights are those of the run that was not, bit for bit."""
    made = cell.recipe("stopped")
    with _stopping():
        try:
            leantune.train(made, console=quiet())
        except Interrupted:
            pass
        else:
            raise AssertionError("the run did not stop")
    leantune.train(made, resume=True, console=quiet())
    one, other = (
        load_file(next(RunFolder(folder).saved_weights().glob("*.safetensors")))
        for folder in (cell.whole, cell.place / "stopped")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (
        RunFolder(cell.whole).metrics()["evaluation"]
        == RunFolder(cell.place / "stopped").metrics()["evaluation"]
    )  # type: ignore[index]


def _bf16(cell: Cell) -> None:
    made = cell.recipe("bf16", steps=2, model={"dtype": "bfloat16"})
    found = leantune.train(made, console=quiet()).metrics["evaluation"]["test"]
    assert all(math.isfinite(value) for value in found.values())


def _checkpointing(cell: Cell) -> None:
    """Adapters are really trained, and less is kept for the backward pass."""
    made = cell.recipe("ckpt", steps=2, gradient_checkpointing=True)
    run = leantune.train(made, console=quiet())
    plain = RunFolder(cell.whole).metrics()
    assert plain is not None
    assert run.metrics["memory"]["saved_activation_bytes"] < plain["memory"]["saved_activation_bytes"]
    steps = [
        line for line in leantune.run.callbacks.read_log(run.folder / "log.jsonl") if "grad_norm" in line
    ]
    assert all(line["grad_norm"] > 0 for line in steps)


def _accumulation(cell: Cell) -> None:
    """Four micro-batches are a step: its loss is of the size of one batch's (dropout and choice differ)."""
    made = cell.recipe("accumulated", steps=2, batch_size=2, gradient_accumulation_steps=4)
    run = leantune.train(made, console=quiet())
    one, four = (
        next(line["loss"] for line in leantune.run.callbacks.read_log(folder / "log.jsonl") if "loss" in line)
        for folder in (cell.whole, run.folder)
    )
    assert 0.5 < four / one < 2


def _quantised(cell: Cell) -> None:
    """Trained on a base in 8 bits, and the same when it is opened again (4 bits want wider layers)."""
    run = leantune.train(cell.recipe("int8", steps=2, lean={"quantize": "int8"}), console=quiet())
    assert run.metrics["parameters"]["quantized"] > 0
    assert leantune.evaluate(run.folder) == run.metrics["evaluation"]


def _in_team(made: Recipe) -> dict[str, Any]:
    return leantune.train(made, console=quiet()).metrics


def _ddp(cell: Cell) -> None:
    """Two processes (gloo, DDP) with half the batch each train, and what they saved opens again."""
    made = cell.recipe("ddp", batch_size=4)
    metrics, nothing = together(2, _in_team, made)
    assert metrics["processes"] == 2 and not nothing
    assert all(math.isfinite(value) for value in metrics["evaluation"]["test"].values())
    assert leantune.evaluate(made.output) == metrics["evaluation"]


def _fsdp(cell: Cell) -> None:
    """The same with FSDP2: the parameters are pieces while they are trained."""
    made = cell.recipe("fsdp", batch_size=4, fsdp=True)
    (metrics, sharded), _ = together(2, _in_sharded_team, made)
    assert metrics["processes"] == 2 and sharded
    assert leantune.evaluate(made.output) == metrics["evaluation"]


class _Sharded(TrainerCallback):
    found = False

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.found = all(hasattr(parameter, "placements") for parameter in model.parameters())


def _in_sharded_team(made: Recipe) -> tuple[dict[str, Any], bool]:
    needed, look = lean.callbacks, _Sharded()
    lean.callbacks = lambda recipe: [look, *needed(recipe)]
    return _in_team(made), look.found


def _export(kind: str) -> Callable[[Cell], None]:
    def export(cell: Cell) -> None:
        leantune.export(cell.whole, kind, cell.place / kind)

    return export


# In the order of the table's columns; each raises what is wrong, a UserError where it is refused.
ABILITIES: dict[str, Callable[[Cell], None]] = {
    "train": _trains,
    "resume": _resume,
    "bf16": _bf16,
    "checkpointing": _checkpointing,
    "accumulation": _accumulation,
    "ddp": _ddp,
    "fsdp": _fsdp,
    "quantised": _quantised,
    "export lora": _export("lora"),
    "export merged": _export("merged"),
    "export pruned": _export("pruned"),
}
# Abilities that are tried on some architectures alone; the table says so.
TRIED_ON: dict[str, tuple[tuple[str, str], ...]] = {"ddp": FAMILIES[1:2], "fsdp": FAMILIES[1:3]}


def abilities_on(family: str, task: str) -> tuple[str, ...]:
    """What is tried on an architecture, in the table's order."""
    return tuple(name for name in ABILITIES if (family, task) in TRIED_ON.get(name, FAMILIES))


def examine(
    method: str, family: str, task: str, place: Path, abilities: Sequence[str] | None = None
) -> dict[str, bool | str]:
    """Try abilities in turn.

    Args:
        method: A key of `SETTINGS`.
        family: Architecture, as in tests/tiny_models.
        task: Of the recipe.
        place: A folder that is not there yet.
        abilities: Which; default: all that are tried there.

    Returns:
        Ability → True, or the line that refuses it. Anything else that goes wrong is raised.
    """
    cell, found = build(method, family, task, place), dict[str, bool | str]()
    for ability in abilities_on(family, task) if abilities is None else abilities:
        try:
            ABILITIES[ability](cell)
            found[ability] = True
        except UserError as refused:
            found[ability] = str(refused).replace(str(place), "…")
    return found
