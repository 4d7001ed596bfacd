"""Sequence to sequence: what is read and written, what a step's loss is divided by, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import leantune
from leantune.errors import UserError
from leantune.run.callbacks import read_log
from leantune.run.tasks import make_task
from tests.conftest import make_tokenizer, write_jsonl
from tests.run.support import SETTINGS, quiet, recipe
from tests.tiny_models import tiny

S2S: dict[str, Any] = {"model": {"task": "seq2seq"}}
ROWS = [
    {"prompt": "my card has not arrived yet please", "completion": "card"},
    {"prompt": "the cash", "completion": "cash is lost my money is late early found"},
    {"prompt": "a pin", "completion": "your pin was found"},
    {"prompt": "transfer late late", "completion": "transfer not late is early"},
]

pytestmark = pytest.mark.filterwarnings("ignore")  # tiny tokenizers and models disagree on special tokens


@pytest.fixture(scope="module", params=["bart", "t5"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny(request.param, "seq2seq", dtype=torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "test.jsonl", ROWS[:3])
    return folder


def test_prompts_are_read_and_answers_written(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    made = recipe(base, Path("unused"), Path("unused"), **S2S)
    task = make_task(made)
    encoded = task.encode(Dataset.from_list(ROWS), tokenizer, 8, "the train split")
    assert tokenizer.decode(encoded[0]["input_ids"]) == "[CLS] my card has not arrived yet [SEP]"  # cut to 8
    assert tokenizer.decode(encoded[0]["labels"]) == "[CLS] card [SEP]"
    batch = task.collator(tokenizer)([dict(row) for row in encoded])
    assert (batch["labels"][0] == -100).sum() == batch["labels"].size(1) - 3


def test_metrics_are_of_answers_token_by_token(base: Path, rows: Path, tmp_path: Path) -> None:
    run = leantune.train(
        recipe(base, rows, tmp_path / "run", SETTINGS["lora"], train={"steps": 2}, **S2S), console=quiet()
    )
    found = run.metrics["evaluation"]["test"]
    model, tokenizer = leantune.load(run.folder)
    loss, count = 0.0, 0
    for row in ROWS[:3]:  # one by one: no padding can be in it
        labels = tokenizer(row["completion"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model(**tokenizer(row["prompt"], return_tensors="pt"), labels=labels)
        loss, count = loss + out.loss.item() * labels.numel(), count + labels.numel()
    assert found["loss"] == pytest.approx(loss / count, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    said = leantune.predict(run.folder, ["my card", "the cash is late"])
    assert all(isinstance(one.predicted, str) for one in said)


@pytest.mark.parametrize("method", ["full", "tokentune"])
def test_micro_batches_enter_by_their_tokens(method: str, base: Path, rows: Path, tmp_path: Path) -> None:
    """Answers of 1 to 8 tokens: two micro-batches of two rows are one batch of four, to rounding."""
    lean = dict(SETTINGS[method])
    if "tokens" in lean:
        lean["tokens"] = {"keep": 1.0}  # all tokens: which are chosen cannot differ
    same = {"steps": 1, "train_sampling_strategy": "sequential"}
    logs = []
    for name, train in (
        ("one", {**same, "batch_size": 4}),
        ("two", {**same, "batch_size": 2, "gradient_accumulation_steps": 2}),
    ):
        leantune.train(recipe(base, rows, tmp_path / name, lean, train=train, **S2S), console=quiet())
        logs.append(next(line for line in read_log(tmp_path / name / "log.jsonl") if "loss" in line))
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)


def test_raw_text_is_refused(base: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "my card"}])
    with pytest.raises(UserError, match="seq2seq wants what is read and what is written apart"):
        leantune.train(recipe(base, tmp_path, tmp_path / "run", **S2S), console=quiet())


def test_a_decoder_is_refused(llama_folder: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.path = .*the model cannot be opened"):
        leantune.train(recipe(llama_folder, rows, tmp_path / "run", **S2S), console=quiet())
