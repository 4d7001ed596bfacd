"""A LaMDA adapter as a plain LoRA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from leantune import LamdaConfig, UserError
from leantune.lamda import freeze_columns, lamda_to_lora, save_as_lora
from tests.lamda.conftest import TARGETS, build, perturb

READER = """
import sys, json, warnings
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from tests.lamda.conftest import batch_for, build
assert not any(name.startswith("leantune") for name in sys.modules)
folder = sys.argv[1]
for family in sys.argv[2:]:
    model = PeftModel.from_pretrained(build(family), f"{folder}/{family}").eval()
    batch = {k: v for k, v in batch_for(family).items() if k != "labels"}
    with torch.no_grad():
        torch.save(model(**batch).logits, f"{folder}/{family}.pt")
assert not any(name.startswith("leantune") for name in sys.modules)
"""


def trained(family: str, **settings: Any) -> PeftModel:
    if family == "bert":
        settings["task_type"] = "SEQ_CLS"
    model = get_peft_model(build(family), LamdaConfig(r=4, target_modules=TARGETS[family], **settings))
    perturb(model)
    freeze_columns(model, None, 1, 8)
    if family == "bert":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(0.3)
    return model


def test_plain_peft_opens_it_and_computes_the_same(tmp_path: Path, logits: Any) -> None:
    """In a process that never sees leantune; layers of different rank and scale."""
    expected = {}
    for family, (first, *_) in TARGETS.items():
        patterns = {"rank_pattern": {first: 3}, "alpha_pattern": {first: 5}}
        model = trained(family, init_b="vectors", init_scale="normalized", **patterns)
        expected[family] = logits(model, family)
        assert not torch.allclose(expected[family], logits(build(family), family), atol=1e-2)
        save_as_lora(model, tmp_path / family)
        saved = json.loads((tmp_path / family / "adapter_config.json").read_text())
        assert saved["peft_type"] == "LORA"
        assert saved["r"] == saved["lora_alpha"] == 4
        assert set(saved["rank_pattern"].values()) == {3}
    reader = [sys.executable, "-c", READER, str(tmp_path), *TARGETS]
    subprocess.run(reader, check=True, cwd=Path(__file__).parents[2])
    for family, value in expected.items():
        result = torch.load(tmp_path / f"{family}.pt", weights_only=True)
        torch.testing.assert_close(result, value, rtol=0, atol=1e-5)


def test_export_of_a_transformers_model_with_an_adapter(logits: Any, tmp_path: Path) -> None:
    base = build("llama")
    base.add_adapter(LamdaConfig(r=4, target_modules=TARGETS["llama"]), "mine")
    perturb(base, "mine")
    save_as_lora(base, tmp_path, "mine")
    loaded = PeftModel.from_pretrained(build("llama"), str(tmp_path))
    torch.testing.assert_close(logits(loaded, "llama"), logits(base, "llama"), rtol=0, atol=1e-5)


def test_only_the_named_adapter_is_exported() -> None:
    model = trained("llama")
    model.add_adapter("other", LamdaConfig(r=2, target_modules=["k_proj"]))
    config, state = lamda_to_lora(model, "other")
    assert config.r == 2
    assert {key.split(".")[-3] for key in state} == {"k_proj"}
    with pytest.raises(UserError, match="'nobody'.*default.*other"):
        lamda_to_lora(model, "nobody")
