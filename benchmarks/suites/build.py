"""A case's model, optimizer and batch, on its device: the planner's own construction, with real weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.suites import peers
from benchmarks.suites.cases import METHODS, Group
from benchmarks.suites.shapes import config_of, task_of
from leantune.lightpeft import attach_masks
from leantune.lightpeft.estimation import estimation_of
from leantune.planner.building import attached, base_model
from leantune.planner.quantized import quantize_for_real
from leantune.planner.setting import Setting
from leantune.recipes import Recipe
from leantune.run import lean

SEED = 0
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}


class NotInstalled(Exception):  # noqa: N818 - a row of a table, and no error
    """A peer that is not there."""


@dataclass
class Built:
    """What a step needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: dict[str, Tensor]

    def train(self) -> None:
        """Forward, backward, clipping and update, as the Trainer does."""
        self.model.train()
        estimation = estimation_of(self.model)
        if estimation is not None:
            estimation.begin_step(measure=True)
        self.model(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if estimation is not None:
            estimation.step()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(self) -> None:
        """Forward without gradient: loss and logits of every token."""
        self.model.eval()
        with torch.no_grad():
            self.model(**self.batch)


def setting_of(group: Group, name: str, scale: str, device: str) -> Setting:
    """A case as the planner knows it.

    Raises:
        pydantic.ValidationError: The table of methods has a mistake.
    """
    method = METHODS[name]
    recipe = Recipe.model_validate({
        "model": {"path": f"shape:{group.shape}", "task": task_of(group.shape), "dtype": DTYPES[device]},
        "data": {"path": "unused"}, "lean": method.lean,
        "train": {"eval_batch_size": group.batch, **method.train}, "output": "unused",
    })  # fmt: skip
    stage: Any = method.stage
    return Setting(recipe, config_of(group.shape, scale), group.batch, group.length, False, stage)


def build(group: Group, name: str, scale: str, device: str) -> Built:
    """Random weights, the method attached, AdamW over what it trains.

    Raises:
        NotInstalled: What it takes is not there.
        torch.OutOfMemoryError: The device has not enough memory.
    """
    method, setting = METHODS[name], setting_of(group, name, scale, device)
    for change in method.changes:
        if change in MISSING:
            MISSING[change]()
    torch.manual_seed(SEED)
    with torch.device(device) if device != "cpu" else nullcontext():
        base = base_model(setting)
    if setting.storage is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise NotInstalled("bitsandbytes is not installed")
        quantize_for_real(base, setting.storage, device)
    model = attached(base, setting).to(device)
    lean.attach_tokens(model, setting.recipe, verify=False)  # exactness is the tests' business
    if setting.stage == "estimate":
        attach_masks(model, lean.prune_config(setting.recipe))
    for change in method.changes:
        CHANGES[change](model)
    if setting.checkpointing:
        target: Any = model
        target.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Built(model, torch.optim.AdamW(trained, lr=1e-5, fused=True), make_batch(group, scale, device))


def make_batch(group: Group, scale: str, device: str) -> dict[str, Tensor]:
    """Random tokens without padding, all supervised: {input_ids, attention_mask (batch, n), labels}."""
    config, task = config_of(group.shape, scale), task_of(group.shape)
    draw = torch.Generator().manual_seed(SEED)
    ids = torch.randint(4, config.vocab_size, (group.batch, group.length), generator=draw)
    if task == "classification":
        labels = torch.arange(group.batch) % 2
    elif task == "seq2seq":
        labels = torch.randint(4, config.vocab_size, (group.batch, group.target), generator=draw)
    else:
        labels = ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(device) for key, value in batch.items()}


def _no_unsloth() -> None:
    if importlib.util.find_spec("unsloth") is None:
        raise NotInstalled("unsloth is not installed")
    raise NotInstalled("unsloth patches transformers when imported, which would change every other row")


def _freeze_a(model: nn.Module) -> None:
    """LoRA-FA: A stays as it is, so the layer's input is not needed for its gradient."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)


def _adapter_dtype(model: nn.Module) -> None:
    """The adapter in the base's dtype: PEFT's default keeps it, and a copy of every input, in float32."""
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


MISSING: dict[str, Callable[[], None]] = {"unsloth": _no_unsloth}
CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "freeze A": _freeze_a,
    "adapter dtype": _adapter_dtype,
    "chunked loss": peers.chunk_loss,
    "unsloth": lambda model: None,
}
