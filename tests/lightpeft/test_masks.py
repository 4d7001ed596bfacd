"""Masks: what they do to the forward pass, their gradients, their optimizer, and that they leave no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.func import functional_call

from leantune import TokenTuneConfig, UserError, token_tune
from leantune.anatomy import find_head
from leantune.lightpeft.config import LightPeftConfig
from leantune.lightpeft.estimation import Estimation, attach_masks, detach_masks, estimation_of
from leantune.lightpeft.masks import _Scale
from tests.lightpeft.masked import adapted, batch, outputs
from tests.tiny_models import all_in_float64, tiny

CONFIG = LightPeftConfig(heads=0.25, neurons=0.25)


def draw(estimation: Estimation, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random masks, some negative, put in the place of the ones."""
    generator = torch.Generator().manual_seed(7)
    for name, value in estimation.masks.items():
        drawn = torch.randn(len(value), generator=generator, dtype=dtype) * 0.5 + 0.8
        estimation.masks[name] = drawn.requires_grad_()
    return estimation.masks


def scaled_weights(model: PeftModel, family: str, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights with every output projection's input features times their masks."""
    scaled = {}
    sources = dict(model.named_parameters()) | dict(model.named_buffers())
    for group, (modules, _, size) in outputs(family).items():
        factors = masks[group].repeat_interleave(size)  # (in,)
        for module in modules:
            name = f"base_model.model.{module}"
            base = "weight" if f"{name}.weight" in sources else "base_layer.weight"
            rows = factors[:, None] if family == "gpt2" else factors  # Conv1D is (in, out)
            scaled[f"{name}.{base}"] = sources[f"{name}.{base}"].detach() * rows
            for A in ("lora_A.default.weight", "lamda_A.default"):
                if f"{name}.{A}" in sources:
                    scaled[f"{name}.{A}"] = sources[f"{name}.{A}"].detach() * factors
    return scaled


def gradients(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.grad for name, value in masks.items() if value.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **tolerance or {"rtol": 1e-9, "atol": 1e-10})


@pytest.mark.parametrize("method", ["lora", "lamda"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_masks_scale_the_units_and_get_their_gradients(family: str, method: str, everywhere: bool) -> None:
    """Output projections with and without an adapter, in training and evaluation."""
    few = {"bert": ["query"], "llama": ["q_proj"], "gpt2": ["c_attn"]}[family]
    model = adapted(family, method, targets=None if everywhere else few)
    data = batch(family)
    reference = copy.deepcopy(model)
    estimation = attach_masks(model, CONFIG)
    assert {name: len(value) for name, value in estimation.masks.items()} == {
        name: count for name, (_, count, _) in outputs(family).items()
    }
    with all_in_float64():
        torch.testing.assert_close(model(**data).logits, reference(**data).logits, rtol=0, atol=0)
        masks = draw(estimation)
        theirs = {name: value.detach().clone().requires_grad_() for name, value in masks.items()}
        for training in (False, True):
            ours = model.train(training)(**data)
            expected = functional_call(reference, scaled_weights(reference, family, theirs), (), data)
            torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-10, atol=1e-10)
        ours.loss.backward()
        expected.loss.backward()
    assert_close(gradients(masks), gradients(theirs))
    assert all(value.any() for value in gradients(masks).values())


def test_units_that_layers_share_have_one_mask() -> None:
    """T5: the heads of a stack share their relative position bias."""
    model = adapted("t5")
    estimation = attach_masks(model, CONFIG)
    tied = [group for group in estimation.groups if len(group.outputs) > 1]
    assert tied
    masks = draw(estimation)
    reference = copy.deepcopy(model)
    detach_masks(reference)
    theirs = {name: value.detach().clone().requires_grad_() for name, value in masks.items()}
    head, weights = find_head(reference), {}
    for group in estimation.groups:
        for cut in group.outputs:
            factors = theirs[group.name].repeat_interleave(cut.blocks[0][1])
            name, layer = f"base_model.model.{cut.module}", head.get_submodule(cut.module)
            weights[f"{name}.base_layer.weight"] = layer.base_layer.weight.detach() * factors
            weights[f"{name}.lora_A.default.weight"] = layer.lora_A["default"].weight.detach() * factors
    with all_in_float64():
        ours, expected = model(**batch("t5")), functional_call(reference, weights, (), batch("t5"))
        ours.loss.backward()
        expected.loss.backward()
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-10, atol=1e-10)
    assert_close(gradients(masks), gradients(theirs))


@pytest.mark.parametrize("masks_first", [True, False])
@pytest.mark.parametrize("keep", [1.0, 0.4])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_with_token_tune(family: str, keep: float, masks_first: bool) -> None:
    """Both passes of TokenTune go through the masks: as if the weights were scaled."""
    tokens = TokenTuneConfig(keep=keep, seed=3)
    model, reference = adapted(family), token_tune(adapted(family), tokens).train()
    if masks_first:
        estimation = attach_masks(model, CONFIG)
        token_tune(model, tokens)
    else:
        estimation = attach_masks(token_tune(model, tokens), CONFIG)
    model.train()
    masks = draw(estimation)
    theirs = {name: value.detach().clone().requires_grad_() for name, value in masks.items()}
    with all_in_float64():
        ours = model(**batch(family))
        expected = functional_call(reference, scaled_weights(reference, family, theirs), (), batch(family))
        torch.testing.assert_close(ours.loss, expected.loss)
        ours.loss.backward()
        expected.loss.backward()
    assert_close(gradients(masks), gradients(theirs))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapted("bert")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        masks = draw(attach_masks(model, CONFIG))
        model(**batch("bert")).loss.backward()
        results.append(gradients(masks))
    assert_close(*results, rtol=0, atol=0)


def test_gradients_in_half_precision() -> None:
    """Under autocast near those of float32; a sum over tokens that float16 cannot hold is finite."""
    results = []
    for autocast in (False, True):
        model = adapted("bert", dtype=torch.float32)
        masks = draw(attach_masks(model, CONFIG), torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch("bert")).loss
        loss.backward()
        results.append(torch.cat(list(gradients(masks).values())))
    assert results[1].dtype == torch.float32
    assert torch.cosine_similarity(*results, dim=0) > 0.99
    mask = torch.ones(2, requires_grad=True)
    x = torch.full((1000, 6), 30.0, dtype=torch.float16, requires_grad=True)
    y = _Scale.apply(x, mask)
    assert y.dtype == torch.float16
    y.backward(torch.full_like(y, 3000.0))
    expected = torch.full((2,), 3000.0 * 30 * 3000)  # one product alone is above 65504
    torch.testing.assert_close(mask.grad, expected)


def test_a_mask_whose_input_needs_no_gradient() -> None:
    mask = torch.tensor([2.0, 3.0], requires_grad=True)
    _Scale.apply(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), mask).sum().backward()
    assert mask.grad.tolist() == [3.0, 7.0]


