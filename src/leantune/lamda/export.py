"""A LaMDA adapter as an ordinary LoRA: exact, same rank, opens with PEFT alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from leantune.errors import UserError
from leantune.lamda.config import LamdaConfig
from leantune.lamda.model import lamda_layers

_PREFIX = "base_model.model."


def lamda_to_lora(model: nn.Module, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA that computes what a LaMDA adapter computes; METHODS 1, "It is a LoRA".

    lora_A = A and lora_B = s (B0 dS + dB (S0 + dS)), computed in float64; the scale is in lora_B, so the
    LoRA's alpha equals its rank.

    Args:
        model: A `PeftModel`, or a transformers model with the adapter (`model.add_adapter`). It is not
            changed.
        adapter_name: Which adapter.

    Returns:
        The config, and the state dict in the keys of an adapter file: per layer `lora_A.weight` (r, d_in) and
        `lora_B.weight` (d_out, r), float32 (float64 for a float64 adapter); `modules_to_save` as they are.

    Raises:
        UserError: There is no LaMDA adapter of that name.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, LamdaConfig):
        known = [name for name, c in getattr(model, "peft_config", {}).items() if isinstance(c, LamdaConfig)]
        raise UserError(f"adapter_name={adapter_name!r}: no LaMDA adapter of that name; there are {known}")
    state, ranks = {}, {}
    for name, layer in lamda_layers(model).items():
        if adapter_name not in layer.r:
            continue
        name = name.removeprefix(_PREFIX)
        left, A = layer.lora_factors(adapter_name)
        dtype = torch.promote_types(layer.lamda_S[adapter_name].dtype, torch.float32)
        state[f"{_PREFIX}{name}.lora_A.weight"] = A.to(dtype).contiguous()
        state[f"{_PREFIX}{name}.lora_B.weight"] = left.to(dtype).contiguous()
        ranks[name] = layer.r[adapter_name]
    for key, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if ".lamda_" not in key:
            state[key] = value
    return _lora_config(config, ranks), state


def save_as_lora(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> Path:
    """Write a LaMDA adapter as a plain PEFT LoRA: `adapter_config.json` and `adapter_model.safetensors`.

    The folder opens with `peft` alone (`PeftModel.from_pretrained(base, folder)`) and with everything that
    reads PEFT's LoRA format.

    Args:
        model: As for `lamda_to_lora`.
        folder: Where to; made if it is not there.
        adapter_name: Which adapter.

    Returns:
        The folder.
    """
    config, state = lamda_to_lora(model, adapter_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return folder


def _lora_config(config: LamdaConfig, ranks: dict[str, int]) -> LoraConfig:
    """The same targets; the rank of every layer that differs from `r` under its full name, alpha with it."""
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.r}
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=config.r,
        lora_alpha=config.r,
        lora_dropout=config.lamda_dropout,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        bias=cast(Any, config.bias.replace("lamda", "lora")),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
    )
