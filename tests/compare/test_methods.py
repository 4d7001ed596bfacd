"""The table of methods: what each name makes of a recipe, at which rate, for how many steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leantune.comparison.methods import DEFAULT_METHODS, PARTS, parse_methods
from leantune.comparison.plan import Method, plan_cells, plan_methods
from leantune.comparison.rates import check_rates, parse_rates
from leantune.errors import UserError
from leantune.recipes import Recipe
from leantune.recipes.loading import validate

NAMES = [
    *PARTS,
    "lamda+tokentune",
    "bottleneck+light-peft",
    "full+tokentune",
    "lamda+++tokentune",
    "lean+ckpt",
    "recipe+ckpt",
    "lamda+nf4",
]


def test_lean_chooses_tokens_as_the_head_reads_them() -> None:
    for task, strategy in (("classification", "attention"), ("causal-lm", "random")):
        recipe = make()
        recipe.model.task = task
        lean = plan_methods(recipe, ["lean"], {}, 100)[0].settings["lean"]
        assert (lean["tokens"]["strategy"], lean["adapter"]["type"]) == (strategy, "lamda")


def make(lean: dict[str, Any] | None = None, **train: Any) -> Recipe:
    data = {
        "model": {"path": "m", "task": "classification"},
        "data": {"path": "d"},
        "lean": lean or {"adapter": {"type": "lora", "r": 4}},
        "train": train,
        "output": "runs/x",
    }
    return validate(data, "test")


def plan(name: str, recipe: Recipe | None = None, budget: int = 400, **rates: float) -> Method:
    return plan_methods(recipe or make(), [name], rates, budget)[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_a_recipe_at_the_same_budget(name: str, tmp_path: Path) -> None:
    method = plan(parse_methods(name)[0])
    assert method.estimation_steps + method.training_steps == 400
    assert bool(method.estimation_steps) == (method.settings["lean"]["prune"] is not None)
    cell = plan_cells(make(), [method], [3], tmp_path)[0]
    assert cell.recipe.train.steps == method.training_steps and cell.recipe.train.seed == 3
    assert cell.recipe.output == str(tmp_path / f"{name}-3")


def test_what_the_names_say() -> None:
    lean = {name: plan(name).settings["lean"] for name in NAMES}
    kinds = {name: settings["adapter"]["type"] for name, settings in lean.items()}
    assert kinds["full"] == "none" and kinds["tokentune"] == kinds["light-peft"] == kinds["ckpt"] == "lora"
    assert kinds["lean"] == kinds["lamda+tokentune"] == "lamda"
    assert lean["lean"]["adapter"]["r"] == 32 and lean["lean"]["tokens"]["keep"] == 0.5
    assert lean["light-peft"]["prune"]["modules"] == 0.5 and lean["lora"]["prune"] is None
    assert lean["qlora"] == lean["nf4"] and kinds["lamda+nf4"] == "lamda"
    assert lean["lamda+nf4"]["quantize"] == "nf4" and lean["lora"]["quantize"] is None
    assert plan("lora+ckpt").settings["train"] == {"gradient_checkpointing": True}
    assert set(DEFAULT_METHODS) <= set(PARTS)


def test_the_recipes_own_settings_hold() -> None:
    own = make({
        "adapter": {"type": "lora", "r": 4, "target_modules": ["query"]},
        "prune": {"heads": 0.5, "estimate_steps": 7},
        "tokens": {"keep": 9},
    })  # fmt: skip
    assert plan("lora", own).settings["lean"]["adapter"]["r"] == 4
    assert plan("lora", own).settings["lean"]["tokens"] is None
    assert plan("tokentune", own).settings["lean"]["tokens"]["keep"] == 9
    assert plan("light-peft", own).settings["lean"]["prune"]["heads"] == 0.5
    assert plan("light-peft", own).estimation_steps == 7
    assert plan("lamda", own).settings["lean"]["adapter"]["target_modules"] == ["query"]
    assert plan("bottleneck", own).settings["lean"]["adapter"]["target_modules"] is None
    assert plan("recipe", own).settings["lean"] == {
        **own.to_dict()["lean"], "prune": {**own.to_dict()["lean"]["prune"], "estimate_steps": 7}
    }  # fmt: skip


def test_variants_of_lora_are_told_apart() -> None:
    own = make({"adapter": {"type": "lora", "variant": "dora", "r": 4, "target_modules": ["query"]}})
    got = {name: plan(name, own).settings["lean"]["adapter"] for name in ("lora", "dora", "adalora", "vera")}
    assert {name: adapter["variant"] for name, adapter in got.items()} == {name: name for name in got}
    assert [adapter["r"] for adapter in got.values()] == [4, 4, 4, 256]
    assert all(adapter["target_modules"] == ["query"] for adapter in got.values())


def test_lamda_and_its_spectral_ranks_are_told_apart() -> None:
    own = make({"adapter": {"type": "lamda", "r": 8, "init": "random"}})
    ranked = plan("lamda++", own).settings["lean"]["adapter"]
    assert ranked["init"] == "random" and ranked["spectral_ranks"]["budget"] == 8
    assert plan("lamda", own).settings["lean"]["adapter"] == plan("recipe", own).settings["lean"]["adapter"]
    spectral = make({"adapter": {"type": "lamda", "spectral_ranks": {"budget": 4}}})
    assert plan("lamda++", spectral).settings["lean"]["adapter"]["spectral_ranks"]["budget"] == 4
    assert plan("recipe", spectral).settings["lean"]["adapter"]["spectral_ranks"]["budget"] == 4
    assert plan("lamda", spectral).settings["lean"]["adapter"]["spectral_ranks"] is None
    assert own.method == "lamda" and spectral.method == "lamda++"


def test_estimation_is_within_the_budget() -> None:
    assert plan("light-peft", budget=2000).estimation_steps == 100
    assert plan("light-peft", budget=80).estimation_steps == 20
    half = make({"adapter": {"type": "lora"}, "prune": {"estimate_steps": 0.5}})  # of the second stage
    method = plan("light-peft", half, budget=90)
    assert (method.estimation_steps, method.training_steps) == (30, 60)
    long = make({"adapter": {"type": "lora"}, "prune": {"estimate_steps": 90}})
    with pytest.raises(UserError, match=r"lean.prune.estimate_steps = 90 leaves none of 90 steps"):
        plan("light-peft", long, budget=90)


def test_rates() -> None:
    recipe = make(learning_rate=2e-3)  # LoRA's usual 5e-4, times 4
    assert plan("lora", recipe).rate == (2e-3, "the recipe's")
    assert plan("full", recipe).rate.value == pytest.approx(2e-4)
    assert plan("lean", recipe).rate.value == pytest.approx(8e-3)
    assert "times 4" in plan("full", recipe).rate.source
    assert plan("full").rate == (5e-5, "the usual one")
    given = {"lora": 1e-3, "lora+ckpt": 3e-3}
    assert plan("tokentune", recipe, **given).rate == (1e-3, "given for lora")
    assert plan("lora+ckpt", recipe, **given).rate.value == 3e-3
    assert plan("lamda", recipe, **given).rate.value == pytest.approx(8e-3)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("lora,lmda", "methods: 'lmda' is unknown; did you mean lamda? (accepted: full, lora, rslora, "),
        ("lora,,", None),
        (" , ", "methods: none is named"),
        ("lora,full,lora", "methods: 'lora' is named twice"),
        ("lora+lamda", "methods: 'lora+lamda': lora and lamda both set adapter"),
        ("lean+tokentune", "methods: 'lean+tokentune': lean and tokentune both set tokens"),
        (
            "full+light-peft",
            "methods: 'full+light-peft': light-peft prunes base and adapter together, full",
        ),
        ("full+nf4", "methods: 'full+nf4': full trains the base itself"),
        ("qlora+nf4", "methods: 'qlora+nf4': qlora and nf4 both set quantize"),
        ("lean+nf4", "methods: 'lean+nf4': packed weights cannot be pruned"),
        ("recipe+tokentune", "methods: 'recipe+tokentune': recipe says all of lean itself"),
    ],
)
def test_names_that_do_not_fit(names: str, said: str | None) -> None:
    if said is None:
        assert parse_methods(names) == ["lora"]
        return
    with pytest.raises(UserError) as caught:
        parse_methods(names)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_the_same_run_twice_is_refused() -> None:
    with pytest.raises(UserError, match="with this recipe 'lora' and 'recipe' are the same run"):
        plan_methods(make(), ["lora", "recipe"], {}, 100)
    plan_methods(make(), ["lora", "recipe"], {"recipe": 1e-5}, 100)


def test_rates_that_do_not_fit() -> None:
    assert parse_rates(["lora=2e-3"]) == {"lora": 2e-3}
    for text in ("lora", "lora=", "=1", "lora=-1", "lora=nan", "lora=fast"):
        with pytest.raises(UserError, match="is not METHOD=VALUE with a number above 0"):
            parse_rates([text])
    with pytest.raises(
        UserError, match=r"lr: 'lean' is not compared \(accepted: lora, full, lamda, bottleneck\)"
    ):
        check_rates({"lean": 1.0}, ["lora"])
    with pytest.raises(UserError, match="lr: lora = 0.0: must be a number above 0"):
        check_rates({"lora": 0.0}, ["lora"])
