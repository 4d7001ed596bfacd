"""Importance of modules and ranks against loops over tokens, ranks and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from leantune import TokenTuneConfig, UserError, token_tune
from leantune.anatomy import find_head
from leantune.lamda.layer import LamdaLinear
from leantune.lightpeft.config import LightPeftConfig
from leantune.lightpeft.estimation import Estimation, attach_masks
from tests.lightpeft.masked import TARGETS, adapted, batch
from tests.tiny_models import all_in_float64

Inputs = dict[str, list[Tensor]]
MODULES = LightPeftConfig(heads=0, neurons=0, modules=0.5)


def ranks(variant: str) -> LightPeftConfig:
    return LightPeftConfig(heads=0, neurons=0, ranks=0.5, taylor=variant)


def by_name(model: PeftModel) -> dict[str, Any]:
    """Adapted layers by name in the plain model, found by what they hold."""
    return {n: m for n, m in find_head(model).named_modules() if hasattr(m, "base_layer")}


@contextmanager
def inputs_of(model: PeftModel) -> Iterator[Inputs]:
    """What each adapted layer was given."""
    seen: Inputs = {}
    handles = [
        layer.register_forward_hook(
            lambda m, args, out, n=name: seen.setdefault(n, []).append(args[0].detach())
        )
        for name, layer in by_name(model).items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


def measure(model: PeftModel, *batches: dict[str, Tensor]) -> dict[str, float]:
    estimation = attach_masks(model, MODULES)
    for data in batches:
        estimation.begin_step(measure=True)
        model(**data).loss.backward()
        estimation.step()
    return estimation.module_importance()


def delta(layer: Any) -> Tensor:
    """The adapter as one matrix (d_out, d_in), scale 2/4."""
    if isinstance(layer, LamdaLinear):
        A, S, B = (getattr(layer, n)["default"] for n in ("lamda_A", "lamda_S", "lamda_B"))
        held = dict(layer.lamda_S0.items()), dict(layer.lamda_B0.items())
        S0 = held[0].get("default", torch.ones(len(S), dtype=S.dtype)).diag()
        B0 = held[1].get("default", torch.zeros_like(B))
        return 0.5 * (B0 @ S + B @ (S0 + S)) @ A
    return 0.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


@torch.no_grad()
def token_ratios(layer: Any, x: Tensor, real: Tensor) -> list[float]:
    """The ratio of each real token, one at a time; x (batch, n, d_in), real (batch, n)."""
    change, W, bias = delta(layer), layer.base_layer.weight, layer.base_layer.bias
    ratios = []
    for row, token in real.nonzero().tolist():
        frozen = W @ x[row, token] + (0 if bias is None else bias)
        ratios.append(float((change @ x[row, token]).norm() / frozen.norm()))
    return ratios


@pytest.mark.parametrize("method", ["lora", "lamda"])
@pytest.mark.parametrize(("family", "padding"), [("bert", "right"), ("llama", "left"), ("llama", None)])
def test_module_importance(family: str, padding: str | None, method: str) -> None:
    """Two batches: the mean over all real tokens of both."""
    model, data = adapted(family, method), [batch(family, seed=seed, padding=padding) for seed in (1, 2)]
    ones = torch.ones(4, 10)
    with all_in_float64(), inputs_of(model) as seen:
        ours = measure(model, *data)
    assert ours.keys() == by_name(model).keys()
    for name, layer in by_name(model).items():
        pairs = zip(seen[name], data, strict=True)
        ratios = [r for x, one in pairs for r in token_ratios(layer, x, one.get("attention_mask", ones))]
        assert ours[name] == pytest.approx(sum(ratios) / len(ratios), rel=1e-9)


@pytest.mark.parametrize("mode", ["serial", "parallel"])
def test_bottleneck(mode: str) -> None:
    """A serial adapter reads the frozen output, and is measured against it; biases along the ranks count."""
    targets = ["query", "attention.output.dense"]
    model, data = adapted("bert", "bottleneck", targets=targets, mode=mode), batch("bert")
    estimation = attach_masks(model, LightPeftConfig(heads=0, neurons=0, modules=0.5, ranks=0.5))
    estimation.begin_step(measure=True)
    with inputs_of(model) as seen:
        model(**data).loss.backward()
    estimation.step()
    for name, layer in by_name(model).items():
        down, up = layer.bottleneck_down["default"].detach(), layer.bottleneck_up["default"].detach()
        biases = [b["default"].detach() for b in (layer.bottleneck_down_bias, layer.bottleneck_up_bias)]
        frozen = layer.base_layer(seen[name][0]).detach()
        read, ratios = frozen if mode == "serial" else seen[name][0], []
        for row, token in data["attention_mask"].nonzero().tolist():
            added = up @ (down @ read[row, token] + biases[0]).relu() + biases[1]
            ratios.append(float(0.5 * added.norm() / frozen[row, token].norm()))
        assert estimation.module_importance()[name] == pytest.approx(_mean(ratios), rel=1e-9)
        grads = [t["default"].grad for t in (layer.bottleneck_down, layer.bottleneck_up)]
        grads.append(layer.bottleneck_down_bias["default"].grad)
        expected = (
            (down * grads[0]).abs().sum(1) + (up * grads[1]).abs().sum(0) + (biases[0] * grads[2]).abs()
        )
        torch.testing.assert_close(estimation.rank_importance()[name], expected)


@pytest.mark.parametrize("given", [True, False])
def test_both_sides_of_a_seq2seq_model(given: bool) -> None:
    """Encoder, decoder, and cross-attention, whose keys and values read the encoder's tokens."""
    model, data = adapted("bart"), batch("bart")
    # 10 and 7 tokens; the decoder's padding ends where the labels do
    labels = data["labels"].masked_fill(data["labels"] == -100, 5)
    sizes = torch.tensor([7, 5, 6, 2])
    real = torch.arange(7) < sizes[:, None]
    data["labels"] = labels.masked_fill(~real, -100)
    if given:
        data["decoder_attention_mask"] = real.long()
    with inputs_of(model) as seen:
        ours = measure(model, data)
    cross = [n for n in ours if "encoder_attn.k_proj" in n]
    assert len(cross) == 3
    for name, layer in by_name(model).items():
        x = seen[name][0]
        mask = data["attention_mask"] if x.shape[1] == 10 else real
        assert ours[name] == pytest.approx(_mean(token_ratios(layer, x, mask)), rel=1e-9)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_pooled_vectors_are_measured_too() -> None:
    """No mask has the shape of a pooler's output: all of it counts."""
    model, data = adapted("bert", targets=["query", "pooler.dense"]), batch("bert")
    with inputs_of(model) as seen:
        ours = measure(model, data)
    layer = by_name(model)["bert.pooler.dense"]
    ratios = token_ratios(layer, seen["bert.pooler.dense"][0][:, None], torch.ones(4, 1))
    assert ours["bert.pooler.dense"] == pytest.approx(_mean(ratios), rel=1e-9)


