"""Adapters cut to a pruned base, and back on the whole one: the same function, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from leantune import LamdaConfig
from leantune.anatomy import find_groups
from leantune.errors import UserError
from leantune.lightpeft import LightPeftConfig, grow, make_plan, prune, random_plan, shrink, take
from leantune.lightpeft.adapters import adapter_layers
from leantune.lightpeft.plan import Module
from tests.tiny_models import all_in_float64, batch_for, tiny

ADAPTERS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules="all-linear"),
    "rslora": lambda: LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False, target_modules="all-linear"
    ),
    "lamda": lambda: LamdaConfig(
        r=4, lamda_alpha=6, init_weights=False, init_b="vectors", target_modules="all-linear"
    ),
}
MODELS = [("bert", "classification"), ("llama", "causal-lm"), ("gpt2", "causal-lm"), ("t5", "seq2seq")]


def adapted(family: str, task: str, adapter: str) -> Any:
    torch.manual_seed(3)
    config = ADAPTERS[adapter]()
    if family == "gpt2" and adapter != "lamda":
        config.fan_in_fan_out = True
    tasks = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
    config.task_type = tasks[task]
    return get_peft_model(tiny(family, task), config).double().eval()


def mask_by_hand(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Scale the input of every output projection, adapters included."""
    head = model.get_base_model() if isinstance(model, PeftModel) else model
    for group in find_groups(model):
        for cut in group.outputs:
            scale = values[group.name].double().repeat_interleave(cut.blocks[0][1])
            head.get_submodule(cut.module).register_forward_pre_hook(
                lambda _, args, scale=scale: (args[0] * scale, *args[1:])
            )


