"""The factors at the start: exact zero, determinism, the spectrum, dtypes, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from leantune import LamdaConfig, UserError
from leantune.lamda import freeze_columns
from leantune.lamda.init import initial_factors
from leantune.lamda.model import lamda_layers
from tests.lamda.conftest import TARGETS, batch_for, build


@pytest.mark.parametrize("init_b", ["vectors", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", ["some", "all-linear"])
def test_untrained_adapter_changes_no_bit(
    family: str, dtype: torch.dtype, init_b: str, targets: str, logits: Any
) -> None:
    base = build(family).to(dtype)
    before = logits(base, family)
    config = LamdaConfig(
        r=4,
        target_modules=TARGETS[family] if targets == "some" else "all-linear",
        init_b=init_b,
        init_scale="spectrum",
        task_type="SEQ_CLS" if family == "bert" else None,
    )
    model = get_peft_model(base, config)
    assert torch.equal(logits(model, family), before)
    model.train()
    assert torch.equal(model(**batch_for(family)).logits, before)


def test_random_start_is_not_the_base(family: str, logits: Any) -> None:
    base = build(family)
    before = logits(base, family)
    model = get_peft_model(base, LamdaConfig(r=4, target_modules=TARGETS[family], init_weights=False))
    assert not torch.allclose(logits(model, family), before, atol=1e-3)


def test_svd_factors_are_the_leading_singular_triplets() -> None:
    torch.manual_seed(0)
    W = torch.randn(300, 20) @ torch.diag(0.7 ** torch.arange(20.0)) @ torch.randn(20, 400)
    A, S0, B0 = initial_factors(W, 4, LamdaConfig(init_scale="spectrum"))
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    torch.testing.assert_close(S0.double(), sigma[:4], rtol=1e-4, atol=0)
    torch.testing.assert_close((Vh[:4] @ A.T.double()).abs(), torch.eye(4).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close((U[:, :4].T @ B0.double()).abs(), torch.eye(4).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(A @ W.T @ B0, torch.diag(S0), rtol=0, atol=S0[0].item() * 1e-4)


def test_smallest_and_order() -> None:
    torch.manual_seed(0)
    W = torch.randn(6, 5)
    sigma = torch.linalg.svdvals(W)
    for init, order, expected in (
        ("svd", "largest", sigma[:2]),
        ("svd", "smallest", sigma[:2].flip(0)),
        ("smallest", "largest", sigma[3:]),
    ):
        config = LamdaConfig(init=init, freeze_order=order, init_scale="spectrum")
        A, S0, B0 = initial_factors(W, 2, config)
        torch.testing.assert_close(S0, expected)
        torch.testing.assert_close(A @ W.T @ B0, torch.diag(S0), rtol=0, atol=1e-5)
        assert A.is_contiguous()
        assert B0.is_contiguous()


@pytest.mark.parametrize("init", ["svd", "smallest", "random", "orthogonal"])
def test_init_is_deterministic_and_leaves_the_random_state_alone(init: str) -> None:
    torch.manual_seed(0)
    W = torch.randn(300, 280)
    config = LamdaConfig(init=init)
    first = initial_factors(W, 5, config)
    state = torch.get_rng_state()
    second = initial_factors(W, 5, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if init != "smallest":
        other = initial_factors(W, 5, LamdaConfig(init=init, svd_seed=1))
        assert not torch.equal(other.A, first.A)
    if init == "orthogonal":
        torch.testing.assert_close(first.A @ first.A.T, torch.eye(5))
    if init in ("svd", "smallest"):
        at = first.A.abs().argmax(dim=1, keepdim=True)
        assert (first.A.gather(1, at) > 0).all()


def test_normalised_scale_and_a_weight_of_zeros() -> None:
    torch.manual_seed(0)
    S0 = initial_factors(torch.randn(9, 8), 3, LamdaConfig(init_scale="normalized")).S0
    torch.testing.assert_close(S0.mean(), torch.tensor(1.0))
    zeros = initial_factors(torch.zeros(9, 8), 3, LamdaConfig(init_scale="normalized"))
    assert all(torch.isfinite(t).all() for t in zeros)
    assert torch.equal(zeros.S0, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_the_adapter(dtype: torch.dtype) -> None:
    config = LamdaConfig(r=4, target_modules=TARGETS["llama"], init_b="vectors")
    layer = next(iter(lamda_layers(get_peft_model(build("llama").to(dtype), config)).values()))
    assert layer.lamda_A["default"].dtype == dtype
    assert layer.lamda_S["default"].dtype == layer.lamda_B["default"].dtype == torch.float32
    plain = get_peft_model(build("llama").to(dtype), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in plain.parameters()} == {dtype}


def test_bfloat16_autocast_and_float32_agree() -> None:
    torch.manual_seed(0)
    base = build("llama")
    model = get_peft_model(base, LamdaConfig(r=4, target_modules=TARGETS["llama"], init_weights=False))
    batch = batch_for("llama")
    exact = torch.autograd.grad(model(**batch).loss, [p for p in model.parameters() if p.requires_grad])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    mixed = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(mixed, exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99


def test_rank_and_alpha_patterns_and_layers_to_transform() -> None:
    config = LamdaConfig(
        r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6},
        lamda_alpha=2,
    )  # fmt: skip
    layers = lamda_layers(get_peft_model(build("llama"), config))
    for name, layer in layers.items():
        expected = (2, 3.0) if name.endswith("q_proj") else (4, 0.5)
        assert (layer.r["default"], layer.scaling["default"]) == expected
        assert layer.lamda_S["default"].shape == (expected[0], expected[0])
    default = lamda_layers(get_peft_model(build("llama"), LamdaConfig(r=4, target_modules=["q_proj"])))
    assert {layer.scaling["default"] for layer in default.values()} == {1.0}
    one = LamdaConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1])
    assert [".1." in name for name in lamda_layers(get_peft_model(build("llama"), one))] == [True]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 4.0}, "r=4.0"),
        ({"r": True}, "r=True"),
        ({"lamda_alpha": 0}, "lamda_alpha=0"),
        ({"lamda_dropout": 1.0}, "lamda_dropout=1.0"),
        ({"init": "pissa"}, "init='pissa': must be one of 'svd'"),
        ({"init": "gradient", "init_scale": "spectrum"}, "init_scale='spectrum' with init='gradient'"),
        ({"init": "activation", "init_b": "vectors"}, "init_b='vectors' with init='activation'"),
        ({"init_scale": "raw"}, "init_scale='raw'"),
        ({"init_b": "U"}, "init_b='U'"),
        ({"freeze_ratio": 1.5}, "freeze_ratio=1.5"),
        ({"freeze_ratio": float("nan")}, "freeze_ratio=nan"),
        ({"freeze_ratio": 0.0}, "could never learn"),
        ({"freeze_order": "random"}, "freeze_order='random'"),
        ({"bias": "lora_only"}, "bias='lora_only': must be one of 'none', 'all', 'lamda_only'"),
        ({"svd_iterations": -1}, "svd_iterations=-1"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q']=0"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern['q']=-1"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform=[0]"),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, "layers_pattern='layers'"),
    ],
)
def test_config_says_what_is_wrong(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        LamdaConfig(**settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_rank_above_the_layer_and_unsupported_layers_are_named() -> None:
    with pytest.raises(
        UserError, match=r"r=17 is above the size of layer 'model.layers.0.self_attn.v_proj'.*16"
    ):
        get_peft_model(build("llama"), LamdaConfig(r=17, target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="embed_tokens.*Embedding"):
        get_peft_model(build("llama"), LamdaConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(build("llama"), LamdaConfig(r=2, target_modules=["nowhere"]))


def test_base_on_meta_makes_an_adapter_on_meta() -> None:
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(base, LamdaConfig(r=2, target_modules=["0"], init_b="vectors"))
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model(torch.empty(3, 8, device="meta")).shape == (3, 8)
    assert freeze_columns(model, None, 1, 1) == 2
