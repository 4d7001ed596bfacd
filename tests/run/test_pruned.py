"""Pruned runs: two stages in one command, loaded anywhere, switched, exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import leantune
from leantune.errors import UserError
from leantune.lightpeft import PruningPlan
from leantune.run import Interrupted, callbacks, lean
from leantune.run.folder import RunFolder
from tests.run.support import SETTINGS, printed, quiet, recipe
from tests.run.test_pipeline import StopAt, same, weights

PRUNED = {name: row for name, row in SETTINGS.items() if "prune" in row}
TEXT = "my card has not arrived"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path, data_folder: Path) -> Any:
    output = tmp_path_factory.mktemp("pruned") / "lora"
    return leantune.train(
        recipe(bert_folder, data_folder, output, PRUNED["lora+light-peft"]), console=quiet()
    )


@pytest.fixture(scope="module")
def lamda(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path, data_folder: Path) -> Any:
    output = tmp_path_factory.mktemp("pruned") / "lamda"
    return leantune.train(
        recipe(bert_folder, data_folder, output, PRUNED["lamda+light-peft"]), console=quiet()
    )


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, data_folder: Path) -> Any:
    """A causal LM with grouped queries whose plan is the same in each layer."""
    output = tmp_path_factory.mktemp("pruned") / "decoder"
    prune = {"heads": 0.5, "neurons": 0.25, "neurons_scope": "layer", "estimate_steps": 3}
    return leantune.train(
        recipe(
            llama_folder, data_folder, output, {"adapter": {"type": "lora", "r": 4}, "prune": prune},
            model={"task": "causal-lm"}, data={"text": "text"}, train={"steps": 4},
        ),
        console=quiet(),
    )  # fmt: skip


def logits(run: Any, text: str = TEXT) -> torch.Tensor:
    model, tokenizer = leantune.load(run.folder)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


def test_what_a_pruned_run_holds(lora: Any) -> None:
    folder, metrics = RunFolder(lora.folder), lora.metrics
    assert {path.name for path in folder.pruning.iterdir()} == {
        "plan.json",
        "masks.safetensors",
        "manifest.json",
    }
    assert metrics["method"] == "lora+light-peft"
    assert metrics["speed"]["estimate_seconds"] > 0
    assert 0.2 < metrics["parameters"]["blocks_removed_fraction"] < 0.35
    removed = metrics["parameters"]
    assert 0 < removed["base_removed_fraction"] < removed["blocks_removed_fraction"]
    stages = callbacks.read_log(folder.log_file, "estimation"), callbacks.read_log(folder.log_file)
    assert [line["step"] for line in stages[0]] == [1, 2, 3, 4]
    assert [line["step"] for line in stages[1] if "loss" in line and "evaluation" not in line] == list(
        range(1, 13)
    )
    plan = PruningPlan.load(folder.plan_file)
    assert sum(bool(m.kept) for m in plan.modules.values()) <= len(plan.modules) // 2
    model, _ = leantune.load(lora.folder)
    small = [m for m in model.modules() if type(m) is torch.nn.Linear and m.in_features < 32]
    assert small, "weights are sliced, not masked"


def test_a_share_of_the_run_is_estimated(lamda: Any) -> None:
    """estimate_steps = 0.5 of 12."""
    assert len(callbacks.read_log(RunFolder(lamda.folder).log_file, "estimation")) == 6


@pytest.mark.parametrize("method", PRUNED)
def test_resumed_in_the_first_stage_equals_uninterrupted(
    method: str, bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe(bert_folder, data_folder, tmp_path / "whole", PRUNED[method])
    leantune.train(whole, console=quiet())
    made = recipe(bert_folder, data_folder, tmp_path / "stopped", PRUNED[method])
    needed = lean.estimation_callbacks
    with monkeypatch.context() as patched:
        patched.setattr(lean, "estimation_callbacks", lambda recipe: [StopAt(3), *needed(recipe)])
        with pytest.raises(Interrupted, match="stopped after step 3"):
            leantune.train(made, console=quiet())
    assert not RunFolder(tmp_path / "stopped").pruning.exists()
    console = quiet()
    leantune.train(made, resume=True, console=console)
    assert "resuming from checkpoint-3" in printed(console)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    plans = [RunFolder(tmp_path / name).pruning for name in ("whole", "stopped")]
    for file in ("plan.json", "masks.safetensors"):
        assert (plans[0] / file).exists() == (plans[1] / file).exists()
        if (plans[0] / file).exists():
            assert (plans[0] / file).read_bytes() == (plans[1] / file).read_bytes()


def test_killed_between_the_stages(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is there, the second stage has not begun: it begins, and nothing is estimated again."""
    from leantune.run import pipeline

    made = recipe(bert_folder, data_folder, tmp_path / "run", PRUNED["lora+light-peft"])
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "pruned_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            leantune.train(made, console=quiet())
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "estimate", lambda *_: pytest.fail("estimated again"))
        leantune.train(made, resume=True, console=quiet())
    whole = recipe(bert_folder, data_folder, tmp_path / "whole", PRUNED["lora+light-peft"])
    leantune.train(whole, console=quiet())
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_tasks_are_switched_over_one_base(lora: Any, lamda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {str(run.folder): logits(run) for run in (lora, lamda)}
    tasks = leantune.TaskSwitcher([lora.folder, lamda.folder])
    assert tasks.tasks == tuple(expected)

    def no_reading(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a file of weights was opened")

    monkeypatch.setattr("leantune.lightpeft.load.safe_open", no_reading)
    for number in range(10):
        name = tasks.tasks[number % 2]
        model = tasks.switch(name)
        inputs = tasks.tokenizer(name)(TEXT, return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected[name])
    with pytest.raises(UserError, match="no such task; there are"):
        tasks.switch("runs/other")


def test_switching_refuses_what_does_not_share_the_base(
    lora: Any, decoder: Any, bert_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is on another base"):
        leantune.TaskSwitcher([lora.folder, decoder.folder])
    full = recipe(bert_folder, data_folder, tmp_path / "full", SETTINGS["full"], train={"steps": 1})
    leantune.train(full, console=quiet())
    with pytest.raises(UserError, match="is full fine-tuning"):
        leantune.TaskSwitcher([lora.folder, tmp_path / "full"])
    with pytest.raises(UserError, match="at least one run"):
        leantune.TaskSwitcher([])


def test_a_decoder_comes_back_in_a_new_process(decoder: Any, tmp_path: Path) -> None:
    model, tokenizer = leantune.load(decoder.folder)
    inputs = tokenizer("my card", return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    script = f"""
import json, leantune
model, tokenizer = leantune.load({str(decoder.folder)!r})
inputs = tokenizer("my card", return_tensors="pt")
print(json.dumps(model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == said.tolist()


def test_a_rank_above_a_pruned_width(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """LaMDA of rank 32 on layers that pruning makes narrower than that."""
    prune = {"heads": 0.5, "neurons": 0.5, "estimate_steps": 3}
    wide = {"adapter": {"type": "lamda", "r": 32}, "prune": prune}
    run = leantune.train(
        recipe(bert_folder, data_folder, tmp_path / "run", wide, train={"steps": 3}), console=quiet()
    )
    assert logits(run).isfinite().all()


# -- export --------------------------------------------------------------------------------------------------


def test_a_uniform_decoder_is_exported_as_a_plain_checkpoint(decoder: Any, tmp_path: Path) -> None:
    done = leantune.export(decoder.folder, "pruned", tmp_path / "out")
    assert done.max_abs_difference <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_key_value_heads == 1 and model.config.num_attention_heads == 2
    assert model.config.intermediate_size == 48
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT, return_tensors="pt")
    with torch.no_grad():
        assert (model(**inputs).logits - logits(decoder)).abs().max() <= 1e-5


def test_what_a_config_cannot_say_is_refused(lora: Any, lamda: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--to pruned: .*(different numbers of neurons|cannot express)"):
        leantune.export(lora.folder, "pruned", tmp_path / "out")
    with pytest.raises(UserError, match="--to merged: the run is pruned; use --to pruned"):
        leantune.export(lora.folder, "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_adapter_is_recovered_onto_the_whole_base(
    lora: Any, lamda: Any, bert_folder: Path, tmp_path: Path
) -> None:
    for run in (lora, lamda):
        folder = tmp_path / run.metrics["method"]
        done = leantune.export(run.folder, "lora", folder)
        assert done.evaluation is not None and done.evaluation.keys() == {"run", "recovered"}
        assert done.evaluation["run"] == run.metrics["evaluation"]["test"]
        assert done.evaluation["recovered"].keys() == done.evaluation["run"].keys()
        from peft import PeftModel
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        base = AutoModelForSequenceClassification.from_pretrained(bert_folder, config=config)
        model = PeftModel.from_pretrained(base, folder)
        assert model.peft_config["default"].peft_type == "LORA"
        assert model.base_model.model.bert.encoder.layer[0].output.dense.in_features == 64


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_plan_for_another_base_is_refused_on_loading(
    lora: Any, data_folder: Path, tmp_path: Path, bert_folder: Path
) -> None:
    import shutil

    from transformers import AutoModel

    other = tmp_path / "other-base"
    shutil.copytree(bert_folder, other)
    model = AutoModel.from_pretrained(other)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(other)
    run = tmp_path / "run"
    shutil.copytree(lora.folder, run)
    text = (run / "recipe.yaml").read_text().replace(str(bert_folder), str(other))
    (run / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match="another base model: same shapes, other weights"):
        leantune.load(run)


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ({"heads": 1.0}, r"lean.prune.heads = 1.0: must be a share in \[0, 1\)"),
        ({"neurons": "3/2"}, r"lean.prune.neurons = '3/2': must be a share in \[0, 1\)"),
        ({"estimate_steps": 0}, "lean.prune.estimate_steps = 0: must be a whole number above 1"),
        ({"heads": 0, "neurons": 0}, "there is nothing to prune"),
        ({"neurons": 0.99, "neurons_scope": "global"}, "lean.prune: cannot remove"),
    ],
)
def test_settings_that_cannot_be(
    prune: dict[str, Any], words: str, bert_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        made = recipe(
            bert_folder, data_folder, tmp_path / "run", {"adapter": {"type": "lora"}, "prune": prune}
        )
        leantune.train(made, console=quiet())
    assert not (tmp_path / "run").exists()


def test_pruning_needs_an_adapter(bert_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prune works on base and adapter together"):
        recipe(bert_folder, data_folder, tmp_path, {"adapter": {"type": "none"}, "prune": {}})
