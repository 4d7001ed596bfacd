"""The plan as data: what is written, what is read back, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from leantune.anatomy import find_groups
from leantune.errors import UserError
from leantune.lightpeft import LightPeftConfig, PruningPlan, make_plan, prune, random_plan
from tests.tiny_models import tiny

CONFIG = LightPeftConfig(heads="1/4", neurons="1/3", modules=0.5, ranks=0.5)


@pytest.fixture
def model() -> Any:
    return tiny("bert", "classification")


@pytest.fixture
def plan(model: Any) -> PruningPlan:
    draw = torch.Generator().manual_seed(0)
    scores = {g.name: 1 + 0.1 * torch.randn(g.count, generator=draw) for g in find_groups(model)}
    ranks = {"bert.encoder.layer.0.attention.self.query": 4, "bert.encoder.layer.1.output.dense": 4}
    return make_plan(
        model,
        CONFIG,
        scores,
        module_importance={name: float(number) for number, name in enumerate(ranks)},
        rank_importance={name: torch.arange(4.0) for name in ranks},
        ranks=ranks,
    )


def test_it_comes_back_as_it_was(plan: PruningPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    assert again.groups == plan.groups and again.modules == plan.modules
    assert again.base == plan.base and again.settings == plan.settings
    assert again.masks.keys() == plan.masks.keys()
    assert all(torch.equal(again.masks[name], plan.masks[name]) for name in plan.masks)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "masks.safetensors"}


def test_its_picture_says_what_stays(plan: PruningPlan) -> None:
    lines = str(plan).splitlines()
    assert len(lines) == len(plan.groups) + 1
    assert lines[0].endswith("3/4 heads") and lines[0].count("█") == 3 and lines[0].count("░") == 1
    assert lines[-1] == "adapter: 1/2 modules, 2/8 ranks"


def test_sizes(model: Any, plan: PruningPlan) -> None:
    base, blocks, gone = plan.sizes(model)
    before = sum(p.numel() for p in model.base_model.parameters())
    prune(model, plan)
    assert base == before
    assert gone == before - sum(p.numel() for p in model.base_model.parameters())
    assert gone < blocks < base


@pytest.mark.parametrize("wrap", [False, True])
def test_another_base_is_refused(plan: PruningPlan, wrap: bool) -> None:
    for other, words in (
        (tiny("bert", "classification", seed=1), "same shapes, other weights"),
        (tiny("bert", "classification", intermediate_size=96), "bert of other shapes"),
        (tiny("llama", "classification"), "of other shapes than this llama"),
    ):
        if wrap:
            other = get_peft_model(other, LoraConfig(r=2, target_modules="all-linear"))
        with pytest.raises(UserError, match=words):
            prune(other, plan)


def test_the_same_base_in_another_dtype_is_the_same_base(plan: PruningPlan) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pruned = prune(tiny("bert", "classification", dtype=dtype), plan)
        assert pruned.dtype == dtype


def test_twice_is_refused(model: Any, plan: PruningPlan) -> None:
    prune(model, plan)
    with pytest.raises(UserError, match="pruned"):
        prune(model, plan)


def test_random_plans_have_the_same_size(model: Any) -> None:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    one, same, other = (random_plan(adapted, CONFIG, seed) for seed in (0, 0, 1))
    assert one.groups == same.groups and one.modules == same.modules and one.groups != other.groups
    for drawn in (one, other):
        assert all(len(u.kept) == 3 for u in drawn.groups.values() if u.kind == "heads")
        assert sum(len(u.kept) for u in drawn.groups.values() if u.kind == "neurons") == 128
        assert sum(bool(m.kept) for m in drawn.modules.values()) <= len(drawn.modules) // 2 + 1
        assert not drawn.masks


# -- damaged and hostile files -------------------------------------------------------------------------------


def damage(content: dict[str, Any], how: str) -> Any:
    first = next(iter(content["groups"].values()))
    if how == "empty layer":
        first["kept"] = []
    elif how == "unit out of range":
        first["kept"][-1] = first["count"]
    elif how == "unit twice":
        first["kept"][0] = first["kept"][1]
    elif how == "negative unit":
        first["kept"][0] = -1
    elif how == "rank out of range":
        next(iter(content["modules"].values()))["kept"] = [99]
    elif how == "unknown key":
        content["run_me"] = "import os"
    elif how == "future format":
        content["format"] = 2
    elif how == "ratio":
        content["settings"]["heads"] = 1.5
    elif how == "unknown setting":
        content["settings"]["tails"] = 1
    elif how == "list":
        return [content]
    return content


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("empty layer", "must not be emptied"),
        ("unit out of range", "ascending numbers below"),
        ("unit twice", "ascending numbers below"),
        ("negative unit", "greater than or equal to 0"),
        ("rank out of range", "ascending numbers below 4"),
        ("unknown key", "run_me"),
        ("future format", "format"),
        ("ratio", r"heads=1.5: must be a share in \[0, 1\)"),
        ("unknown setting", "tails"),
        ("list", "not a valid pruning plan"),
    ],
)
def test_a_damaged_plan_is_refused(plan: PruningPlan, tmp_path: Path, how: str, words: str) -> None:
    file = tmp_path / "plan.json"
    plan.save(file)
    file.write_text(json.dumps(damage(json.loads(file.read_text()), how)))
    with pytest.raises(UserError, match=words) as raised:
        PruningPlan.load(file)
    assert "\n" not in str(raised.value)


def test_masks_that_are_gone_or_changed_are_refused(plan: PruningPlan, tmp_path: Path) -> None:
    file, masks = tmp_path / "plan.json", tmp_path / "masks.safetensors"
    with pytest.raises(UserError, match="no such file"):
        PruningPlan.load(file)
    plan.save(file)
    content = bytearray(masks.read_bytes())
    content[-1] ^= 1
    masks.write_bytes(content)
    with pytest.raises(UserError, match="damaged, or of another plan"):
        PruningPlan.load(file)
    masks.unlink()
    with pytest.raises(UserError, match="missing; the plan needs it"):
        PruningPlan.load(file)
    file.write_text("{" * 100_000)
    with pytest.raises(UserError, match="not a valid pruning plan"):
        PruningPlan.load(file)
