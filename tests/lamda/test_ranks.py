"""LaMDA++: the allocation keeps its promises, and ranks come from spectra, once, when an adapter is made."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import leantune.lamda.init as init_module
from leantune import LamdaConfig, SpectralRanks, UserError, spectral_rank_pattern
from leantune.lamda.model import lamda_layers
from leantune.lamda.ranks import allocate, even_shares
from leantune.lamda.spectral import anchored
from tests.lamda.conftest import TARGETS, batch_for, build, perturb

SMALL = SpectralRanks(budget=4, choices=(2, 4, 6, 8))


@st.composite
def problems(draw: Any) -> tuple[dict[str, float], dict[str, int], SpectralRanks, dict[str, int] | None]:
    choices = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=5)))
    budget = draw(st.integers(choices[0], choices[-1]))
    names = [f"layer.{number}" for number in range(draw(st.integers(1, 12)))]
    levels = st.sampled_from([0.1, 0.2, 0.5, 0.5000001, 1.0])  # ties are likely
    scores = {name: draw(levels) for name in names}
    sides = {name: draw(st.integers(choices[0], 50)) for name in names}
    widths = {name: draw(st.integers(2, 90)) for name in names} if draw(st.booleans()) else None
    direction = draw(st.sampled_from(["spread", "concentrated"]))
    return scores, sides, SpectralRanks(budget, choices, direction), widths


def cost(ranks: dict[str, int], widths: dict[str, int] | None) -> int:
    return sum(r * r if widths is None else r * widths[name] for name, r in ranks.items())


def in_order(
    ranks: dict[str, int], scores: dict[str, float], sides: dict[str, int], ranking: SpectralRanks
) -> bool:
    """No layer has less than one behind it in the order, unless its size allows no more."""
    sign = 1 if ranking.more_rank_to == "spread" else -1
    order = sorted(scores, key=lambda name: (sign * scores[name], name))
    most = {name: max(c for c in ranking.choices if c <= sides[name]) for name in order}
    return all(
        ranks[first] >= min(ranks[second], most[first]) for first, second in itertools.combinations(order, 2)
    )


@settings(max_examples=300, deadline=None)
@given(problems())
def test_promises_of_the_allocation(problem: Any) -> None:
    scores, sides, ranking, widths = problem
    ranks = allocate(scores, sides, ranking, widths)
    limit = cost(dict.fromkeys(scores, ranking.budget), widths)
    assert list(ranks) == list(scores)
    assert all(r in ranking.choices and r <= sides[name] for name, r in ranks.items())
    assert cost(ranks, widths) <= limit
    assert in_order(ranks, scores, sides, ranking)
    for name, r in ranks.items():  # nothing is wasted: no layer could have been raised by a choice
        larger = [c for c in ranking.choices if r < c <= sides[name]]
        raised = {**ranks, name: larger[0]} if larger else None
        assert raised is None or cost(raised, widths) > limit or not in_order(raised, scores, sides, ranking)
    backwards = dict(reversed(scores.items()))
    assert allocate(backwards, sides, ranking, widths) == ranks


def test_an_allocation_by_hand() -> None:
    """Fourteen layers at a budget of 32, which spend it all; the lowest energy comes first."""
    scores = {f"l{number:02}": number / 14 for number in range(14)}
    sides = dict.fromkeys(scores, 100)
    ranks = allocate(scores, sides, SpectralRanks(32))
    assert list(ranks.values()) == [64, 48, 48, 32, 32, 24, 24, 24, 24, 16, 16, 16, 16, 16]
    assert cost(ranks, None) == 14 * 32**2
    other = allocate(scores, sides, SpectralRanks(32, more_rank_to="concentrated"))
    assert list(other.values()) == list(ranks.values())[::-1]
    same = allocate(dict.fromkeys("cab", 0.5), dict.fromkeys("abc", 100), SpectralRanks(4, (2, 4, 5)))
    assert same == {"c": 2, "a": 5, "b": 4}  # equal scores: by name
    small = allocate(scores, {**sides, "l00": 17, "l01": 17}, SpectralRanks(32))
    assert small["l00"] == small["l01"] == 16 and small["l02"] == small["l03"] == 48


def test_even_shares_have_the_greatest_entropy() -> None:
    """Against a brute force over a fine grid."""
    prices, mean = [4, 16, 36, 64], 20.0
    shares = torch.tensor(even_shares(prices, mean), dtype=torch.float64)
    assert shares.sum().item() == pytest.approx(1)
    assert (shares @ torch.tensor(prices).double()).item() == pytest.approx(mean)

    def entropy(p: torch.Tensor) -> float:
        return -(p * p.clamp_min(1e-300).log()).sum().item()

    best = 0.0
    for first, second in itertools.product(range(201), repeat=2):
        a, b = first / 200, second / 200
        # the other two are fixed by the sum and the mean
        d = (mean - 36 - a * (4 - 36) - b * (16 - 36)) / (64 - 36)
        p = torch.tensor([a, b, 1 - a - b - d, d], dtype=torch.float64)
        if (p >= 0).all():
            best = max(best, entropy(p))
    assert best <= entropy(shares) + 1e-9 and entropy(shares) - best < 1e-3
    assert even_shares([4, 16], 4) == [1.0, 0.0] and even_shares([4, 16], 16) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SpectralRanks(0), "spectral_ranks.budget=0"),
        (lambda: SpectralRanks(8, [16, 32]), r"spectral_ranks.budget=8: must lie between.*\[16, 32\]"),
        (lambda: SpectralRanks(8, []), r"spectral_ranks.choices=\[\]"),
        (lambda: SpectralRanks(8, [4, 8.5]), "spectral_ranks.choices="),
        (lambda: SpectralRanks(8, more_rank_to="flat"), "more_rank_to='flat'.*'spread', 'concentrated'"),
        (lambda: LamdaConfig(spectral_ranks={"budgets": 8}), "'budgets'; it takes budget, choices"),
        (lambda: LamdaConfig(spectral_ranks=8), "spectral_ranks=8"),
        (lambda: LamdaConfig(spectral_ranks=SMALL, rank_pattern={"q": 2}), "rank_pattern and spectral_ranks"),
    ],
)
def test_settings_say_what_is_wrong(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def exact_scores(model: nn.Module, names: list[str], k: int) -> dict[str, float]:
    scores = {}
    for name in names:
        squares = torch.linalg.svdvals(model.get_submodule(name).weight.detach().double()).square()
        scores[name] = (squares[:k].sum() / squares.sum()).item()
    return scores


@pytest.mark.parametrize("direction", ["spread", "concentrated"])
def test_ranks_follow_the_spectra(family: str, direction: str) -> None:
    """Scores equal those of a full SVD; the ranks are the allocation's; they are in the config and model."""
    base = build(family)
    ranking = SpectralRanks(4, (2, 4, 6, 8), direction)
    config = LamdaConfig(target_modules=TARGETS[family], spectral_ranks=ranking, init_b="vectors")
    model = get_peft_model(base, config)
    layers = {name.removeprefix("base_model.model."): layer for name, layer in lamda_layers(model).items()}
    expected = exact_scores(build(family), list(layers), 4)
    assert config.spectral_scores == pytest.approx(expected, rel=1e-5)
    sides = {name: min(layer.in_features, layer.out_features) for name, layer in layers.items()}
    ranks = allocate(expected, sides, ranking)
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    assert config.rank_pattern == {anchored(name): r for name, r in ranks.items()}
    assert len(set(ranks.values())) > 1
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}