def test_every_module_is_measured_under_token_tune() -> None:
    """The first pass sees all tokens; of the last layer some modules run in the second pass only."""
    model = token_tune(adapted("bert"), TokenTuneConfig(keep=0.4, strategy="random")).train()
    plain = adapted("bert")
    ours, theirs = measure(model, batch("bert")), measure(plain, batch("bert"))
    for name, value in theirs.items():
        last = "layer.2" in name and "value" not in name
        assert ours[name] == pytest.approx(value, rel=0.3 if last else 1e-6), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_layers_twice(reentrant: bool) -> None:
    plain, model = adapted("bert"), adapted("bert")
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    data = [batch("bert", seed=1), batch("bert", seed=2)]
    estimation = attach_masks(model, MODULES)
    for one in data:
        estimation.begin_step(measure=True)
        model(**one).loss.backward()
        estimation.step()
    ours, theirs = estimation.module_importance(), measure(plain, *data)
    assert ours == pytest.approx(theirs, rel=1e-12)
    tokens = estimation.state()["module_sums"][:, 1]
    assert tokens.max() == 2 * sum(int(one["attention_mask"].sum()) for one in data)


def test_a_frozen_output_of_zero_has_no_ratio() -> None:
    model, reference = adapted("bert"), adapted("bert")
    layer = by_name(model)["bert.encoder.layer.0.attention.self.query"]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
    estimation = attach_masks(model, MODULES)
    estimation.begin_step(measure=True)
    model(**batch("bert")).loss.backward()
    # a second model whose query is not zero shares the device's sums in no way
    assert measure(reference, batch("bert"))
    layer.base_layer.bias.data.fill_(1.0)
    model(**batch("bert", seed=2)).loss.backward()
    estimation.step()
    importance = estimation.module_importance()
    assert all(0 < value < 100 for value in importance.values())


