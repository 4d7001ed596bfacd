"""Checkpoints are complete or absent; a stop saves from every phase; a full disk is one clear line."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import leantune
from leantune.errors import RunError, UserError
from leantune.run import Interrupted, callbacks, checkpoints, folder, lean, trainer
from leantune.run.folder import RunFolder
from tests.run.support import SETTINGS, printed, quiet, recipe


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(RunFolder(run).saved_weights().glob("*.safetensors")))


def without_times(run: Path) -> list[dict[str, Any]]:
    stages = [callbacks.read_log(run / "log.jsonl", stage) for stage in ("estimation", None)]
    return [{**line, "step_seconds": 0} for stage in stages for line in stage]


def assert_same_run(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert without_times(one) == without_times(other)
    metrics = [RunFolder(path).metrics() or {} for path in (one, other)]
    for key in ("evaluation", "parameters", "adapter_bytes", "steps"):
        assert metrics[0][key] == metrics[1][key]


class Interrupt(TrainerCallback):
    """Sends the run a signal when something happens for the n-th time."""

    def __init__(self, event: str, count: int, number: int = signal.SIGINT) -> None:
        self.left, self.number = count, number
        setattr(self, event, self._hit)

    def _hit(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


# (event, count, changes to train): where a stop used to be swallowed, or to cost what no other run lost
PHASES = [
    ("on_step_end", 6, {}),  # an epoch's last step
    ("on_prediction_step", 1, {}),  # in an evaluation
    ("on_log", 13, {}),  # after the last step had looked
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("on_train_begin", 1, {}),
            ("on_log", 6, {}),  # after the stop was looked for, before the epoch's end
            ("on_step_end", 12, {}),  # the last step
            ("on_step_end", 6, {"save_strategy": "steps", "save_steps": 3}),
            ("on_step_end", 6, {"eval_strategy": "steps", "eval_steps": 3}),
            ("on_train_end", 1, {"save_strategy": "no"}),
        )
    ),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path, data_folder: Path) -> Any:
    """Uninterrupted runs, by their changes to `train`."""
    made: dict[str, Path] = {}

    def run(changes: dict[str, Any]) -> Path:
        key = json.dumps(changes)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            settings = SETTINGS["lora"]
            leantune.train(
                recipe(bert_folder, data_folder, made[key], settings, train=changes), console=quiet()
            )
        return made[key]

    return run


@pytest.mark.parametrize(("event", "count", "changes"), PHASES)
def test_a_stop_saves_in_every_phase(
    event: str,
    count: int,
    changes: dict[str, Any],
    whole: Any,
    bert_folder: Path,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LoRA with dropout: random numbers, log and evaluations are those of the run that was not stopped."""
    made = recipe(bert_folder, data_folder, tmp_path / "run", SETTINGS["lora"], train=changes)
    with monkeypatch.context() as patched:
        patched.setattr(lean, "callbacks", lambda recipe: [Interrupt(event, count)])
        with pytest.raises(Interrupted, match="go on with: leantune train"):
            leantune.train(made, console=quiet())
    newest, _ = checkpoints.newest_complete(RunFolder(tmp_path / "run").checkpoints)
    assert newest is not None, "the stop saved nothing"
    assert not (tmp_path / "run" / "metrics.json").exists()
    leantune.train(made, resume=True, console=quiet())
    assert_same_run(whole(changes), tmp_path / "run")