def test_saved_and_loaded_without_a_spectrum(tmp_path: Path, logits: Any, monkeypatch: Any) -> None:
    config = LamdaConfig(target_modules=TARGETS["llama"], spectral_ranks=SMALL)
    model = get_peft_model(build("llama"), config)
    perturb(model)
    expected = logits(model, "llama")
    model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["spectral_ranks"] == {"budget": 4, "choices": [2, 4, 6, 8], "more_rank_to": "spread"}
    assert saved["rank_pattern"] == config.rank_pattern and saved["spectral_scores"]
    with monkeypatch.context() as patched:
        patched.setattr(init_module, "_largest", None)
        for low in (False, True):
            loaded = PeftModel.from_pretrained(build("llama"), str(tmp_path), low_cpu_mem_usage=low)
            assert torch.equal(logits(loaded, "llama"), expected)
            assert loaded.peft_config["default"].spectral_ranks == SMALL
    # a fresh adapter from the loaded config has the very factors, computed layer by layer
    fresh = get_peft_model(build("llama"), LamdaConfig.from_pretrained(str(tmp_path)))
    fresh(**batch_for("llama"))
    for name, layer in lamda_layers(fresh).items():
        assert torch.equal(layer.lamda_A["default"], lamda_layers(model)[name].lamda_A["default"])
    with pytest.raises(UserError, match=r"ranks of another model, without layer 'bert"):
        get_peft_model(build("bert"), LamdaConfig(**{**config.to_dict(), "target_modules": ["query"]}))


