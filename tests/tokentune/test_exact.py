"""Two passes against ordinary training (all tokens) and against brute force (some), in float64, to 1e-9."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import leantune
from leantune.anatomy import find_head
from leantune.tokentune import TokenTuneConfig, chosen_tokens, token_tune
from leantune.tokentune.attach import tuner_of
from leantune.tokentune.forward import TokenTuner
from tests.tiny_models import FAMILIES, all_in_float64, batch_for, tiny
from tests.tokentune.reference import as_mask, brute_force, reference_batch

TOLERANCE = 1e-9
EAGER_ONLY = ("deberta-v2", "deberta-v3", "gemma2")
CASES = [
    (family, task, kernel, padding)
    for family, tasks in FAMILIES.items()
    for task in tasks
    for kernel in ("eager", "sdpa")
    for padding in (None, "right", "left")
    if not (kernel == "sdpa" and family in EAGER_ONLY) and not (task == "image" and padding)
]
# one task per family in the fast run; the whole matrix is slow
FAST = [
    c for c in CASES if c[1] == FAMILIES[c[0]][0] and (c[2], c[3]) in {("sdpa", "left"), ("eager", "right")}
]
FAST += [c for c in CASES if c[0] in EAGER_ONLY and c[1] == FAMILIES[c[0]][0] and c[3] == "left"]
FAST += [
    c for c in CASES if c[0] in ("llama", "bert", "gpt2", "bart", "vit") and (c[2], c[3]) == ("sdpa", None)
]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(parameters.items(), found, strict=True)
    }


def worst(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest relative error over all parameters; scale: its own gradient, or 1e-5 of the largest.

    Some gradients are zero but for rounding (a key's bias under softmax) and have no scale of their own.
    """
    floor = 1e-5 * max(float(g.norm()) for g in theirs.values())
    return max(float((mine[n] - theirs[n]).norm()) / max(float(theirs[n].norm()), floor) for n in theirs)


def compare(
    model: nn.Module, task: str, batch: dict[str, Tensor], keep: float | int, **config: object
) -> float:
    """Worst relative error of loss and gradients of the attached model against brute force."""
    with all_in_float64():
        token_tune(model, TokenTuneConfig(keep=keep, **config))
        model.train()
        output = model(**batch)
        mine = gradients(model, output.loss)
        tuner = tuner_of(find_head(model))
        sides, shifts = _sides(tuner), tuner.plan.shifts
        token_tune(model, None)
        with brute_force(model, *sides):
            own = model(**reference_batch(model, batch, task if shifts else "straight", sides[-1])).loss
            theirs = gradients(model, own)
    return max(worst(mine, theirs), float(((output.loss - own) / own).detach().abs()))


def _sides(tuner: TokenTuner) -> list[Tensor]:
    sides = ("encoder", "decoder") if "encoder" in tuner.chosen else ("decoder",)
    return [as_mask(tuner.chosen[side], tuner.lengths[side]) for side in sides]


def ordinary(model: nn.Module, batch: dict[str, Tensor], keep: float | int = 1.0) -> float:
    """Worst relative error of all tokens chosen against plain training."""
    with all_in_float64():
        model.train()
        own = model(**batch).loss
        theirs = gradients(model, own)
        token_tune(model, TokenTuneConfig(keep=keep))
        output = model(**batch)
        mine = gradients(model, output.loss)
    return max(worst(mine, theirs), float(((output.loss - own) / own).detach().abs()))


def build(family: str, task: str, kernel: str, padding: str | None) -> tuple[nn.Module, dict[str, Tensor]]:
    model = tiny(family, task, attn_implementation=kernel)
    return model, batch_for(model, task, padding=padding)


@pytest.mark.parametrize(("family", "task", "kernel", "padding"), FAST)
def test_some_tokens_equal_brute_force(family: str, task: str, kernel: str, padding: str | None) -> None:
    model, batch = build(family, task, kernel, padding)
    assert compare(model, task, batch, 0.4, seed=3) < TOLERANCE


@pytest.mark.parametrize(("family", "task", "kernel", "padding"), FAST)
def test_all_tokens_equal_ordinary_training(family: str, task: str, kernel: str, padding: str | None) -> None:
    model, batch = build(family, task, kernel, padding)
    assert ordinary(model, batch) < TOLERANCE


def _reads_padding(case: tuple) -> bool:
    """Cases in which the model itself reads padding, which is never chosen: ordinary training differs.

    Question answering has a logit for each; and a first token that is padding and may see no key at all
    attends to every key alike.
    """
    family, task, _, padding = case
    blind = family in ("deberta-v2", "deberta-v3", "modernbert") and task == "classification"
    return (task == "qa" and padding is not None) or (blind and padding == "left")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task", "kernel", "padding"), [c for c in CASES if not _reads_padding(c)])
def test_every_case_equals_ordinary_training(
    family: str, task: str, kernel: str, padding: str | None
) -> None:
    model, batch = build(family, task, kernel, padding)
    assert ordinary(model, batch) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 3, 0.25, 0.7])
@pytest.mark.parametrize(("family", "task", "kernel", "padding"), CASES)
def test_every_case_equals_brute_force(
    family: str, task: str, kernel: str, padding: str | None, keep: float | int
) -> None:
    model, batch = build(family, task, kernel, padding)
    assert compare(model, task, batch, keep, seed=1) < TOLERANCE


def test_each_row_has_its_own_choice_and_size() -> None:
    model, batch = build("llama", "causal-lm", "sdpa", "left")
    with all_in_float64():
        leantune.token_tune(model, TokenTuneConfig(keep=0.5, seed=7)).train()(**batch)
    choice = chosen_tokens(model)
    assert (choice >= 0).sum(1).tolist() == [6, 5, 4]  # half of 12, 10, 8 real tokens
    assert len({tuple(row.tolist()) for row in choice}) == 3
