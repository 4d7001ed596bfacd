"""The other tasks end to end, data formats, and what the model is really given to learn."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer, EvalPrediction, TrainerCallback

import leantune
from leantune.errors import UserError
from leantune.recipes import DataRecipe, Recipe
from leantune.run import Interrupted, lean
from leantune.run.data import open_splits
from leantune.run.tasks import CausalLM, make_task
from leantune.tokentune import ChoosingCollator
from tests.conftest import WORDS, requests, write_jsonl
from tests.run.support import SETTINGS, quiet, recipe

LM: dict[str, Any] = {"model": {"task": "causal-lm"}}


def test_regression_of_pairs(bert_folder: Path, tmp_path: Path) -> None:
    rows = [{"a": row["text"], "b": "my card", "score": row["value"]} for row in requests(40, 0)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[:10])
    made = recipe(
        bert_folder, tmp_path, tmp_path / "run",
        model={"task": "regression"},
        data={"text": "a", "text_pair": "b", "label": "score"},
        train={"steps": 3},
    )  # fmt: skip
    run = leantune.train(made, console=quiet())
    assert run.metrics["evaluation"]["test"].keys() == {"loss", "pearson", "spearman", "mean_squared_error"}
    said = leantune.predict(run.folder, [("my card", "your card")])[0]
    assert isinstance(said.predicted, float)
    with pytest.raises(UserError, match="takes pairs of texts"):
        leantune.predict(run.folder, ["one"])


@pytest.mark.parametrize("method", ["lamda", "lora", "full"])
@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("text", {"text": "my card has not arrived yet please"}),
        ("prompt-completion", {"prompt": "my card has", "completion": " not arrived"}),
        ("alpaca", {"instruction": "my card", "input": "", "output": "has arrived"}),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "my card"},
                    {"role": "assistant", "content": "has arrived"},
                ]
            },
        ),
    ],
)
def test_causal_lm_runs(
    form: str, row: dict[str, Any], method: str, llama_folder: Path, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "train.jsonl", [row] * 12)
    write_jsonl(tmp_path / "test.jsonl", [row] * 3)
    made = recipe(llama_folder, tmp_path, tmp_path / "run", SETTINGS[method], train={"steps": 2}, **LM)
    run = leantune.train(made, console=quiet())
    found = run.metrics["evaluation"]["test"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert leantune.evaluate(run.folder) == run.metrics["evaluation"]
    if form == "text":
        assert isinstance(leantune.predict(run.folder, ["my card"])[0].predicted, str)
        assert leantune.export(run.folder, "merged", tmp_path / "merged").max_abs_difference < 1e-5


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_chosen_tokens_are_counted_over_all_micro_batches(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice is made where batches are: known before they are counted, and the same after a resume."""
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(3, 20)))} for _ in range(24)]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    chosen: dict[str, list[int]] = {"whole": [], "stopped": []}

    def made(name: str) -> Recipe:
        train = {"epochs": 2, "batch_size": 3, "gradient_accumulation_steps": 2}
        return recipe(
            llama_folder, tmp_path, tmp_path / name, SETTINGS["lora+tokentune"],
            data={"pack": False}, train=train, **LM,
        )  # fmt: skip

    def watch(name: str) -> None:
        inner = ChoosingCollator.choose

        def choose(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
            made = inner(self, batch)
            chosen[name].append(int((made["labels"] != -100).sum()))
            return made

        monkeypatch.setattr(ChoosingCollator, "choose", choose)

    with monkeypatch.context() as monkeypatch:
        watch("whole")
        leantune.train(made("whole"), console=quiet())
    assert len(chosen["whole"]) == 16  # 2 epochs of 8 batches; evaluation chooses nothing
    needed = lean.callbacks
    with monkeypatch.context() as patched:
        patched.setattr(lean, "callbacks", lambda recipe: [_Stop(), *needed(recipe)])
        with pytest.raises(Interrupted):
            leantune.train(made("stopped"), console=quiet())
    leantune.train(made("stopped"), resume=True, console=quiet())
    one, other = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in chosen)
    assert all(torch.equal(one[key], other[key]) for key in one)


def encode(
    llama_folder: Path, rows: list[dict[str, Any]], max_length: int = 64, **data: Any
) -> list[dict[str, Any]]:
    made = recipe(llama_folder, Path("unused"), Path("unused"), data=data, **LM)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    encoded = make_task(made).encode(Dataset.from_list(rows), tokenizer, max_length, "the train split")
    return [dict(row) for row in encoded]


