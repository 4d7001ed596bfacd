"""Starts from data: against full decompositions in float64, exact-zero start kept, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from leantune import LamdaConfig, UserError, prepare_lamda
from leantune.lamda import unprepared_adapters
from leantune.lamda.model import lamda_layers
from leantune.lamda.sketch import GradientSketch, InputSketch
from tests.lamda.conftest import batch_for, build, perturb

# Layers in which r = 12 makes the sketch as wide as the matrix, so that the result is exact.
WHOLE = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"], "bert": ["query", "intermediate.dense"]}
R = 12


def batches(family: str, count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Some rows padded, on the left in one batch and on the right in another."""
    made = [batch_for(family, seed=number) for number in range(count)]
    made[0]["attention_mask"][1, :3] = 0
    made[1]["attention_mask"][2, 4:] = 0
    for batch in made:
        if batch["labels"].dim() == 2:
            batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return made


def adapted(family: str, init: str, **settings: Any) -> PeftModel:
    settings = {"r": R, "target_modules": WHOLE[family], "init": init, **settings}
    return get_peft_model(build(family).double(), LamdaConfig(**settings))


def matrices(family: str, kind: str) -> dict[str, torch.Tensor]:
    """By brute force on the base alone: inputs (n, d_in) without padding, or gradients (d_out, d_in)."""
    model = build(family).double().train()
    found: dict[str, Any] = {}
    layers = {n: m for n, m in model.named_modules() if n.endswith(tuple(WHOLE[family]))}
    for batch in batches(family):
        kept: dict[str, torch.Tensor] = {}
        for name, layer in layers.items():
            layer.register_forward_hook(
                lambda m, args, out, name=name, kept=kept: kept.update({name: args[0]})
            )
        model(**batch).loss.backward()
        for name, x in kept.items():
            real = [x[i, j] for i, j in batch["attention_mask"].nonzero().tolist()]
            found.setdefault(name, []).extend(row.detach() for row in real)
    if kind == "activation":
        return {name: torch.stack(rows) for name, rows in found.items()}
    return {name: m.weight.grad.T if family == "gpt2" else m.weight.grad for name, m in layers.items()}


