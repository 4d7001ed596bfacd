"""Tiny adapted models whose heads and neurons are known by heart, not by `find_groups`."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from leantune.bottleneck import BottleneckConfig
from leantune.lamda import LamdaConfig
from tests.tiny_models import batch_for, tiny

TASKS = {
    "bert": "classification",
    "llama": "causal-lm",
    "gpt2": "causal-lm",
    "t5": "seq2seq",
    "bart": "seq2seq",
}
TARGETS = {
    "bert": ["query", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "v", "o", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc2"],
}
# group's name -> (its output projections in the head model, units, features of a unit)
Outputs = dict[str, tuple[list[str], int, int]]


def outputs(family: str) -> Outputs:
    """Every output projection of a tiny model."""
    table: Outputs = {}
    for i in range(3):
        if family == "bert":
            layer = f"encoder.layer.{i}"
            table[f"{layer}.attention.self"] = ([f"bert.{layer}.attention.output.dense"], 4, 8)
            table[f"{layer}.intermediate"] = ([f"bert.{layer}.output.dense"], 64, 1)
        elif family == "llama":  # four query heads share two key and value heads
            table[f"layers.{i}.self_attn"] = ([f"model.layers.{i}.self_attn.o_proj"], 2, 16)
            table[f"layers.{i}.mlp"] = ([f"model.layers.{i}.mlp.down_proj"], 64, 1)
        elif family == "gpt2":
            table[f"h.{i}.attn"] = ([f"transformer.h.{i}.attn.c_proj"], 4, 8)
            table[f"h.{i}.mlp"] = ([f"transformer.h.{i}.mlp.c_proj"], 128, 1)
    return table


def adapted(
    family: str = "bert",
    method: str = "lora",
    dtype: torch.dtype = torch.float64,
    targets: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    **settings: Any,
) -> PeftModel:
    """With an adapter of random weights, in training mode; the same for the same arguments."""
    model = tiny(family, TASKS[family], dtype=dtype, **overrides or {})
    if family == "gpt2" and method == "lora":
        settings["fan_in_fan_out"] = True
    settings = {"r": 4, "target_modules": targets or TARGETS[family], **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config: Any = {
            "lora": lambda: LoraConfig(init_lora_weights=False, lora_alpha=2, **settings),
            "lamda": lambda: LamdaConfig(init_weights=False, lamda_alpha=2, **settings),
            "bottleneck": lambda: BottleneckConfig(init_weights=False, bottleneck_alpha=2, **settings),
        }[method]()
        # float32 copies of an adapter would hide what float64 shows
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    return model.train()


def batch(family: str, size: int = 4, seed: int = 1, padding: str | None = "right") -> dict[str, Tensor]:
    return batch_for(family, TASKS[family], batch=size, length=10, padding=padding, seed=seed)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of a batch of any size, for a Trainer."""

    def __init__(self, family: str, size: int) -> None:
        self.batch = batch(family, size)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


def trainer(
    folder: Any, model: PeftModel, *callbacks: Any, family: str = "bert", **arguments: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 6, "save_strategy": "no", "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True, "seed": 5,
        "disable_tqdm": True, "logging_strategy": "no", **arguments,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(model=model, args=args, train_dataset=Rows(family, 40), callbacks=list(callbacks))