# -- the optimizer -------------------------------------------------------------------------------------------


def penalised(task_gradient: dict[str, list[Tensor]], start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adam on task loss + λ_A Σ|m_A| + λ_F Σ|m_F| with the penalty inside the loss."""
    masks = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(masks.values(), lr=1e-2)
    for step in range(3):
        loss = torch.zeros(())
        for name, value in masks.items():
            weight = 0.3 if "attention" in name else 0.02
            loss = loss + weight * value.abs().sum() + (value * task_gradient[name][step]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return masks


class Scaler:
    """As much of a GradScaler as is used."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_step_is_adam_on_the_penalised_loss(scale: float | None) -> None:
    config = LightPeftConfig(heads=0.25, neurons=0.25, lambda_heads=0.3, lambda_neurons=0.02)
    estimation = attach_masks(adapted("bert", dtype=torch.float32), config)
    with torch.no_grad():
        for value in estimation.masks.values():
            value.copy_(torch.randn(len(value)))
            value[0] = 0.0
    start = {name: value.detach().clone() for name, value in estimation.masks.items()}
    tasks = {name: [torch.randn(len(value)) * 0.1 for _ in range(3)] for name, value in start.items()}
    for step in range(3):
        for name, value in estimation.masks.items():
            value.grad = tasks[name][step] * (scale or 1.0)
        estimation.step(Scaler(scale) if scale else None)
        assert all(value.grad is None for value in estimation.masks.values())
    ours = {name: value.detach() for name, value in estimation.masks.items()}
    theirs = {name: value.detach() for name, value in penalised(tasks, start).items()}
    assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert all((ours[name] != start[name]).any() for name in ours)


def test_a_step_whose_gradients_overflowed_is_left_out() -> None:
    estimation = attach_masks(adapted("bert", dtype=torch.float32), CONFIG)
    for step, bad in enumerate((0.1, float("inf"), float("nan"), 0.1)):
        for value in estimation.masks.values():
            value.grad = torch.full_like(value, 0.1)
        next(iter(estimation.masks.values())).grad[1] = bad
        before = estimation.state()
        estimation.step(Scaler(8.0))
        after = estimation.state()
        assert all(value.grad is None for value in estimation.masks.values())
        same = step > 0 and all(torch.equal(value, before[name]) for name, value in after.items())
        assert same == (step in (1, 2))


def test_a_layer_that_was_skipped_has_only_its_penalty() -> None:
    estimation = attach_masks(adapted("bert", dtype=torch.float32), CONFIG)
    estimation.step()
    for value in estimation.masks.values():  # Adam's first step has the size of its learning rate
        torch.testing.assert_close(value.detach(), torch.full_like(value, 1 - 1e-2))


def test_state_goes_on_where_it_was_taken() -> None:
    def steps(estimation: Estimation, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for value in estimation.masks.values():
                value.grad = torch.randn(len(value), generator=generator)
            estimation.step()

    whole = attach_masks(adapted("bert", dtype=torch.float32), CONFIG)
    steps(whole, range(5))
    first = attach_masks(adapted("bert", dtype=torch.float32), CONFIG)
    steps(first, range(3))
    state = first.state()
    steps(first, range(3, 4))  # the state is a copy
    second = attach_masks(adapted("bert", dtype=torch.float32), CONFIG)
    second.load_state(state)
    steps(second, range(3, 5))
    ours, theirs = second.state(), whole.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    fewer = attach_masks(adapted("bert"), LightPeftConfig(heads=0.25, neurons=0))
    with pytest.raises(UserError, match=r"'encoder.*' has 64 masks in the checkpoint and no here"):
        fewer.load_state(state)


# -- on and off ----------------------------------------------------------------------------------------------


def traces(model: PeftModel) -> dict[str, Any]:
    """Whatever a mask could leave behind."""
    found: dict[str, Any] = {"parameters": [name for name, _ in model.named_parameters()]}
    found["state"] = list(model.state_dict())
    found["head"] = sorted(find_head(model).__dict__)
    for name, module in model.named_modules():
        for kind, hooks in vars(module).items():
            if "hooks" in kind and isinstance(hooks, dict):
                found[f"{name} {kind}"] = len(hooks)
    return found


def test_detaching_leaves_no_trace() -> None:
    model = adapted("bert")
    before = traces(model)
    expected = model(**batch("bert")).logits
    estimation = attach_masks(model, LightPeftConfig(modules=0.5, ranks=0.5))
    during = traces(model)
    assert during["parameters"] == before["parameters"] and during["state"] == before["state"]
    assert during != before and estimation_of(model) is estimation
    draw(estimation)
    assert not torch.equal(model(**batch("bert")).logits, expected)
    detach_masks(model)
    detach_masks(model)
    assert traces(model) == before and estimation_of(model) is None
    assert torch.equal(model(**batch("bert")).logits, expected)


def test_attaching_again_replaces() -> None:
    model = adapted("bert")
    attach_masks(model, CONFIG)
    once = traces(model)
    first = estimation_of(model)
    assert attach_masks(model, CONFIG) is not first
    assert traces(model) == once


@pytest.mark.parametrize(("ratios", "sizes"), [((0.25, 0), {4}), ((0, 0.25), {64}), ((0, 0), set())])
def test_only_what_is_pruned_gets_masks(ratios: tuple[float, float], sizes: set[int]) -> None:
    config = LightPeftConfig(heads=ratios[0], neurons=ratios[1], modules=0.5)
    assert {len(value) for value in attach_masks(adapted("bert"), config).masks.values()} == sizes


def test_a_model_without_known_groups_can_lose_modules_and_ranks() -> None:
    """`groups` are not looked for when no masks are wanted."""
    estimation = attach_masks(adapted("bert"), LightPeftConfig(heads=0, neurons=0, ranks=0.5), groups=())
    assert not estimation.masks
    estimation.step()


def test_refusals() -> None:
    with pytest.raises(UserError, match="needs a model with an adapter"):
        attach_masks(tiny("bert", "classification"), CONFIG)
    with pytest.raises(UserError, match="all 0: there is nothing to prune"):
        attach_masks(adapted("bert"), LightPeftConfig(heads=0, neurons=0))
    estimation = attach_masks(adapted("bert"), CONFIG)
    with pytest.raises(UserError, match="modules=0"):
        estimation.module_importance()
    with pytest.raises(UserError, match="ranks=0"):
        estimation.rank_importance()
