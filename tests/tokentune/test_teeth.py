"""The exactness tests must fail when the mechanism is broken on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from leantune.tokentune import record, rows, train
from tests.tiny_models import batch_for, tiny
from tests.tokentune.test_exact import TOLERANCE, compare


def error(family: str = "llama", task: str = "causal-lm", kernel: str = "sdpa") -> float:
    model = tiny(family, task, attn_implementation=kernel)
    return compare(model, task, batch_for(model, task, padding="left"), 0.4)


@pytest.fixture(autouse=True)
def _attach_without_verifying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leantune.tokentune.attach.verify_passes", lambda *_: None)
    monkeypatch.setattr("leantune.tokentune.attach.reruns", lambda *_: False)


def test_it_is_exact_unbroken() -> None:
    assert error() < TOLERANCE


def test_keys_and_values_of_chosen_rows_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    write = rows.Rows.write
    monkeypatch.setattr(rows.Rows, "write", lambda self, part, full: write(self, part.detach(), full))
    assert error() > 1e-3


def test_keys_and_values_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows.Rows, "write", lambda self, part, full: full)
    assert error() > 1e-3


def test_unchosen_keys_keep_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording without no_grad: paths through unchosen tokens are no longer cut."""
    prepare = record.Recording.prepare

    def with_gradient(self: Any, stack: Any) -> None:
        prepare(self, stack)
        torch.set_grad_enabled(True)

    class Leaky:
        @staticmethod
        def write(self: Any, part: Tensor, full: Tensor) -> Tensor:
            index = self.index[:, None, :, None].expand(part.shape)
            return full.scatter(2, index, part)

    monkeypatch.setattr(record.Recording, "prepare", with_gradient)
    monkeypatch.setattr(record, "_owned", lambda x: x)
    monkeypatch.setattr(rows.Rows, "write", Leaky.write)
    model = tiny("llama", attn_implementation="sdpa")
    assert compare(model, "causal-lm", batch_for("llama"), 6) > 1e-3


def test_mask_rows_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    own = train.Training._mask_rows

    def shifted(self: Any, *args: Any) -> Tensor | None:
        mask = own(self, *args)
        return None if mask is None else mask.roll(1, -2)

    monkeypatch.setattr(train.Training, "_mask_rows", shifted)
    assert error() > 1e-3
    assert error("mistral", kernel="eager") > 1e-3


def test_mask_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """`is_causal` on gathered rows: row i would see the first i keys."""
    monkeypatch.setattr(train.Training, "_mask_rows", lambda *_: None)
    assert error() > 1e-3


def test_position_rows_not_gathered_right(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = train.Training._gather_shared
    monkeypatch.setattr(
        train.Training, "_gather_shared", lambda self, x, axis, s: gather(self, x, axis, s).roll(1, axis)
    )
    assert error() > 1e-3


def test_empty_slots_given_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with fewer tokens repeat a position in their empty slots; its gradient must not count twice."""
    monkeypatch.setattr(rows.Rows, "fill", lambda self, x, value: x)
    assert error() > 1e-3


def test_labels_shifted_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from leantune.tokentune.forward import Choosing

    aligned = Choosing.aligned
    monkeypatch.setattr(Choosing, "aligned", lambda self: aligned(self).roll(1, 1))
    assert error() > 1e-3