def equal_up_to_signs(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Columns of two orthonormal matrices."""
    eye = torch.eye(ours.shape[1], dtype=ours.dtype)
    torch.testing.assert_close((ours.T @ theirs).abs(), eye, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["activation", "gradient"])
def test_factors_equal_those_of_a_full_decomposition(family: str, kind: str) -> None:
    both = kind == "gradient"
    model = adapted(family, kind, init_scale="normalized", init_b="vectors" if both else "zero")
    prepare_lamda(model, batches(family))
    expected = matrices(family, kind)
    for name, layer in lamda_layers(model).items():
        U, sigma, Vh = torch.linalg.svd(expected[name.removeprefix("base_model.model.")], full_matrices=False)
        rank = min(R, int((sigma > 1e-9 * sigma[0]).sum()))
        assert rank >= 4
        A = layer.lamda_A["default"]
        torch.testing.assert_close(A @ A.T, torch.eye(R).double(), rtol=0, atol=1e-9)
        equal_up_to_signs(A[:rank].T, Vh[:rank].T)
        S0 = layer.lamda_S0["default"]
        torch.testing.assert_close(S0, sigma[:R] / sigma[:R].mean(), rtol=1e-5, atol=1e-6)
        if both:
            B0 = layer.lamda_B0["default"]
            equal_up_to_signs(B0[:, :rank], U[:, :rank])
            G = expected[name.removeprefix("base_model.model.")]
            diagonal = torch.diagonal(B0.T @ G @ A.T)[:rank]  # pairs and signs belong together
            torch.testing.assert_close(diagonal, sigma[:rank], rtol=1e-6, atol=0)


@pytest.mark.parametrize("init", ["activation", "gradient"])
def test_nothing_else_changes(init: str, logits: Any) -> None:
    """The output to the bit, modes, random state, gradients; and the same data give the same adapter."""
    base = build("llama")
    before = logits(base, "llama")
    config = LamdaConfig(r=4, target_modules="all-linear", init=init)
    model = get_peft_model(base, config)
    model.train()
    model.base_model.model.lm_head.eval()
    state = torch.get_rng_state()
    prepare_lamda(model, batches("llama"))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.base_model.model.lm_head.training
    assert all(p.grad is None for p in model.parameters())
    assert all(
        not layer._forward_hooks and not layer._forward_pre_hooks for layer in lamda_layers(model).values()
    )
    assert torch.equal(logits(model, "llama"), before)
    assert not unprepared_adapters(model)
    again = get_peft_model(build("llama"), LamdaConfig(r=4, target_modules="all-linear", init=init))
    prepare_lamda(again, iter(batches("llama")))
    svd = get_peft_model(build("llama"), LamdaConfig(r=4, target_modules="all-linear"))
    for name, layer in lamda_layers(model).items():
        assert torch.equal(layer.lamda_A["default"], lamda_layers(again)[name].lamda_A["default"])
        assert not torch.allclose(
            layer.lamda_A["default"], lamda_layers(svd)[name].lamda_A["default"], atol=0.1
        )
        assert layer.lamda_A["default"].is_contiguous()


def test_gradient_checkpointing_gives_the_same_start() -> None:
    plain, checkpointed = adapted("llama", "gradient"), adapted("llama", "gradient")
    inner = checkpointed.base_model.model  # the new name within transformers 5; the old one warns there
    getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)(
        {"use_reentrant": False}
    )
    for model in (plain, checkpointed):
        prepare_lamda(model, batches("llama"))
    for name, layer in lamda_layers(plain).items():
        other = lamda_layers(checkpointed)[name]
        torch.testing.assert_close(layer.lamda_A["default"], other.lamda_A["default"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_seeds_and_dtypes(dtype: torch.dtype) -> None:
    def A(**options: Any) -> torch.Tensor:
        config = LamdaConfig(r=4, target_modules=["q_proj"], init="gradient", freeze_order="smallest")
        model = get_peft_model(build("llama").to(dtype), config)
        prepare_lamda(model, batches("llama"), **options)
        layer = next(iter(lamda_layers(model).values()))
        assert layer.lamda_A["default"].dtype == dtype
        return layer.lamda_A["default"].float()

    assert torch.equal(A(), A(steps=3))
    assert not torch.allclose(A(), A(steps=1), atol=1e-2)
    close = {"rtol": 0, "atol": 0.3 if dtype == torch.bfloat16 else 0.1}
    torch.testing.assert_close((A() @ A(seed=5).T).abs().diagonal(), torch.ones(4), **close)


@pytest.mark.parametrize("n", [40, 4000])
def test_sketches_are_near_the_optimum_where_they_are_narrow(n: int) -> None:
    """Slowly falling spectrum, d = 200, r = 8: nearly all that any 8 directions could hold; any batching."""
    torch.manual_seed(0)
    x = torch.randn(n, 200).double() @ torch.diag(torch.arange(1, 201).double() ** -0.5)
    x = x @ torch.linalg.qr(torch.randn(200, 200).double())[0]
    dy = torch.randn(n, 150).double() + x[:, :150]
    like = torch.empty(0).double()

    def run(sketch: Any, chunks: int, *streams: torch.Tensor) -> Any:
        for _ in range(2):
            for parts in zip(*(stream.chunk(chunks) for stream in streams), strict=True):
                sketch.add(*parts)
            sketch.end_pass()
        return sketch.triplets()

    whole, pieces = (
        run(InputSketch(8, 200, torch.Generator().manual_seed(1), like), chunks, x) for chunks in (1, 7)
    )
    torch.testing.assert_close(whole.sigma, pieces.sigma)
    best = torch.linalg.svdvals(x)[:8].square().sum()
    assert 0.95 * best < (x @ whole.V).square().sum() <= best * (1 + 1e-9)
    G = dy.T @ x
    found = run(GradientSketch(8, 200, 150, torch.Generator().manual_seed(1), like), 7, x, dy)
    best = torch.linalg.svdvals(G)[:8].square().sum()
    assert 0.9 * best < (found.U.T @ G @ found.V).square().sum() <= best * (1 + 1e-9)


def test_training_without_data_is_refused_by_name(tmp_path: Path, logits: Any) -> None:
    before = logits(build("llama"), "llama")
    config = LamdaConfig(r=4, target_modules=["q_proj"], init="gradient", init_b="vectors")
    model = get_peft_model(build("llama"), config)
    assert unprepared_adapters(model) == ["default"]
    assert torch.equal(logits(model, "llama"), before)
    refusal = "init='gradient': adapter 'default' has seen no data yet.*leantune.prepare_lamda"
    with pytest.raises(UserError, match=refusal):
        model.train()(**batch_for("llama"))
    model.save_pretrained(str(tmp_path / "empty"))
    empty = PeftModel.from_pretrained(build("llama"), str(tmp_path / "empty"), is_trainable=True)
    with pytest.raises(UserError, match=refusal):
        empty.train()(**batch_for("llama"))
    prepare_lamda(empty, batches("llama"))
    empty.train()(**batch_for("llama")).loss.backward()
    perturb(empty)
    expected = logits(empty, "llama")
    empty.save_pretrained(str(tmp_path / "full"))
    for low in (False, True):
        loaded = PeftModel.from_pretrained(
            build("llama"), str(tmp_path / "full"), is_trainable=True, low_cpu_mem_usage=low
        )
        assert torch.equal(logits(loaded, "llama"), expected)
        loaded.train()(**batch_for("llama")).loss.backward()
    state = get_peft_model(build("llama"), LamdaConfig(**config.to_dict()))
    state.load_state_dict(empty.state_dict())  # as FSDP and plain torch do
    state.train()(**batch_for("llama"))
    assert not unprepared_adapters(state)


def test_mistakes_are_named() -> None:
    model = adapted("llama", "gradient")
    with pytest.raises(UserError, match="there is no batch"):
        prepare_lamda(model, [])
    with pytest.raises(UserError, match="give batches with labels"):
        prepare_lamda(model, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}])
    with pytest.raises(UserError, match="'nobody': the model has no LaMDA adapter"):
        prepare_lamda(model, batches("llama"), "nobody")
    assert unprepared_adapters(model) == ["default"]
    with pytest.raises(UserError, match="init='svd': the start of adapter 'default' does not come from data"):
        prepare_lamda(adapted("llama", "svd"), batches("llama"))
    prepare_lamda(model, batches("llama"))
    perturb(model)
    with pytest.raises(UserError, match="has been trained"):
        prepare_lamda(model, batches("llama"))


def test_a_layer_that_sees_nothing_is_named() -> None:
    base = build("bert").double()
    base.unused = nn.Linear(8, 8).double()
    for init, what in (("activation", "input"), ("gradient", "gradient")):
        model = get_peft_model(base, LamdaConfig(r=2, target_modules=["query", "unused"], init=init))
        with pytest.raises(
            UserError, match=f"layer 'base_model.model.unused' got no {what}.*exclude_modules"
        ):
            prepare_lamda(model, batches("bert"))
        base = model.unload()