def learned(row: dict[str, Any], tokenizer: Any) -> str:
    return tokenizer.decode(
        [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    )


def test_prompts_are_masked(llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    row = encode(llama_folder, [{"prompt": "my card has", "completion": "not arrived"}])[0]
    assert tokenizer.decode(row["input_ids"]) == "my card has not arrived [SEP]"
    assert learned(row, tokenizer) == "not arrived [SEP]"
    chat = [
        {"role": "user", "content": "my card"},
        {"role": "assistant", "content": "has arrived"},
        {"role": "user", "content": "not yet"},
        {"role": "assistant", "content": "please"},
    ]
    row = encode(llama_folder, [{"messages": chat}])[0]
    assert learned(row, tokenizer) == "has arrived [SEP] please [SEP]"
    row = encode(llama_folder, [{"instruction": "my card", "input": "lost", "output": "found"}])[0]
    assert learned(row, tokenizer) == "found [SEP]"


def test_long_rows_keep_their_answer(llama_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    rows = [{"prompt": "the " * 50 + "card", "completion": "not arrived"}]
    row = encode(llama_folder, rows, max_length=6)[0]
    assert tokenizer.decode(row["input_ids"]) == "the the card not arrived [SEP]"
    assert learned(row, tokenizer) == "not arrived [SEP]"
    row = encode(llama_folder, [{"prompt": "my card", "completion": "the " * 50}], max_length=6)[0]
    assert len(row["input_ids"]) == 6 and row["labels"][:1] == [-100] and row["labels"].count(-100) == 1


def test_raw_text_is_packed_or_not(llama_folder: Path) -> None:
    rows = [{"text": "my card"}, {"text": ""}, {"text": "the cash is lost"}]
    packed = encode(llama_folder, rows, max_length=5)
    assert [len(row["input_ids"]) for row in packed] == [5, 4]
    single = encode(llama_folder, rows, max_length=5, pack=False)
    assert [len(row["input_ids"]) for row in single] == [3, 5]
    assert all(row["labels"] == row["input_ids"] for row in packed + single)


def test_lm_metrics_count_tokens_not_batches() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 7, 11), torch.randint(0, 11, (4, 7))
    labels[0, :5] = -100
    labels[2] = -100
    task = CausalLM.__new__(CausalLM)
    parts = [task.reduce_logits(logits[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    found = task.metrics(EvalPrediction(predictions=torch.cat(parts).numpy(), label_ids=labels.numpy()))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("row", "data", "said"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "no turn of the assistant"),
        ({"messages": "hello"}, {}, "must be a list of turns"),
        ({"prompt": 3, "completion": "a"}, {}, "column 'prompt' is 3, not text"),
        ({"body": "a"}, {}, "no known format in its columns (body)"),
        ({"text": "a"}, {"format": "alpaca"}, "has no column instruction, output"),
        ({"a": "x", "b": "y"}, {"prompt": "a"}, "belong together"),
        ({"text": None}, {}, "column 'text' is None, not text"),
    ],
)
def test_rows_that_cannot_be_learned_from(row: Any, data: Any, said: str, llama_folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        encode(llama_folder, [row], **data)
    assert said in str(caught.value)


def test_chat_needs_a_template(bert_folder: Path) -> None:
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match="chat template"):
        encode(bert_folder, [{"messages": turn}])


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_every_file_kind_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    rows = requests(6, 0)
    table = Dataset.from_list(rows)
    file = tmp_path / f"train.{ending}"
    if ending == "csv":
        table.to_csv(file)
    elif ending == "parquet":
        table.to_parquet(file)
    elif ending == "json":
        file.write_text(json.dumps(rows))
    else:
        table.to_json(file, compression="gzip" if ending.endswith("gz") else None)
    splits = open_splits(DataRecipe(path=str(tmp_path)), seed=0)
    assert splits["train"].to_list() == rows
    assert open_splits(DataRecipe(path=str(file)), seed=0)["train"].to_list() == rows


def test_splits_are_sampled_the_same_way_each_time(data_folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", requests(50, 0))
    wanted = DataRecipe(path=str(tmp_path), validation_fraction=0.2, train_rows=20)
    one, two, other = (open_splits(wanted, seed=seed) for seed in (0, 0, 1))
    assert {name: len(split) for name, split in one.items()} == {"train": 20, "validation": 10}
    assert one["train"].to_list() == two["train"].to_list() != other["train"].to_list()
    assert one["validation"].to_list() == other["validation"].to_list(), "seeds are compared on the same rows"


def test_integer_bool_and_hidden_labels(bert_folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "my card", "label": i % 3 * 5} for i in range(12)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "my card", "label": -1} for _ in range(3)])
    console = quiet()
    run = leantune.train(recipe(bert_folder, tmp_path, tmp_path / "run", train={"steps": 1}), console=console)
    assert "the test split has no labels: it is left out" in console.file.getvalue()  # type: ignore[attr-defined]
    assert leantune.load(run.folder)[0].config.id2label == {0: "0", 1: "5", 2: "10"}
    assert run.metrics["evaluation"] == {}
