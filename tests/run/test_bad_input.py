"""Each mistake gets one clear line, and nothing is written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import leantune
from leantune.errors import UserError
from leantune.recipes import yaml
from tests.conftest import requests, write_jsonl
from tests.run.support import quiet, recipe


def complaint(output: Path, made: Any) -> str:
    with pytest.raises(UserError) as caught:
        leantune.train(made, console=quiet())
    assert not output.exists(), "nothing may be written"
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


def folder_with(tmp_path: Path, **splits: Any) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in splits.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


GOOD = requests(20, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"data": {"text": "txt"}},
            "data.text = 'txt': the train split has no such column; did you mean text?",
        ),
        ({"data": {"label": "labl"}}, "data.label = 'labl': the train split has no such column"),
        (
            {"data": {"path": "no/such/folder/here"}},
            "data.path = 'no/such/folder/here': no such file or folder",
        ),
        ({"data": {"max_length": 1000}}, "data.max_length = 1000: the model reads at most 64 tokens"),
        ({"data": {"validation_fraction": 0.5}}, "the data has a validation split of its own"),
        (
            {"model": {"path": "bundled:nothing"}},
            "model.path = 'bundled:nothing': accepted are bundled:minilm",
        ),
        (
            {"model": {"path": "x/model.gguf"}},
            "model.path = 'x/model.gguf': no such file",
        ),
        ({"model": {"path": "./nowhere"}}, "model.path = './nowhere': no such folder"),
        ({"lean": {"adapter": {"type": "lamda", "r": 33}}}, "r=33 is above the size of layer"),
        (
            {"lean": {"adapter": {"type": "lamda", "r": 4, "target_modules": ["q_prj"]}}},
            "lean.adapter.target_modules = ['q_prj']: matches no layer of the model (its layers: query, key",
        ),
        (
            {"lean": {"adapter": {"type": "lora", "r": 4, "target_modules": ["q_prj"]}}},
            "lean.adapter.target_modules = ['q_prj']: matches no layer",
        ),
        (
            {"train": {"lr_scheduler_type": "linaer"}},
            "train.lr_scheduler_type = 'linaer': linaer is not a valid",
        ),
        ({"train": {"warmup_steps": "many"}}, "train"),
        ({"model": {"attention": "flash_attention_2"}}, "model.path"),
    ],
)
def test_recipes_that_do_not_fit(
    changes: dict[str, Any], said: str, bert_folder: Path, data_folder: Path, output: Path
) -> None:
    assert said in complaint(output, recipe(bert_folder, data_folder, output, **changes))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "the train split is empty"),
        (
            [*GOOD, {"text": None, "label": "card_lost"}],
            "the train split, row 20: column 'text' is None, not text",
        ),
        ([{"text": "a", "label": "x"}] * 4, "only one label in the train split ('x')"),
        ([*GOOD, {"text": "a", "label": None}], "None is no class label"),
        ([{"text": "a", "label": 0.5}, {"text": "a", "label": 1.5}], "0.5 is no class label"),
        ([{"body": "a", "label": "x"}, {"body": "b", "label": "y"}], "data.text is missing: name the column"),
        (
            [{"text": "a", "class": "x"}, {"text": "b", "class": "y"}],
            "data.label is missing: name the column",
        ),
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": "y"}],
            "labels of different types: 1 (int) and 'y' (str)",
        ),
    ],
)
def test_rows_that_do_not_fit(rows: Any, said: str, bert_folder: Path, tmp_path: Path, output: Path) -> None:
    data = folder_with(tmp_path, train=rows)
    assert said in complaint(output, recipe(bert_folder, data, output))


def test_a_label_outside_the_set(bert_folder: Path, tmp_path: Path, output: Path) -> None:
    data = folder_with(tmp_path, train=GOOD, test=[{"text": "a", "label": "card_lots", "value": 1.0}])
    said = complaint(output, recipe(bert_folder, data, output))
    assert "the test split, row 0, column 'label': label 'card_lots' is not among" in said
    assert "did you mean 'card_lost'?" in said


def test_files_that_cannot_be_read(bert_folder: Path, tmp_path: Path, output: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    assert "holds no train, validation or test file" in complaint(output, recipe(bert_folder, data, output))
    (data / "train.jsonl").write_bytes(b'{"text": "\xff\xfe", "label": "x"}\n')
    assert "train.jsonl: not UTF-8 text" in complaint(output, recipe(bert_folder, data, output))
    (data / "train.jsonl").unlink()
    (data / "train.jsonl.gz").write_bytes(gzip.compress(b"{")[:-6])
    assert "train.jsonl.gz: cannot be read: " in complaint(output, recipe(bert_folder, data, output))
    (data / "train.csv").write_text("text,label\na,b\n")
    assert "the train split is there twice" in complaint(output, recipe(bert_folder, data, output))
    single = tmp_path / "rows.xml"
    single.write_text("<a/>")
    assert "the file's ending is none of" in complaint(output, recipe(bert_folder, single, output))
    (tmp_path / "test.jsonl").write_text(json.dumps(GOOD[0]) + "\n")
    only_test = recipe(bert_folder, tmp_path / "test.jsonl", output)
    assert "no train split (found: test)" in complaint(output, only_test)


def test_half_a_launcher_is_refused(
    bert_folder: Path, data_folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE = 2, but no RANK" in complaint(output, recipe(bert_folder, data_folder, output))


def test_libraries_do_not_chatter(
    bert_folder: Path, tmp_path: Path, output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """datasets logs what it cannot read; the one line says it already."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text('text,label\na,b,c,d\ne,f\n"')
    assert "train.csv: cannot be read as csv: " in complaint(
        output, recipe(bert_folder, tmp_path / "data", output)
    )
    (tmp_path / "data" / "train.csv").unlink()
    (tmp_path / "data" / "train.jsonl.gz").write_bytes(gzip.compress(b""))
    assert "cannot be read as json: " in complaint(output, recipe(bert_folder, tmp_path / "data", output))
    assert "Failed to read" not in capfd.readouterr().err


