"""Under Trainer: the loss at any accumulation, exact resuming, evaluation and generation untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from leantune.tokentune import (
    ChoosingCollator,
    TokenTuneConfig,
    TokenTuneState,
    chosen_tokens,
    set_token_state,
    token_state,
    token_tune,
)
from tests.tiny_models import batch_for, tiny


def features(family: str = "llama", task: str = "causal-lm", rows: int = 16) -> list[dict[str, Tensor]]:
    """Rows whose share of supervised tokens differs a lot."""
    batch = batch_for(family, task, batch=rows, length=16, padding="right")
    if "attention_mask" in batch and batch["labels"].dim() == 2:
        for row in range(rows):
            batch["labels"][row, : (row * 3) % 9] = -100
    return [{k: v[i] for k, v in batch.items()} for i in range(rows)]


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}


def trainer(
    model: nn.Module, folder: Path, data: list[Any], callbacks: Any = None, **settings: Any
) -> Trainer:
    collator = settings.pop("data_collator", stack)
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=settings.pop("learning_rate", 1e-2),
        **{"save_strategy": "no", "max_steps": 2, "lr_scheduler_type": "constant"} | settings,
    )
    return Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=callbacks)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


class Fixed(ChoosingCollator):
    """Chooses by the row's own content, so that batches of any size choose alike."""

    def choose(self, batch: dict[str, Any]) -> dict[str, Any]:
        parts = []
        for row in range(len(batch["labels"])):
            self.calls = int(batch["input_ids"][row].sum())
            parts.append(super().choose({k: v[row : row + 1] for k, v in batch.items()}))
        k = max(part["token_choice"].size(1) for part in parts)
        for part in parts:
            short = k - part["token_choice"].size(1)
            part["token_choice"] = nn.functional.pad(part["token_choice"], (0, short), value=-1)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "causal-lm"), ("bert", "masked-lm"), ("bert", "tokens")]
)
def test_same_loss_at_any_accumulation_with_the_choosing_collator(
    family: str, task: str, tmp_path: Path
) -> None:
    results = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        model = tiny(family, task, dtype=torch.float32)
        token_tune(model, TokenTuneConfig(0.4))
        run = trainer(
            model,
            tmp_path,
            features(family, task),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            data_collator=Fixed(model, stack),
        )
        run.train()
        results.append((losses(run), torch.cat([p.detach().flatten() for p in model.parameters()])))
    for loss, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-4)
        assert torch.allclose(weights, results[0][1], atol=2e-4)


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "causal-lm"), ("bert", "masked-lm"), ("bert", "classification")]
)
def test_all_tokens_give_the_same_loss_at_any_accumulation(family: str, task: str, tmp_path: Path) -> None:
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = tiny(family, task, dtype=torch.float32)
        token_tune(model, TokenTuneConfig(1.0))
        run = trainer(
            model,
            tmp_path,
            features(family, task),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        run.train()
        results.append(losses(run))
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_the_loss_is_the_mean_over_chosen_tokens_whatever_the_caller_counted() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama", padding="right")
    token_tune(model, TokenTuneConfig(0.4)).train()
    mean = model(**batch).loss.detach()
    token_tune(model, TokenTuneConfig(0.4))
    counted = (batch["labels"][:, 1:] != -100).sum()
    assert torch.allclose(model(**batch, num_items_in_batch=counted).loss.detach(), mean)


@pytest.mark.parametrize("where", ["forward", "collator"])
def test_resuming_is_exact(where: str, tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: bool = False) -> nn.Module:
        model = tiny("llama", dtype=torch.float32)
        token_tune(model, TokenTuneConfig(0.3, seed=5))
        collator = stack if where == "forward" else ChoosingCollator(model, stack)
        each = trainer(
            model,
            folder,
            features(),
            callbacks=[TokenTuneState()],
            max_steps=steps,
            save_strategy="steps",
            save_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            data_collator=collator,
        )
        each.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "a", 6)
    run(tmp_path / "b", 3)
    resumed = run(tmp_path / "b", 6, resume=True)
    stored = json.loads((tmp_path / "b" / "checkpoint-6" / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["TokenTuneState"]["attributes"]["saved"] == {"seed": 5, "step": 12}
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_with_the_choosing_collator_counts_all_labels(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)
    plain = trainer(model, tmp_path, features()).evaluate(features())["eval_loss"]
    token_tune(model, TokenTuneConfig(0.3))
    choosing = trainer(model, tmp_path, features(), data_collator=ChoosingCollator(model, stack))
    assert choosing.evaluate(features())["eval_loss"] == pytest.approx(plain, rel=1e-6)


def test_state_is_plain_data_and_continues_the_choice() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama")
    token_tune(model, TokenTuneConfig(4, seed=3)).train()
    model(**batch)
    state = json.loads(json.dumps(token_state(model)))
    model(**batch)
    second = chosen_tokens(model)
    set_token_state(model, state)
    model(**batch)
    assert torch.equal(chosen_tokens(model), second)


def test_evaluation_and_generation_are_untouched() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama")
    own, text = model(**batch), model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)
    token_tune(model, TokenTuneConfig(0.25))
    assert torch.equal(model(**batch).logits, own.logits)
    assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False), text)
    model.train()
    with torch.no_grad():
        assert model(**batch).logits.shape == own.logits.shape