def test_a_stop_at_the_last_step_of_the_estimation(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(bert_folder, data_folder, tmp_path / "run", SETTINGS["lean"])
    with monkeypatch.context() as patched:
        needed = lean.estimation_callbacks
        patched.setattr(
            lean, "estimation_callbacks", lambda recipe: [Interrupt("on_step_end", 4), *needed(recipe)]
        )
        with pytest.raises(Interrupted, match="stopped after step 4"):
            leantune.train(made, console=quiet())
    assert not RunFolder(tmp_path / "run").pruning.exists()
    leantune.train(made, resume=True, console=quiet())
    other = recipe(bert_folder, data_folder, tmp_path / "whole", SETTINGS["lean"])
    leantune.train(other, console=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_stop_outside_training_stops_at_once(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leantune.run import pipeline, preparing

    made = recipe(bert_folder, data_folder, tmp_path / "run")
    for module, name, said in (
        (preparing, "read_inputs", "nothing was written"),
        (pipeline, "evaluate_split", "go on with: leantune"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Interrupted, match=said) as caught:
                leantune.train(made, console=quiet())
        assert caught.value.signal_number == signal.SIGTERM
        assert (tmp_path / "run").exists() == (name == "evaluate_split")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert leantune.train(made, resume=True, console=quiet()).metrics["steps"] == 12


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Path]:
    """A folder with checkpoints 2, 4 and 6."""
    for step in (2, 4, 6):
        _seal(tmp_path, step)
    yield tmp_path


def _seal(place: Path, step: int) -> None:
    written = place / f"{checkpoints.WRITING}x"
    (written / "inner").mkdir(parents=True)
    (written / "inner" / "weights").write_bytes(bytes(range(100)))
    checkpoints.seal(written, place / f"checkpoint-{step}", step, {"torch": "2"})


def test_a_manifest_lists_sizes_hashes_step_and_versions(sealed: Path) -> None:
    manifest = json.loads((sealed / "checkpoint-6" / "manifest.json").read_text())
    assert manifest["step"] == 6 and manifest["versions"] == {"torch": "2"}
    assert manifest["files"]["inner/weights"].keys() == {"bytes", "sha256"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: (c / "manifest.json").unlink(), "incomplete (no manifest)"),
        (lambda c: (c / "manifest.json").write_text("[" * 100_000), "its manifest is damaged"),
        (lambda c: (c / "manifest.json").write_text('{"files": 3, "step": 6}'), "its manifest is damaged"),
        (lambda c: (c / "inner" / "weights").write_bytes(b"x"), "inner/weights is damaged"),
        (lambda c: (c / "inner" / "weights").unlink(), "inner/weights is missing"),
        (lambda c: (c / "more.pt").write_bytes(b"x"), "more.pt is not in its manifest"),
        (lambda c: _rewrite(c, step=7), "its manifest is of step 7"),
        (lambda c: _rewrite(c, files={"../../secret": {}}), "inner/weights is not in its manifest"),
        (lambda c: _escape(c), "its manifest names a file outside (../../secret)"),
        (lambda c: _link(c), "its manifest names a file outside (inner/weights)"),
    ],
)
def test_what_is_passed_over_and_why(damage: Any, said: str, sealed: Path) -> None:
    damage(sealed / "checkpoint-6")
    newest, skipped = checkpoints.newest_complete(sealed)
    assert newest == sealed / "checkpoint-4"
    assert len(skipped) == 1 and f"checkpoint-6 skipped: {said}" in skipped[0]


def _rewrite(checkpoint: Path, **changes: Any) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | changes))


def _escape(checkpoint: Path) -> None:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    _rewrite(checkpoint, files={**files, "../../secret": {}})


def _link(checkpoint: Path) -> None:
    inside = checkpoint / "inner" / "weights"
    outside = checkpoint.parent / "elsewhere"
    inside.rename(outside)
    inside.symlink_to(outside)


def test_retention_never_removes_the_last_whole_one(sealed: Path) -> None:
    """Numbers above the step just written are what a resumed run passed over."""
    for step in (8, 99):
        (sealed / f"checkpoint-{step}").mkdir()
    _seal(sealed, 7)
    checkpoints.keep_newest(sealed, 2, newest=7)
    assert [path.name for path in checkpoints.list_checkpoints(sealed)] == ["checkpoint-6", "checkpoint-7"]
    assert checkpoints.newest_complete(sealed)[0] == sealed / "checkpoint-7"
    checkpoints.keep_newest(sealed, 1, newest=7)
    assert [path.name for path in checkpoints.list_checkpoints(sealed)] == ["checkpoint-7"]


