"""Runs on a quantised base: what stays whole, what the metrics say, resume, export, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import leantune
from leantune.anatomy.leaves import plain
from leantune.comparison.plan import plan_cells, plan_methods
from leantune.comparison.progress import RunsProgress
from leantune.comparison.runs import run_in_process
from leantune.errors import UserError
from leantune.peft_methods.quantised import logical_numel
from leantune.recipes import ModelRecipe
from leantune.run import callbacks, quantization
from leantune.run.folder import RunFolder
from leantune.run.models import load_base
from leantune.run.stopping import StopOnSignal
from tests.conftest import WORDS, make_tokenizer
from tests.quantised import need, open_llama, save_llama
from tests.run.support import SETTINGS, quiet, recipe
from tests.run.test_pipeline import same, weights

ADAPTERS: dict[str, dict[str, Any]] = {
    name: SETTINGS[name]["adapter"] for name in ("lora", "lamda", "bottleneck")
}


@pytest.fixture(scope="module")
def wide_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT whose rows are whole blocks of 64, with weights large enough that rounding them shows."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def trained(
    base: Path, rows: Path, output: Path, adapter: str, kind: str | None, **changes: Any
) -> leantune.run.Run:
    made = recipe(base, rows, output, {"adapter": ADAPTERS[adapter], "quantize": kind}, **changes)
    return leantune.train(made, console=quiet())


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8-torchao"])
def test_a_run_beside_one_on_the_whole_base(
    kind: str, wide_bert: Path, data_folder: Path, tmp_path: Path
) -> None:
    need(kind)
    whole, packed = (
        trained(wide_bert, data_folder, tmp_path / str(which), "lamda", which, train={"steps": 4})
        for which in (None, kind)
    )
    assert packed.metrics["method"] == f"lamda+{kind}"
    counts, expected = (run.metrics["parameters"] for run in (packed, whole))
    inside = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    assert counts == {**expected, "quantized": inside} and expected["quantized"] == 0
    saved = whole.metrics["memory"]["weight_bytes"] - packed.metrics["memory"]["weight_bytes"]
    bits = {"nf4": 4 + 8 / 64, "fp4": 4 + 8 / 64, "int8": 8 + 32 / 64, "int8-torchao": 8 + 32 / 64}[kind]
    assert saved / inside == pytest.approx(4 - bits / 8, abs=0.3)  # bytes a weight; tables of 1 kB count here
    kept, plain = (run.metrics["memory"]["saved_activation_bytes"] for run in (packed, whole))
    assert kept == plain if kind in ("nf4", "fp4") else kept > plain
    assert packed.metrics["versions"].keys() - whole.metrics["versions"].keys() == {
        quantization.KINDS[kind].package
    }
    first = [callbacks.read_log(run.folder / "log.jsonl")[0]["loss"] for run in (packed, whole)]
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], rel=0.2)
    files = {file.name for file in (packed.folder / "adapter").iterdir()}
    assert {file for file in files if file.endswith(".safetensors")} == {"adapter_model.safetensors"}
    assert "quantization_config" not in json.loads((packed.folder / "adapter" / "config.json").read_text())
    model, _ = leantune.load(packed.folder)
    assert len(quantization.quantised_layers(model)) == 12, "quantised again, as trained"
    assert leantune.run.evaluate(packed.folder) == packed.metrics["evaluation"]
    with pytest.raises(UserError, match="is on a quantised base, which cannot be shared"):
        leantune.TaskSwitcher([packed.folder])


@pytest.mark.parametrize(
    ("kind", "adapter"), [("nf4", "lora"), ("int8-torchao", "lamda"), ("int8", "bottleneck")]
)
def test_heads_stay_whole_and_are_trained(
    kind: str, adapter: str, wide_bert: Path, data_folder: Path, tmp_path: Path
) -> None:
    need(kind)
    starts = []
    for which in (kind, None):
        made = recipe(
            wide_bert, data_folder, tmp_path / "x", {"adapter": ADAPTERS[adapter], "quantize": which}
        )
        from leantune.run.preparing import prepare

        model = prepare(made, quiet()).model
        starts.append(model.get_submodule("base_model.model.classifier.original_module").weight)
    assert torch.equal(*starts), "the same seed draws the same head"
    made = recipe(
        wide_bert, data_folder, tmp_path / "run", {"adapter": ADAPTERS[adapter], "quantize": kind},
        train={"steps": 2},
    )  # fmt: skip
    run = leantune.train(made, console=quiet())
    model = leantune.load(run.folder)[0].base_model.model
    whole = {"classifier.modules_to_save.default", "bert.pooler.dense", "bert.embeddings.word_embeddings"}
    for name, module in model.named_modules():
        module = plain(module)  # the pooler, too, may have an adapter
        if name in whole or isinstance(module, nn.LayerNorm):
            assert type(module) in (nn.Linear, nn.Embedding, nn.LayerNorm), name
            assert module.weight.dtype == torch.float32 and type(module.weight) is nn.Parameter
            whole.discard(name)
    assert not whole
    head = model.classifier.modules_to_save["default"].weight
    assert not torch.equal(head, starts[0]) and run.metrics["parameters"]["head"] == 3 * 64 + 3


def test_resumed_equals_uninterrupted(
    wide_bert: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 4 bits (8 bits are in the table that test_pipeline.py goes through)."""
    need("nf4")
    from leantune.run import Interrupted, lean
    from tests.run.test_pipeline import StopAt

    trained(wide_bert, data_folder, tmp_path / "whole", "lamda", "nf4")
    needed = lean.callbacks
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(lean, "callbacks", lambda recipe: [StopAt(5), *needed(recipe)])
        trained(wide_bert, data_folder, tmp_path / "stopped", "lamda", "nf4")
    made = RunFolder(tmp_path / "stopped").recipe()
    resumed = leantune.train(made, resume=True, console=quiet())
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    metrics = RunFolder(tmp_path / "whole").metrics()
    assert metrics is not None and resumed.metrics["evaluation"] == metrics["evaluation"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("nf4", "float32"), ("nf4", "bfloat16"), ("int8", "float32"), ("int8-torchao", "bfloat16")],
)
def test_merged_into_the_dequantised_base(
    kind: str, dtype: str, wide_bert: Path, data_folder: Path, tmp_path: Path
) -> None:
    need(kind)
    adapter = "lamda" if dtype == "float32" else "lora"
    run = trained(
        wide_bert, data_folder, tmp_path / "run", adapter, kind,
        train={"steps": 3, "learning_rate": 0.05}, model={"dtype": dtype},
    )  # fmt: skip
    done = leantune.export(run.folder, "merged", tmp_path / "merged")
    assert (
        done.base == f"merged into the dequantised {kind} base, the weights that the adapter was trained on"
    )
    assert "dequantised" in (tmp_path / "merged" / "README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert done.max_abs_difference <= (1e-5 if dtype == "float32" else 3e-2 * 10)
    lora = leantune.export(run.folder, "lora", tmp_path / "lora")
    assert (
        lora.base == f"trained on the base in {kind} and equal there; on the whole base it is another model"
    )


def test_an_export_into_the_whole_base_would_be_noticed(
    wide_bert: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leantune.run import exporting

    need("nf4")
    run = trained(wide_bert, data_folder, tmp_path / "run", "lora", "nf4", train={"steps": 2})

    def whole(loaded: Any) -> nn.Module:
        base = load_base(loaded.recipe.model, loaded.task.auto_class, loaded.config)
        return exporting.attach_saved(base, loaded.folder.adapter).eval()

    monkeypatch.setattr(exporting, "_dequantised", whole)
    with pytest.raises(UserError, match="outputs differ"):
        leantune.export(run.folder, "merged", tmp_path / "merged")


def test_conv1d_is_quantised_and_put_back(tmp_path: Path) -> None:
    """GPT-2 keeps its weights the other way round."""
    need("nf4")
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=40, n_positions=64, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    made = ModelRecipe(path=str(tmp_path), task="causal-lm")
    model = load_base(made, AutoModelForCausalLM, config, quantize="nf4")
    assert quantization.quantised_weights(model) == 2 * 12 * 64 * 64
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        quantization.dequantise(model)
        assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    need("int8-torchao")
    with pytest.raises(
        UserError, match="'int8-torchao': the model's layers hold no linear layer to quantise"
    ):
        load_base(made, AutoModelForCausalLM, config, quantize="int8-torchao")


def test_weights_are_counted_not_the_bytes_they_are_packed_into(tmp_path: Path) -> None:
    need("nf4")
    save_llama(tmp_path)
    whole, packed = open_llama(tmp_path, None), open_llama(tmp_path, "nf4", "bfloat16")
    total = sum(p.numel() for p in whole.parameters())
    assert sum(map(logical_numel, packed.parameters())) == total > sum(p.numel() for p in packed.parameters())
    assert {p.dtype for p in packed.parameters()} == {torch.bfloat16, torch.uint8}, "nothing in float32"
    assert {layer.compute_dtype for layer in quantization.quantised_layers(packed).values()} == {
        torch.bfloat16
    }


# -- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8-torchao"])
def test_a_missing_library_is_one_line(
    kind: str, wide_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = quantization.KINDS[kind].package
    monkeypatch.setitem(sys.modules, package, None)
    said = f"lean.quantize = '{kind}': {package} is not installed; pip install 'leantune.quant.'"
    with pytest.raises(UserError, match=said):
        trained(wide_bert, tmp_path / "even before the data is read", tmp_path / "run", "lora", kind)
    assert not (tmp_path / "run").exists()


def test_a_comparison_goes_on_without_it(
    bert_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['bitsandbytes'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    made = recipe(bert_folder, data_folder, tmp_path / "x")
    methods = plan_methods(made, ["qlora"], {}, 4)
    cell = plan_cells(made, methods, [0], tmp_path / "out")[0]
    reason = run_in_process(cell, StopOnSignal(), RunsProgress(quiet(), 1))
    assert reason == ("lean.quantize = 'nf4': bitsandbytes is not installed; pip install 'leantune[quant]'")


def test_a_base_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    need("nf4")
    save_llama(tmp_path)
    open_llama(tmp_path, "nf4").save_pretrained(tmp_path / "packed")
    with pytest.raises(UserError, match="lean.quantize = 'int8': the base is quantised already"):
        open_llama(tmp_path / "packed", "int8")


def test_rows_that_are_no_whole_blocks_are_refused_where_the_library_errs(
    bert_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    need("nf4")
    try:
        run = trained(bert_folder, data_folder, tmp_path / "run", "lora", "nf4", train={"steps": 1})
    except UserError as error:
        assert "(32 inputs): bitsandbytes unpacks 4-bit weights wrongly on this CPU" in str(error)
        assert not (tmp_path / "run").exists()
    else:
        assert run.metrics["parameters"]["quantized"] > 0