@pytest.mark.parametrize(
    ("options", "decompositions"),
    [({}, 1), ({"init_b": "vectors", "init_scale": "spectrum"}, 1), ({"init": "random"}, 1)],
)
def test_one_decomposition_a_layer_serves_scores_and_factors(
    options: dict[str, Any], decompositions: int, monkeypatch: Any
) -> None:
    """On layers beyond the full SVD; the factors are those that a layer computes by itself."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(300, 320), nn.ReLU(), nn.Linear(320, 300))
    calls = []
    original = torch.svd_lowrank

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["q"])
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "svd_lowrank", counted)
    config = LamdaConfig(target_modules=["0", "2"], spectral_ranks=SpectralRanks(8), **options)
    state = torch.get_rng_state()
    model = get_peft_model(base, config)
    assert len(calls) == 2 * decompositions
    assert torch.equal(torch.get_rng_state(), state) or not config.init_weights
    assert not model.base_model._spectra
    for layer in lamda_layers(model).values():
        alone = init_module.initial_factors(layer.base_layer.weight, layer.r["default"], config)
        assert torch.equal(alone.A, layer.lamda_A["default"])
        if config.init_b == "vectors":
            assert torch.equal(alone.B0, layer.lamda_B0["default"])
            assert torch.equal(alone.S0, layer.lamda_S0["default"])


def test_layers_too_small_and_weights_without_values_are_named() -> None:
    large = SpectralRanks(32, (20, 32, 48))
    with pytest.raises(UserError, match=r"layer 'model.layers.0.self_attn.v_proj' takes ranks of at most 16"):
        get_peft_model(build("llama"), LamdaConfig(target_modules=["v_proj"], spectral_ranks=large))
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(UserError, match="layer '0' is on meta"):
        get_peft_model(base, LamdaConfig(target_modules=["0"], spectral_ranks=SMALL))


def test_a_second_adapter_over_the_same_base_reads_the_base(logits: Any) -> None:
    model = get_peft_model(build("llama"), LamdaConfig(r=3, target_modules=TARGETS["llama"]))
    config = LamdaConfig(target_modules="all-linear", spectral_ranks=SMALL)
    model.add_adapter("second", config)
    alone = LamdaConfig(target_modules="all-linear", spectral_ranks=SMALL)
    get_peft_model(build("llama"), alone)
    assert config.spectral_scores == alone.spectral_scores
    assert config.rank_pattern == alone.rank_pattern


def test_ranks_for_ordinary_lora() -> None:
    """Within LoRA's own budget of parameters; with `alpha_pattern` all layers keep the same scale."""
    base = build("bert")
    pattern = spectral_rank_pattern(base, 4, task_type="SEQ_CLS")
    for rslora in (False, True):
        config = LoraConfig(
            r=4, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS", use_rslora=rslora,
            rank_pattern=pattern.rank_pattern, alpha_pattern=pattern.alpha_pattern(16, rslora),
        )  # fmt: skip
        model = get_peft_model(build("bert"), config)
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        assert {name.removeprefix("base_model.model.") for name in layers} == set(pattern.scores)
        assert all(m.scaling["default"] == pytest.approx(16 / (2 if rslora else 4)) for m in layers.values())
        ranks = [m.r["default"] for m in layers.values()]
        widths = [m.in_features + m.out_features for m in layers.values()]
        spent = sum(r * w for r, w in zip(ranks, widths, strict=True))
        assert set(ranks) <= {2, 3, 4, 6, 8} and len(set(ranks)) > 2
        assert 0.95 * 4 * sum(widths) < spent <= 4 * sum(widths)
        trained = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        assert trained == spent
    square = spectral_rank_pattern(base, 4, task_type="SEQ_CLS", cost="square").rank_pattern
    assert sum(r * r for r in square.values()) <= 16 * len(square)
    with pytest.raises(UserError, match="before an adapter is attached"):
        spectral_rank_pattern(model, 4)
    with pytest.raises(UserError, match="cost='cubic'"):
        spectral_rank_pattern(base, 4, cost="cubic")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="matches no layer"):
        spectral_rank_pattern(base, 4, target_modules=["nowhere"])


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_a_terminal_alone_and_after_a_while(
    terminal: bool, capsys: Any, monkeypatch: Any
) -> None:
    from leantune.lamda import progress

    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert list(progress.with_progress([3, 1, 2], "spectra")) == [3, 1, 2]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_PATIENCE", -1.0)
    assert list(progress.with_progress([3, 1, 2], "spectra")) == [3, 1, 2]
    shown = capsys.readouterr()
    assert not shown.out and ("spectra" in shown.err) == terminal
