"""One regression test for each bug of the paper's released code (METHODS §3)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from leantune.measure import saved_storages
from leantune.tokentune import TokenTuneConfig, chosen_tokens, token_tune
from tests.tiny_models import FAMILIES, batch_for, tiny


def test_1_the_configured_attention_kernel_stays_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Released: eager attention hard-coded, and whole attention matrices kept."""
    calls = []
    own = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or own(*a, **k)
    )
    model = tiny("llama", dtype=torch.float32, attn_implementation="sdpa")
    batch = batch_for("llama", length=60)
    token_tune(model, TokenTuneConfig(30)).train()
    calls.clear()
    kept = saved_storages(lambda: model(**batch).loss)
    assert len(calls) == 5  # two full layers of pass 1 (the last stops at K and V), three of pass 2
    assert 3 * 4 * 30 * 60 * 4 not in kept.values()  # no (batch, heads, k, n) matrix


def test_2_the_last_target_can_be_chosen() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama", length=8, masked=0.0)
    token_tune(model, TokenTuneConfig(2)).train()
    seen = set()
    for _ in range(40):
        model(**batch)
        seen |= set(chosen_tokens(model).flatten().tolist())
    assert 6 in seen  # token 6 predicts token 7, the last


@pytest.mark.parametrize("strategy", ["random", "supervised"])
def test_3_a_row_with_a_short_answer_is_never_without_loss(strategy: str) -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama", length=40)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][:, 30] = 7
    token_tune(model, TokenTuneConfig(2, strategy)).train()
    for _ in range(10):
        assert torch.isfinite(model(**batch).loss)
        assert (chosen_tokens(model) == 29).any(1).all()
    batch["labels"][:] = -100  # nothing supervised at all: no loss, and no NaN
    assert float(model(**batch).loss.detach()) == 0.0


def test_4_empty_slots_of_shorter_rows_do_not_enter_the_loss() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama", padding="right", masked=0.0)
    token_tune(model, TokenTuneConfig(0.5)).train()
    loss = model(**batch).loss.detach()
    choice = chosen_tokens(model)
    assert (choice == -1).any()
    token_tune(model, None)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    target = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    picked = [(logits[b, t], target[b, t]) for b, row in enumerate(choice) for t in row.tolist() if t >= 0]
    expected = F.cross_entropy(torch.stack([p for p, _ in picked]), torch.stack([t for _, t in picked]))
    assert torch.allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("keep", "count"), [(1, 1), (5, 5), (12, 12), (99, 12), (0.25, 3), (0.3, 4), (0.01, 1)]
)
def test_5_the_number_of_tokens_is_exact(keep: int | float, count: int) -> None:
    model, batch = tiny("bert", "masked-lm", dtype=torch.float32), batch_for("bert", "masked-lm")
    token_tune(model, TokenTuneConfig(keep)).train()
    output = model(**batch)
    assert chosen_tokens(model).shape == (3, count)
    assert output.logits.shape[:2] == (3, count)


def test_6_the_base_keeps_its_dtype() -> None:
    model = tiny("llama", dtype=torch.bfloat16, attn_implementation="sdpa")
    token_tune(model, TokenTuneConfig(0.5)).train()
    model(**batch_for("llama")).loss.backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_and_no_rewriting_of_models() -> None:
    """Released: two modelling files rewritten, Llama and BERT only. Here: every family, by its own code."""
    assert len(FAMILIES) >= 12
    for family, tasks in FAMILIES.items():
        model = tiny(family, tasks[0], dtype=torch.float32)
        code = type(model).forward
        token_tune(model, TokenTuneConfig(0.5))
        assert type(model).forward is code
