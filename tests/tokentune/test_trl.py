"""TRL's SFTTrainer: all tokens are ordinary training, chosen ones count exactly, the wrong way is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from leantune.errors import UserError
from leantune.tokentune import ChoosingCollator, TokenTuneConfig, token_tune
from tests.conftest import make_tokenizer
from tests.tiny_models import tiny

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own, and a tokenizer that differs from the config


def losses(
    place: Path,
    keep: float | None,
    collator: bool,
    *,
    batch: int = 4,
    accumulation: int = 2,
    lora: bool = False,
) -> list[float]:
    """Two optimizer steps on 16 rows of different lengths, prompts masked in none."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 24, (4 + number % 9,), generator=draw).tolist() for number in range(16)]
    model: Any = tiny("llama", dtype=torch.float32)
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = trl.SFTConfig(
        output_dir=str(place), report_to=[], use_cpu=True, bf16=False, max_steps=2, logging_steps=1,
        learning_rate=1e-3, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        disable_tqdm=True, save_strategy="no", gradient_checkpointing=False, lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=make_tokenizer(),
    )
    if keep is not None:
        token_tune(trainer.model, TokenTuneConfig(keep))
    if collator:
        trainer.data_collator = ChoosingCollator(trainer.model, trainer.data_collator)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("lora", [False, True])
def test_all_tokens_are_ordinary_training(lora: bool, tmp_path: Path) -> None:
    plain = losses(tmp_path / "a", None, False, lora=lora)
    assert losses(tmp_path / "b", 1.0, True, lora=lora) == pytest.approx(plain, rel=1e-4)


def test_the_loss_is_that_of_chosen_tokens_at_any_accumulation(tmp_path: Path) -> None:
    """Of its usual size: dividing by all labels would shrink it to the share that is chosen."""
    plain = losses(tmp_path / "a", None, False)
    half = losses(tmp_path / "b", 0.5, True)
    assert half == pytest.approx(plain, rel=0.35)
    first = losses(tmp_path / "c", 1.0, True, batch=8, accumulation=1)[0]
    assert first == pytest.approx(plain[0], rel=1e-4)


def test_choosing_inside_the_forward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose tokens in the collator"):
        losses(tmp_path, 0.5, False)
