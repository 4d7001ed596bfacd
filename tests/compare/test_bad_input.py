"""Each mistake gets one clear line and exit code 2, and nothing is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from leantune import cli
from leantune.recipes import yaml
from leantune.run.folder import RunFolder
from tests.run.support import recipe


@pytest.mark.filterwarnings("default")
def test_the_command_line_exits_with_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    bert_folder: Path,
    data_folder: Path,
) -> None:
    out = tmp_path / "out"
    made = recipe(bert_folder, data_folder, tmp_path / "run")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.dump(made.to_dict()))
    taken, other, a_run = tmp_path / "taken", tmp_path / "other", tmp_path / "a-run"
    for folder in (taken, other, a_run / "lora-0"):
        folder.mkdir(parents=True)
    (taken / "thesis.txt").write_text("years of work")
    (other / "compare.json").write_text('{"schema": 0}')
    (a_run / "compare.json").write_text(json.dumps({"schema": 1}))
    RunFolder(a_run / "lora-0").begin(made, overwrite=False)
    to = ["--out", str(out)]
    cases = [
        (["no.yaml"], "no.yaml: no such file"),
        ([str(file), "train.epohs=1", *to], "did you mean epochs?"),
        ([str(file), "data.path=nowhere", *to], "data.path = 'nowhere': no such file or folder here"),
        ([str(file), "--methods", "lroa", *to], "methods: 'lroa' is unknown; did you mean lora?"),
        ([str(file), "--seeds", "0", *to], "seeds = 0: must be a whole number above 0"),
        ([str(file), "--lr", "lora", *to], "lr: 'lora' is not METHOD=VALUE"),
        ([str(file), "--lr", "loar=1e-3", *to], "lr: 'loar' is not compared"),
        ([str(file), "--methods", "lora,recipe,lamda", *to], "'recipe' and 'lamda' are the same run"),
        ([str(file), "--out", str(taken)], "the folder is not empty and holds no comparison"),
        ([str(file), "--out", str(file)], "is a file"),
        ([str(file), "--out", str(other)], "not a comparison of this release"),
        (
            [str(file), "--methods", "lora", "--out", str(a_run)],
            "holds a run of another recipe (lean.adapter",
        ),
    ]
    for arguments, said in cases:
        monkeypatch.setattr(sys, "argv", ["leantune", "compare", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2, arguments
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error and len(error.splitlines()) == 1, error
    assert not out.exists() and [path.name for path in taken.iterdir()] == ["thesis.txt"]
