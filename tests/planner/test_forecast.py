"""Forecasts against what the CPU's allocator and autograd measure on the same models for real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from leantune.errors import UserError
from leantune.planner import CannotTrace, Setting, Tracer, estimate, trace
from leantune.planner.measured import measure, measure_saved
from tests.planner.settings import LAMDA, LORA, setting

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "full": ("llama", {}, {}),
    "tied weights": ("gpt2", {}, {"padded": True}),
    "lora": ("bert", {"adapter": LORA}, {"padded": True}),
    "disentangled": ("deberta", {"adapter": LORA}, {}),
    "lora, checkpointed": ("llama", {"adapter": LORA}, {"gradient_checkpointing": True}),
    "lora, accumulating": ("bert", {"adapter": LORA}, {"gradient_accumulation_steps": 2}),
    "lamda, frozen": ("llama", {"adapter": LAMDA}, {"stage": "frozen"}),
    "tokentune": ("bert", {"tokens": {"keep": 0.25}}, {}),
    "light-peft": ("llama", {"adapter": LORA, "prune": {}}, {"padded": True}),
    "light-peft, first stage": ("bert", {"adapter": LORA, "prune": {}}, {"stage": "estimate"}),
    "lean": ("llama", {"adapter": LAMDA, "prune": {}, "tokens": {"keep": 12}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_both_engines_are_near_what_is_measured(case: str) -> None:
    model, lean, how = CASES[case]
    made = setting(model, lean, **how)
    traced, closed, real = trace(made), estimate(made), measure(made)
    # kernels' own workspaces; under checkpointing also each layer's random state of 5 KB
    assert traced.peak == pytest.approx(real.peak, rel=1e-2 if made.checkpointing else 3e-3)
    assert traced.evaluation_peak == pytest.approx(real.evaluation_peak, rel=1e-2)
    assert traced.saved_activation_bytes == measure_saved(made)
    assert closed.peak == pytest.approx(real.peak, rel=0.2)
    assert closed.evaluation_peak == pytest.approx(real.evaluation_peak, rel=0.2)
    rounding = 0.05 if made.recipe.lean.prune is not None else 0  # widths of fewer layers
    assert closed.parameters == pytest.approx(traced.parameters, rel=rounding)
    assert closed.trained == pytest.approx(traced.trained, rel=rounding)
    assert closed.flops == pytest.approx(traced.flops, rel=0.3)


def test_ranks_that_only_weights_tell_are_their_mean() -> None:
    ranks = {"spectral_ranks": {"budget": LAMDA["r"]}}
    even, spectral = (setting("llama", {"adapter": LAMDA | more}) for more in ({}, ranks))
    for engine in (trace, estimate):
        assert engine(spectral).peak == engine(even).peak


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_quantised_bases_are_near_bitsandbytes(storage: str) -> None:
    pytest.importorskip("bitsandbytes")
    made = setting("llama", {"adapter": LORA, "quantize": storage})
    real = measure(made).peak
    assert trace(made).peak == pytest.approx(real, rel=0.02)
    assert estimate(made).peak == pytest.approx(real, rel=0.2)


def test_quantised_weights_take_the_bytes_that_they_should() -> None:
    plain, packed = (setting("llama", {"adapter": LORA, "quantize": how}) for how in (None, "nf4"))
    base = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)  # weights in the layers' linear maps
    for engine in (trace, estimate):
        saved = engine(plain).memory.weights - engine(packed).memory.weights
        assert saved == base * 4 - base // 2
        scales = engine(packed).memory.quantization
        assert base // 64 < scales < base // 64 + 40_000  # a byte for 64, small tables; a weight in use
    with pytest.raises(UserError, match="lean.quantize = 'int8-torchao': a plan is made for nf4, fp4, int8"):
        estimate(setting("llama", {"adapter": LORA, "quantize": "int8-torchao"}))


def test_mixed_precision_is_traced() -> None:
    made = setting("llama", {"adapter": LORA}, bf16=True)
    assert trace(made).peak == pytest.approx(measure(made).peak, rel=3e-3)


def test_one_tracer_gives_what_new_ones_give() -> None:
    tracer = Tracer()
    lean = {"adapter": LORA, "tokens": {"keep": 0.5}}
    settings = [setting("bert", lean), setting("bert", lean | {"tokens": {"keep": 0.1}})]
    assert [tracer.trace(each) for each in settings] == [trace(each) for each in settings]


def test_parts_are_what_they_say() -> None:
    figures = trace(setting("llama", {}))
    weights = figures.parameters * 4
    assert weights <= figures.memory.weights < weights * 1.01  # buffers
    assert figures.memory.optimizer == pytest.approx(2 * weights, rel=1e-3)
    assert figures.saving_peak == figures.memory.weights + figures.memory.optimizer
    frozen = trace(setting("llama", {"adapter": LAMDA}, stage="frozen"))
    assert frozen.trained < trace(setting("llama", {"adapter": LAMDA})).trained
    # two operations a multiply-add, twice as many backward
    assert figures.backward_flops == pytest.approx(2 * (figures.forward_flops or 0), rel=0.05)


def test_attention_with_dropout_keeps_no_scores_on_cuda() -> None:
    made = setting("bert", {"adapter": LORA})
    for engine in (trace, estimate):
        assert engine(replace(made, device="cuda")).peak < engine(made).peak


def test_no_weight_is_allocated() -> None:
    made = setting("llama", {"adapter": LORA})
    vast = replace(made, config=type(made.config)(**made.config.to_dict() | {"intermediate_size": 1 << 24}))
    assert trace(vast).memory.weights > 30 << 30  # far more than a test may take


def test_layers_that_are_alike_are_counted_not_built() -> None:
    made = setting("llama", {"adapter": LORA})
    deep = replace(made, config=type(made.config)(**made.config.to_dict() | {"num_hidden_layers": 7}))
    named = deep.recipe.model_copy(deep=True)
    named.lean.adapter.target_modules = r".*layers\.(0|1|2|3|4|5|6)\..*_proj"  # type: ignore[union-attr]
    # the same layers by number: then every one is looked at
    assert estimate(deep) == estimate(replace(deep, recipe=named))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 129}, "length = 129: the model reads at most 128 tokens"),
        ({"batch": 0}, "batch = 0"),
    ],
)
def test_refusals(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        trace(replace(setting("llama", {}), **change))


def test_what_is_not_planned_for_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="train.optim = 'adafactor'"):
        trace(setting("llama", {}, optim="adafactor"))
    with pytest.raises(UserError, match="its config names no vocab_size and no hidden_size"):
        estimate(replace(setting("llama", {}), config=PretrainedConfig()))


def test_code_that_looks_at_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.SiLU.forward

    def looking(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) if bool((x > 0).any()) else x

    monkeypatch.setattr(nn.SiLU, "forward", looking)
    made: Setting = setting("llama", {})
    made.config.hidden_act = "swish"
    with pytest.raises(CannotTrace, match="cannot be traced without weights"):
        trace(made)
