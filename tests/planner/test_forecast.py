"""Forecasts against what the CPU's allocator and autograd measure on the same models for real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from leantune.errors import UserError
from leantune.planner import CannotTrace, Setting, Tracer, estimate, trace
from leantune.planner.measured import measure_peak, measure_saved
from tests.planner.settings import LAMDA, LORA, setting

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "full": ("llama", {}, {}),
    "tied weights": ("gpt2", {}, {"padded": True}),
    "lora": ("bert", {"adapter": LORA}, {"padded": True}),
    "lora, checkpointed": ("llama", {"adapter": LORA}, {"gradient_checkpointing": True}),
    "lora, accumulating": ("bert", {"adapter": LORA}, {"gradient_accumulation_steps": 2}),
    "lamda": ("gpt2", {"adapter": LAMDA}, {}),
    "lamda, frozen": ("llama", {"adapter": LAMDA}, {"stage": "frozen"}),
    "tokentune": ("bert", {"tokens": {"keep": 0.25}}, {}),
    "light-peft": ("llama", {"adapter": LORA, "prune": {}}, {"padded": True}),
    "light-peft, first stage": ("bert", {"adapter": LORA, "prune": {}}, {"stage": "estimate"}),
    "lean": ("llama", {"adapter": LAMDA, "prune": {}, "tokens": {"keep": 12}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_traced_equals_measured(case: str) -> None:
    model, lean, how = CASES[case]
    made = setting(model, lean, **how)
    figures = trace(made)
    # kernels' own workspaces; under checkpointing also each layer's random state of 5 KB
    assert figures.peak == pytest.approx(measure_peak(made), rel=1e-2 if made.checkpointing else 2e-3)
    assert figures.saved_activation_bytes == measure_saved(made)


@pytest.mark.parametrize("lean", [{}, {"adapter": LORA}, {"adapter": LAMDA}], ids=["full", "lora", "lamda"])
@pytest.mark.parametrize("model", ["llama", "bert"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_closed_form_is_near(model: str, lean: dict[str, Any], checkpointing: bool) -> None:
    made = setting(model, lean, gradient_checkpointing=checkpointing)
    traced, closed = trace(made), estimate(made)
    assert closed.peak == pytest.approx(traced.peak, rel=0.2)
    assert (closed.parameters, closed.trained) == (traced.parameters, traced.trained)


def test_mixed_precision_is_traced() -> None:
    made = setting("llama", {"adapter": LORA}, bf16=True)
    assert trace(made).peak == pytest.approx(measure_peak(made), rel=2e-3)
    assert trace(made).peak < trace(setting("llama", {"adapter": LORA})).peak


def test_one_tracer_gives_what_new_ones_give() -> None:
    tracer = Tracer()
    lean = [{"adapter": LORA, "tokens": {"keep": keep}} for keep in (0.5, 0.1)]
    settings = [setting("bert", each) for each in lean] + [replace(setting("bert", lean[1]), batch=2)]
    assert [tracer.trace(each) for each in settings] == [trace(each) for each in settings]


def test_parts_are_what_they_say() -> None:
    figures = trace(setting("llama", {}))
    weights = figures.parameters * 4
    assert weights <= figures.memory.weights < weights * 1.01  # buffers
    assert figures.memory.optimizer == pytest.approx(2 * weights, rel=1e-3)
    frozen = trace(setting("llama", {"adapter": LAMDA}, stage="frozen"))
    assert frozen.trained < trace(setting("llama", {"adapter": LAMDA})).trained
    # two operations a multiply-add, twice as many backward
    assert figures.backward_flops == pytest.approx(2 * figures.forward_flops, rel=0.05)


def test_attention_with_dropout_keeps_no_scores_on_cuda() -> None:
    made = setting("bert", {"adapter": LORA})
    assert trace(replace(made, device="cuda")).peak < trace(made).peak


def test_no_weight_is_allocated() -> None:
    made = setting("llama", {"adapter": LORA})
    vast = replace(made, config=type(made.config)(**made.config.to_dict() | {"intermediate_size": 1 << 24}))
    assert trace(vast).memory.weights > 40 << 30  # far more than a test may take


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


def test_unknown_optimizer_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="train.optim = 'adafactor'"):
        trace(setting("llama", {}, optim="adafactor"))


def test_code_that_looks_at_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = nn.SiLU.forward

    def looking(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) if bool((x > 0).any()) else x

    monkeypatch.setattr(nn.SiLU, "forward", looking)
    made: Setting = setting("llama", {})
    made.config.hidden_act = "swish"
    with pytest.raises(CannotTrace, match="cannot be traced without weights"):
        trace(replace(made, config=made.config))
