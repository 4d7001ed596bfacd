"""Runs on a quantised base."""

from pathlib import Path

import pytest

import leantune
from tests.run.support import quiet, recipe


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int8-torchao"])
@pytest.mark.parametrize("adapter", ["lora", "lamda", "bottleneck"])
def test_all(adapter, kind, bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    made = recipe(
        bert_folder, data_folder, tmp_path / "run", {"adapter": {"type": adapter, "r": 4}, "quantize": kind}
    )
    run = leantune.train(made, console=quiet())
    print(run.metrics["parameters"], run.metrics["evaluation"], run.metrics["memory"])
    if adapter != "bottleneck":
        print(leantune.export(run.folder, "merged", tmp_path / "m"))
        print(leantune.export(run.folder, "lora", tmp_path / "l"))
        print((tmp_path / "l/README.md").read_text())