def zeroed(scores: dict[str, Tensor], kept: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The masks with 0 for what goes."""
    out = {name: score.clone() for name, score in scores.items()}
    for name, units in kept.items():
        gone = [u for u in range(len(out[name])) if u not in units]
        out[name][gone] = 0
    return out


def outputs(model: nn.Module, task: str) -> Tensor:
    with torch.no_grad(), all_in_float64():
        family = getattr(model, "config").model_type  # noqa: B009
        return model(**batch_for(family, task, padding="right", labels=task == "seq2seq")).logits


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("family", "task"), MODELS)
def test_pruned_equals_masked(family: str, task: str, adapter: str) -> None:
    """Base and adapter cut, masks folded: the model whose masks are 0 where units went."""
    model = adapted(family, task, adapter)
    groups = find_groups(model)
    draw = torch.Generator().manual_seed(0)
    scores = {g.name: 1 + 0.3 * torch.randn(g.count, generator=draw) for g in groups}
    plan = make_plan(model, LightPeftConfig(heads=0.5, neurons="1/3", width_multiple=1), scores, groups)
    pruned = prune(adapted(family, task, adapter), plan).eval()
    assert isinstance(pruned, PeftModel)
    mask_by_hand(model, zeroed(scores, plan.kept))
    # float32 masks in a float64 model
    assert torch.allclose(outputs(pruned, task), outputs(model, task), rtol=0, atol=1e-10)
    size = sum(p.numel() for p in pruned.parameters())
    assert size < 0.9 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("adapter", ["lora", "lamda"])
@pytest.mark.parametrize(("family", "task"), MODELS)
def test_grown_equals_masked(family: str, task: str, adapter: str) -> None:
    """Back on the whole base with the units that went switched off: the pruned model."""
    model = adapted(family, task, adapter)
    plan = random_plan(model, LightPeftConfig(heads=0.5, neurons="1/3", modules=0.5), seed=1)
    pruned = prune(adapted(family, task, adapter), plan).eval()
    cuts = plan.cuts(find_groups(tiny(family, task)))
    whole = grow(take(pruned), cuts).attach(tiny(family, task), trainable=False).eval()
    mask_by_hand(whole, zeroed({g.name: torch.ones(g.count) for g in find_groups(model)}, plan.kept))
    assert torch.allclose(outputs(pruned, task), outputs(whole, task), rtol=0, atol=1e-10)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_ranks_go_and_the_scaling_stays(adapter: str) -> None:
    model = adapted("bert", "classification", adapter)
    names = [name for name, _ in adapter_layers(model)]
    plan = random_plan(model, LightPeftConfig(heads=0, neurons=0), seed=0)
    plan.modules.clear()
    plan.modules.update({name: Module(rank=4, kept=(1, 3)) for name in names})
    plan.modules[names[0]] = Module(rank=4, kept=())
    pruned = prune(adapted("bert", "classification", adapter), plan).eval()
    layers, small = dict(adapter_layers(model)), dict(adapter_layers(pruned))
    assert names[0] not in small and list(small) == names[1:]
    for name in names[1:4]:
        before: Any = layers[name]
        after: Any = small[name]
        assert after.scaling["default"] == pytest.approx(before.scaling["default"], rel=1e-12)
        if adapter == "lamda":
            B0, A = before.lamda_B0["default"][:, [1, 3]], before.lamda_A["default"][[1, 3]]
            B = before.joined_columns("default")[:, [1, 3]]
            dS = before.lamda_S["default"][[1, 3]][:, [1, 3]]  # and S0 = I
            wanted = before.scaling["default"] * (B0 @ dS + B @ (torch.eye(2) + dS)) @ A
            found = after.adapter_output("default", torch.eye(A.shape[1], dtype=torch.float64)).T
        else:
            A, B = before.lora_A["default"].weight[[1, 3]], before.lora_B["default"].weight[:, [1, 3]]
            wanted = before.scaling["default"] * B @ A
            found = after.get_delta_weight("default")
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_saved_and_loaded_without_leantune_s_help(tmp_path: Path) -> None:
    """A pruned LoRA is an ordinary PEFT folder on the pruned base."""
    model = adapted("llama", "causal-lm", "lora")
    plan = random_plan(model, LightPeftConfig(modules=0.5, ranks=0.5), seed=0)
    pruned = prune(adapted("llama", "causal-lm", "lora"), plan).eval()
    shrink(model, plan).save(tmp_path / "shrunk")
    pruned.save_pretrained(tmp_path / "saved")
    for folder in ("shrunk", "saved"):
        base = prune(tiny("llama", "causal-lm"), plan)
        again = PeftModel.from_pretrained(base, tmp_path / folder, autocast_adapter_dtype=False).eval()
        assert torch.equal(outputs(again, "causal-lm"), outputs(pruned, "causal-lm"))


def test_it_trains_and_more_adapters_fit() -> None:
    """Sizes that PEFT caches are the pruned ones; the new model's parameters learn."""
    model = adapted("llama", "causal-lm", "lora")
    plan = random_plan(model, LightPeftConfig(), seed=0)
    pruned = prune(model, plan).train()
    pruned.add_adapter("second", LoraConfig(r=2, target_modules=["down_proj", "o_proj"]))
    pruned.set_adapter("second")
    batch = batch_for("llama", "causal-lm", padding="right")
    with all_in_float64():
        pruned(**batch).loss.backward()
    grads = [p.grad for n, p in pruned.named_parameters() if "lora_B.second" in n]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)


def test_refusals() -> None:
    model = adapted("bert", "classification", "lora")
    plan = random_plan(model, LightPeftConfig(heads=0, neurons=0), seed=0)
    plan.modules.update({name: Module(rank=4, kept=()) for name in plan.modules})
    with pytest.raises(UserError, match="leaves no module of the adapter"):
        shrink(model, plan)
    with pytest.raises(UserError, match="cannot prune adapters of type IA3"):
        foreign = get_peft_model(tiny("bert", "classification"), IA3Config(task_type="SEQ_CLS"))
        shrink(foreign, random_plan(model, LightPeftConfig(), seed=0))
    dora = get_peft_model(
        tiny("bert", "classification"), LoraConfig(r=4, use_dora=True, target_modules=["query"])
    )
    with pytest.raises(UserError, match="cannot prune the tensor lora_magnitude_vector"):
        shrink(dora, random_plan(dora, LightPeftConfig(), seed=0))
    with pytest.raises(UserError, match="needs a model with an adapter"):
        random_plan(tiny("bert", "classification"), LightPeftConfig(), seed=0)