def test_damaged_configs_and_tokenizers_say_so(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    leantune.train(recipe(bert_folder, data_folder, tmp_path / "run", train={"steps": 1}), console=quiet())
    (tmp_path / "run" / "adapter" / "manifest.json").unlink()
    for name, said in (("config.json", "the config cannot be opened"), ("tokenizer.json", "the tokenizer")):
        file = tmp_path / "run" / "adapter" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=said) as caught:
            leantune.load(tmp_path / "run")
        assert len(str(caught.value).splitlines()) == 1
        file.write_bytes(content)


def test_long_values_are_cut_in_messages(bert_folder: Path, data_folder: Path, output: Path) -> None:
    with pytest.raises(UserError, match=r"train.seed = 'xxx.*… \(100,002 characters\)") as caught:
        recipe(bert_folder, data_folder, output, train={"seed": "x" * 100_000})
    assert len(str(caught.value)) < 400
    for override in ("=" + "x" * 9000, "train.seed=[" + "x" * 9000, "train." + "x" * 9000 + "=1"):
        with pytest.raises(UserError) as caught:
            leantune.Recipe.load("recipes/banking77.yaml", override)
        assert len(str(caught.value)) < 600


def test_regression_targets_must_be_numbers(bert_folder: Path, tmp_path: Path, output: Path) -> None:
    data = folder_with(tmp_path, train=[{"text": "a", "label": "0.5"}, {"text": "b", "label": "much"}])
    made = recipe(bert_folder, data, output, model={"task": "regression"})
    assert "the train split, row 1, column 'label': 'much' is no number" in complaint(output, made)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    import sys

    from leantune import cli

    monkeypatch.setattr(sys, "argv", ["leantune", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.filterwarnings("default")
def test_the_command_line_exits_with_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    bert_folder: Path,
    data_folder: Path,
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.dump(recipe(bert_folder, data_folder, tmp_path / "run").to_dict()))
    cases = [
        (["train", "no.yaml"], "no.yaml: no such file"),
        (["train", str(file), "train.epohs=1"], "did you mean epochs?"),
        (["train", str(file), "train.epohs=1", "--processes", "2"], "did you mean epochs?"),
        (["train", str(file), "--resume", "--overwrite"], "exclude each other"),
        (["train", str(file), "data.path=nowhere"], "no such file or folder here"),
        (["evaluate", str(tmp_path / "none")], "no such run folder"),
        (["evaluate", str(data_folder)], "not a run folder"),
        (["predict", str(data_folder), "hello"], "not a run folder"),
        (["predict", str(tmp_path)], "give one TEXT, or --file F"),
        (["export", str(data_folder), "--to", "lora", "--out", str(tmp_path / "x")], "not a run folder"),
        (["export", str(tmp_path), "--to", "onnx", "--out", str(tmp_path / "x")], "accepted are lora"),
    ]
    for arguments, said in cases:
        assert run_cli(monkeypatch, *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
        assert len(error.splitlines()) == 1
    assert run_cli(monkeypatch, "trian") == 2
    assert not (tmp_path / "run").exists()


def test_an_unfinished_run_says_so(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    from leantune.run.folder import RunFolder

    RunFolder(tmp_path / "run").begin(recipe(bert_folder, data_folder, tmp_path / "run"), overwrite=False)
    with pytest.raises(UserError, match="the run has not finished"):
        leantune.load(tmp_path / "run")


def test_damaged_runs_say_so(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    leantune.train(recipe(bert_folder, data_folder, tmp_path / "run", train={"steps": 1}), console=quiet())
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])  # loads: another number
    with pytest.raises(UserError, match="adapter_model.safetensors is damaged; if .* remove manifest.json"):
        leantune.load(tmp_path / "run")
    (tmp_path / "run" / "adapter" / "manifest.json").unlink()
    leantune.load(tmp_path / "run")
    weights.write_bytes(content[:100])
    with pytest.raises(UserError, match="the adapter cannot be loaded"):
        leantune.load(tmp_path / "run")
    weights.write_bytes(content)
    (tmp_path / "run" / "recipe.yaml").write_text("model: 3\n")
    with pytest.raises(UserError, match="must be a group of keys"):
        leantune.evaluate(tmp_path / "run")
