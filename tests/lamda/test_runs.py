"""Whole runs with what is LaMDA's own: ranks from spectra and a start from data, pruned and not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import leantune
from leantune.errors import UserError
from tests.run.support import quiet, recipe

RANKS = {"budget": 4, "choices": [2, 4, 6, 8]}


def train(base: Path, rows: Path, output: Path, **lean: Any) -> Any:
    return leantune.train(recipe(base, rows, output, lean), console=quiet())


def test_a_pruned_run_with_spectral_ranks_and_a_start_from_data(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks are cut from what each layer had; the second stage and loading compute nothing anew."""
    from leantune.lamda import spectral
    from leantune.run import lean

    calls = []
    for place, name in ((spectral, "leading_spectrum"), (lean, "prepare_lamda")):
        original = getattr(place, name)
        counted = lambda *args, name=name, original=original, **kwargs: (  # noqa: E731
            calls.append(name) or original(*args, **kwargs)
        )
        monkeypatch.setattr(place, name, counted)
    run = train(
        bert_folder,
        data_folder,
        tmp_path / "run",
        adapter={"type": "lamda", "spectral_ranks": RANKS, "init": "activation"},
        prune={"ranks": 0.25, "estimate_steps": 4, "heads": "1/4"},
    )
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert calls.count("prepare_lamda") == 1
    assert calls.count("leading_spectrum") == len(config["spectral_scores"]) == 13
    plan = json.loads((run.folder / "pruning" / "plan.json").read_text())["modules"]
    before = sum(module["rank"] for module in plan.values())
    ranks = config["rank_pattern"].values()
    assert len({module["rank"] for module in plan.values()}) > 1
    assert sum(ranks) == sum(len(module["kept"]) for module in plan.values()) == before - before // 4
    state = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert sorted(v.shape[0] for k, v in state.items() if k.endswith("lamda_S")) == sorted(ranks)
    assert "Ranks by layer" in (run.folder / "report.html").read_text()
    calls.clear()
    assert leantune.load(run.folder)[0] is not None and not calls


def test_token_selection_goes_on_where_it_was(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at the data takes no token choices and no batches away from the training."""
    from leantune.run import lean

    adapter = {"type": "lamda", "r": 4, "init": "gradient"}
    prepare, first = lean.prepare_lamda, {}
    for times in (1, 3):

        def repeated(model: Any, batches: Any, *args: Any, times: int = times, **options: Any) -> None:
            batches = list(batches)
            for _ in range(times):
                prepare(model, batches, *args, **options)

        monkeypatch.setattr(lean, "prepare_lamda", repeated)
        folder = tmp_path / str(times)
        train(bert_folder, data_folder, folder, adapter=adapter, tokens={"keep": 0.5})
        first[times] = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["loss"]
    assert first[1] == first[3]  # of the first step: the adapter is zero, so its start does not matter


def test_a_start_that_cannot_be_had_is_one_line(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    for adapter, words in (
        ({"init": "activation", "init_b": "vectors"}, "init_b='vectors' with init='activation'"),
        ({"spectral_ranks": {"budget": 80}}, "spectral_ranks.choices=.*at most 32"),
        ({"spectral_ranks": RANKS, "rank_pattern": {"query": 2}}, "rank_pattern and spectral"),
    ):
        with pytest.raises(UserError, match=f"lean.adapter: {words}"):
            train(bert_folder, data_folder, tmp_path / "run", adapter={"type": "lamda", **adapter})
        assert not (tmp_path / "run").exists()