def test_measuring_disturbs_nothing() -> None:
    """Dropout draws the same, the adapters' gradients are the same, evaluation is not measured."""
    for method, name in (("lora", "lora_dropout"), ("lamda", "lamda_dropout")):
        gradients = []
        for measured in (False, True):
            model = adapted("bert", method, **{name: 0.5})
            estimation = attach_masks(model, MODULES)
            estimation.begin_step(measure=measured)
            torch.manual_seed(0)
            model(**batch("bert")).loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        first = _read(estimation)
        model.eval()
        model(**batch("bert", seed=2))
        with model.disable_adapter():
            model.train()(**batch("bert", seed=2))
        assert _read(estimation) == first
        assert all(module.training for module in model.modules())


def _read(estimation: Estimation) -> dict[str, float]:
    estimation.step()
    return estimation.module_importance()


def test_nothing_is_measured_before_it_is_asked_for() -> None:
    model = adapted("bert")
    estimation = attach_masks(model, LightPeftConfig(modules=0.5, ranks=0.5))
    estimation.begin_step(measure=False)
    model(**batch("bert")).loss.backward()
    estimation.step()
    with pytest.raises(UserError, match=r"'?bert.* was not measured: .*second half"):
        estimation.module_importance()
    with pytest.raises(UserError, match="ranks was not measured"):
        estimation.rank_importance()


# -- ranks ---------------------------------------------------------------------------------------------------


def trained_tensors(layer: Any) -> list[tuple[nn.Parameter, list[int]]]:
    """Tensors of an adapter that are trained, and which of their axes are ranks."""
    if isinstance(layer, LamdaLinear):
        return [(layer.lamda_S["default"], [0, 1]), (layer.lamda_B["default"], [1])]
    return [(layer.lora_A["default"].weight, [0]), (layer.lora_B["default"].weight, [1])]


def one_step(layer: Any, r: int, variant: str) -> list[float]:
    """Importance of each rank from the gradients that are there, element by element."""
    scores = [0.0] * r
    for tensor, axes in trained_tensors(layer):
        assert tensor.grad is not None
        for axis in axes:
            for k in range(r):
                products = [
                    tensor[i, j].item() * tensor.grad[i, j].item()
                    for i in range(tensor.shape[0])
                    for j in range(tensor.shape[1])
                    if (i, j)[axis] == k
                ]
                scores[k] += sum(map(abs, products)) if variant == "terms" else abs(sum(products))
    return scores


@pytest.mark.parametrize("variant", ["terms", "sum"])
@pytest.mark.parametrize("method", ["lora", "lamda"])
def test_rank_importance(method: str, variant: str) -> None:
    """Mean over the measured steps; modules may differ in rank."""
    model = adapted("bert", method, rank_pattern={"layer.1.attention.self.value": 2})
    estimation = attach_masks(model, ranks(variant))
    expected: dict[str, list[list[float]]] = {name: [] for name in by_name(model)}
    for seed, measured in ((1, False), (2, True), (3, True)):
        model.zero_grad()
        estimation.begin_step(measure=measured)
        model(**batch("bert", seed=seed)).loss.backward()
        estimation.step()
        for name, layer in by_name(model).items() if measured else ():
            r = 2 if "layer.1.attention.self.value" in name else 4
            expected[name].append(one_step(layer, r, variant))
    ours = estimation.rank_importance()
    assert ours.keys() == expected.keys()
    for name, steps in expected.items():
        torch.testing.assert_close(
            ours[name], torch.tensor(steps, dtype=torch.float64).mean(0), rtol=1e-9, atol=1e-15
        )
    assert {len(value) for value in ours.values()} == {2, 4}


def test_frozen_tensors_have_no_say() -> None:
    """LaMDA's A is a buffer; a LoRA A that is frozen (LoRA-FA) is left out as well."""
    model = adapted("bert", targets=["query"])
    for layer in by_name(model).values():
        layer.lora_A["default"].weight.requires_grad_(False)
    estimation = attach_masks(model, ranks("terms"))
    estimation.begin_step(measure=True)
    model(**batch("bert")).loss.backward()
    estimation.step()
    for name, layer in by_name(model).items():
        B = layer.lora_B["default"].weight
        torch.testing.assert_close(estimation.rank_importance()[name], (B * B.grad).abs().sum(0).detach())


def test_a_step_that_overflowed_is_left_out() -> None:
    model = adapted("bert")
    estimation = attach_masks(model, ranks("terms"))
    estimation.begin_step(measure=True)
    model(**batch("bert")).loss.backward()
    estimation.step()
    expected = estimation.rank_importance()
    by_name(model)["bert.encoder.layer.2.output.dense"].lora_B["default"].weight.grad[0, 0] = float("inf")
    estimation.step()
    ours = estimation.rank_importance()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())
    assert set(expected) == set(by_name(model)) and len(TARGETS["bert"]) * 3 == len(expected)
