"""Which tokens are chosen: sizes, guarantees, seeds, strategies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leantune import UserError
from leantune.tokentune import STRATEGIES, TokenTuneConfig, chosen_tokens, token_tune
from leantune.tokentune.choose import Candidates, choose, generator_for
from tests.tiny_models import EOS, PAD, batch_for, tiny


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), True, "0.5", None])
def test_keep_that_means_nothing(keep: Any) -> None:
    with pytest.raises(UserError, match="keep=") as error:
        TokenTuneConfig(keep=keep)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field", [{"strategy": "best"}, {"seed": -1}, {"seed": 0.5}, {"checkpointed_kv": "drop"}]
)
def test_other_fields_that_mean_nothing(field: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        TokenTuneConfig(**field)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    keep=st.one_of(st.integers(1, 45), st.floats(0.01, 1.0)),
    strategy=st.sampled_from(["random", "span", "supervised"]),
    seed=st.integers(0, 10**6),
)
def test_exact_number_inside_the_row_with_a_supervised_one(
    sizes: list[int], keep: int | float, strategy: Any, seed: int
) -> None:
    n = 40
    real = torch.arange(n) < torch.tensor(sizes)[:, None]
    supervised = real & (torch.rand(real.shape, generator=torch.Generator().manual_seed(seed)) < 0.1)
    config = TokenTuneConfig(keep, strategy, seed)
    choice = choose(config, Candidates(real, supervised), generator_for(seed, 0, 0))
    for row, size, wanted in zip(choice, sizes, supervised, strict=True):
        picked = row[row >= 0]
        assert len(picked) == (
            min(keep, size) if isinstance(keep, int) else max(1, int(size * keep + 0.5 + 1e-9))
        )
        assert picked.tolist() == sorted(set(picked.tolist()))
        assert int(picked.max()) < size
        assert not wanted.any() or wanted[picked].any()
        if strategy == "supervised":
            assert wanted[picked].sum() == min(len(picked), int(wanted.sum()))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), left=st.integers(0, 9), keep=st.integers(1, 45), seed=st.integers(0, 10**6))
def test_a_span_is_consecutive_and_holds_a_label(size: int, left: int, keep: int, seed: int) -> None:
    place = torch.arange(50)
    real = (place >= left) & (place < left + size)
    first, last = sorted(torch.randint(size, (2,), generator=torch.Generator().manual_seed(seed)).tolist())
    supervised = (place >= left + first) & (place <= left + last)
    candidates = Candidates(real[None], supervised[None])
    row = choose(TokenTuneConfig(keep, "span"), candidates, generator_for(seed, 0, 0))[0]
    assert row.tolist() == list(range(int(row[0]), int(row[0]) + min(keep, size)))
    assert real[row].all() and supervised[row].any()


def test_spans_begin_everywhere_they_may() -> None:
    real = torch.ones(4000, 10, dtype=torch.bool)
    supervised = real & (torch.arange(10) >= 5)
    choice = choose(TokenTuneConfig(3, "span"), Candidates(real, supervised), generator_for(0, 0, 0))
    share = torch.bincount(choice[:, 0], minlength=10) / 4000
    assert (share - torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 0, 0]) / 5).abs().max() < 0.05


def test_choice_depends_on_seed_step_and_rank_only() -> None:
    real = torch.ones(4, 64, dtype=torch.bool)

    def draw(*key: int) -> list[list[int]]:
        return choose(TokenTuneConfig(8), Candidates(real), generator_for(*key)).tolist()

    torch.manual_seed(1)
    first = draw(3, 5, 1)
    torch.manual_seed(2)
    assert draw(3, 5, 1) == first
    assert all(draw(*other) != first for other in ((4, 5, 1), (3, 6, 1), (3, 5, 2), (5, 3, 1)))


def test_random_is_uniform() -> None:
    real = torch.ones(2000, 10, dtype=torch.bool)
    choice = choose(TokenTuneConfig(3), Candidates(real), generator_for(0, 0, 0))
    share = torch.bincount(choice.flatten(), minlength=10) / 2000
    assert (share - 0.3).abs().max() < 0.05


@pytest.mark.parametrize(
    ("family", "task", "padding", "position"),
    [
        ("bert", "classification", "right", "first"),
        ("llama", "classification", "right", "last"),
        ("llama", "classification", "left", "last"),
        ("opt", "classification", "right", "last"),
        ("vit", "image", None, "first"),
    ],
)
def test_the_pooled_token_is_always_chosen(
    family: str, task: str, padding: str | None, position: str
) -> None:
    model, batch = tiny(family, task), batch_for(family, task, padding=padding)
    token_tune(model, TokenTuneConfig(1)).train()
    model = model.float()
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    model(**batch)
    if position == "first":
        assert chosen_tokens(model).tolist() == [[0]] * 3
    else:
        ids = batch["input_ids"]
        last = ((ids != PAD) * torch.arange(ids.size(1))).argmax(1)
        assert chosen_tokens(model).flatten().tolist() == last.tolist()


def test_cls_is_chosen_in_encoders_with_token_labels() -> None:
    model, batch = tiny("bert", "tokens"), batch_for("bert", "tokens", padding="left")
    token_tune(model, TokenTuneConfig(4)).train()(**batch)
    start = batch["attention_mask"].argmax(1, keepdim=True)
    assert (chosen_tokens(model) == start).any(1).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("family", "task"), [("llama", "causal-lm"), ("bert", "masked-lm"), ("bart", "seq2seq")]
)
def test_every_strategy_trains(family: str, task: str, strategy: Any) -> None:
    model = tiny(family, task, dtype=torch.float32, attn_implementation="sdpa")
    batch = batch_for(family, task, padding="right")
    token_tune(model, TokenTuneConfig(0.4, strategy)).train()
    model(**batch).loss.backward()
    first = chosen_tokens(model)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model(**batch)
    again = chosen_tokens(model)
    if strategy in ("attention", "norm"):
        assert torch.equal(first, again)  # scores decide, not chance
    assert (chosen_tokens(model) < batch["labels"].size(1)).all()


def test_loss_strategy_takes_the_highest_losses() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama", masked=0.0)
    with torch.no_grad():
        logits = model(**batch).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    token_tune(model, TokenTuneConfig(4, "loss")).train()(**batch)
    assert torch.equal(chosen_tokens(model), losses.topk(4).indices.sort(1).values)


def test_norm_strategy_takes_the_largest_states() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama")
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states[2]  # what enters the last layer
    token_tune(model, TokenTuneConfig(4, "norm")).train()(**batch)
    top = states.norm(dim=-1).topk(4).indices.sort(1).values
    kept = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(chosen_tokens(model), top, strict=True))
    assert kept >= 9  # of 12: one a row may go to a supervised token


def test_attention_strategy_agrees_with_the_attention_matrix() -> None:
    model, batch = tiny("bert", "masked-lm", dtype=torch.float32), batch_for("bert", "masked-lm", masked=0.0)
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[-1]  # (batch, heads, n, n)
    token_tune(model, TokenTuneConfig(5, "attention")).train()(**batch)
    top = weights.mean((1, 2)).topk(5).indices.sort(1).values
    kept = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(chosen_tokens(model), top, strict=True))
    assert kept >= 12  # of 15: [CLS] takes at most one place a row


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "padding"),
    [("bert", "right"), ("llama", "left"), ("llama", "right"), ("gpt2", "right"), ("bart", None)],
)
def test_attention_strategy_asks_the_position_that_feeds_the_head(
    family: str, padding: str | None, attention: str
) -> None:
    batch = batch_for(family, "classification", padding=padding)
    with torch.no_grad():
        eager = tiny(family, "classification", dtype=torch.float32)
        found = eager(**batch, output_attentions=True)
        weights = found.decoder_attentions[-1] if family == "bart" else found.attentions[-1]
    ids = batch["input_ids"]
    pooled = torch.zeros(3, dtype=torch.long)
    if family in ("llama", "gpt2"):
        pooled = ((ids != PAD) * torch.arange(ids.size(1))).argmax(1)
    if family == "bart":
        pooled = ((ids == EOS) * torch.arange(ids.size(1))).argmax(1)
    given = weights.mean(1)[torch.arange(3), pooled]  # (batch, n)
    given[torch.arange(3), pooled] = 1.0  # always chosen
    special = ids.ne(PAD).long().argmax(1) if family == "bert" else pooled
    given[torch.arange(3), special] = 1.0
    model = tiny(family, "classification", dtype=torch.float32, attn_implementation=attention)
    token_tune(model, TokenTuneConfig(4, "attention")).train()(**batch)
    assert torch.equal(chosen_tokens(model), given.topk(4).indices.sort(1).values)


def test_a_strategy_that_means_nothing_for_the_head() -> None:
    with pytest.raises(UserError, match="strategy='loss' needs one label per token"):
        token_tune(tiny("bert", "classification"), TokenTuneConfig(0.5, "loss"))