def test_leftovers_of_a_killed_process_are_swept(sealed: Path) -> None:
    for name in (f"{checkpoints.WRITING}abc", ".checkpoint-2.gone", ".warm-start.tmp"):
        (sealed / name).mkdir()
    checkpoints.sweep(sealed)
    assert {path.name for path in sealed.iterdir()} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_files_and_folders_are_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder of the checkpoint, then the rename, then the folder that holds the name."""
    order: list[str] = []
    real = folder.sync
    monkeypatch.setattr(folder, "sync", lambda entry: (order.append(entry.name), real(entry))[1])
    replace = Path.replace

    def renamed(path: Path, target: Path) -> Path:
        order.append(f"{path.name} → {target.name}")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", renamed)
    _seal(tmp_path, 3)
    at = order.index(f"{checkpoints.WRITING}x → checkpoint-3")
    assert {"weights", "inner", "manifest.json", f"{checkpoints.WRITING}x"} <= set(order[:at])
    assert order[at + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), "torch"])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(
    error: Any, bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(bert_folder, data_folder, tmp_path / "run")
    raised = RuntimeError("PytorchStreamWriter failed writing file") if error == "torch" else error
    seal, calls = trainer.seal, iter(range(9))

    def full(*args: Any) -> None:
        if next(calls) == 1:
            raise raised
        seal(*args)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "seal", full)
        with pytest.raises(
            RunError, match=r"step 12: the checkpoint cannot be written .*checkpoint-6 is kept"
        ):
            leantune.train(made, console=quiet())
    left = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert left == ["checkpoint-6"]
    console = quiet()
    leantune.train(made, resume=True, console=console)
    assert "resuming from checkpoint-6" in printed(console)


def test_a_full_disk_elsewhere_is_one_line(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    from leantune.run import pipeline

    monkeypatch.setattr(pipeline, "write_json", full)
    with pytest.raises(RunError, match="cannot be written: No space left on device; checkpoints"):
        leantune.train(recipe(bert_folder, data_folder, tmp_path / "run"), console=quiet())
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("name", ["checkpoints", "adapter", "log.jsonl", "metrics.json", "pruning"])
def test_a_run_folder_with_links_is_refused(
    name: str, bert_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    made = recipe(bert_folder, data_folder, tmp_path / "run")
    RunFolder(tmp_path / "run").begin(made, overwrite=False)
    (tmp_path / "outside").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside")
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=f"{name}: is a symbolic link"):
            leantune.train(made, console=quiet(), **options)
    with pytest.raises(UserError, match="is a symbolic link"):
        leantune.load(tmp_path / "run")
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_recipe_that_was_about_to_be_written_does_not_block(
    bert_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.tmp").write_text("half")
    made = recipe(bert_folder, data_folder, tmp_path / "run", train={"steps": 1})
    assert leantune.train(made, console=quiet()).metrics["steps"] == 1
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / ".adapter.gone").mkdir()
    (tmp_path / "run" / ".metrics.json.tmp").write_text("half")
    (tmp_path / "run" / ".mine.tmp").write_text("a person's")
    assert leantune.train(made, resume=True, console=quiet()).metrics["steps"] == 1
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".mine.tmp"]


def test_overwriting_removes_metrics_first(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle, what is left is an unfinished run, not a finished one without weights."""
    made = recipe(bert_folder, data_folder, tmp_path / "run", train={"steps": 1})
    leantune.train(made, console=quiet())
    removed: list[str] = []
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **options: (removed.append(path.name), unlink(path, **options))[1]
    )
    monkeypatch.setattr(folder, "remove_folder", lambda path: removed.append(path.name))
    RunFolder(tmp_path / "run").clear()
    assert removed[0] == "metrics.json" and removed[-1] == "recipe.yaml"
