"""Whether a pruned model is an ordinary model of its architecture: then a plain checkpoint can hold it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from leantune.anatomy import find_groups
from leantune.errors import UserError
from leantune.lightpeft.plan import PruningPlan, Units
from leantune.lightpeft.surgery import prune_base

# Names under which configs count units.
_COUNTS = {
    "heads": (
        "num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads",
        "decoder_attention_heads", "encoder_attention_heads",
    ),
    "neurons": (
        "intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim",
    ),
}  # fmt: skip


def plain_config(model: PreTrainedModel, plan: PruningPlan) -> PretrainedConfig:
    """The config of an ordinary model with the pruned model's shapes.

    Args:
        model: The whole model, on meta; it is pruned here.
        plan: What is pruned.

    Raises:
        UserError: The architecture's config cannot say it, with the reason.
    """
    config = copy.deepcopy(model.config)
    for kind in ("heads", "neurons"):
        _set_counts(config, kind, [units for units in plan.groups.values() if units.kind == kind])
    prune_base(model, find_groups(model), plan.kept)
    _compare(model, config)
    return config


def _set_counts(config: Any, kind: str, blocks: list[Units]) -> None:
    left = sorted({len(units.kept) for units in blocks})
    if len(left) > 1:
        raise UserError(
            f"layers keep different numbers of {kind} ({left[0]} to {left[-1]}), and a plain checkpoint has "
            f"one for all; prune with {kind}_scope: layer"
        )
    if not blocks or left[0] == blocks[0].count:
        return
    count, kept = blocks[0].count, left[0]
    if kind == "heads" and getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    for name in _COUNTS[kind]:
        before = getattr(config, name, None)
        if name == "n_inner" and hasattr(config, name) and before is None:
            before = 4 * config.hidden_size
        if isinstance(before, int) and before % count == 0:  # query heads: several to a unit
            setattr(config, name, before // count * kept)


def _compare(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """See that a model made from `config` has the pruned model's shapes."""
    kind = type(model).__name__
    try:
        with torch.device("meta"):
            plain = type(model)(config)
    except ValueError as error:
        raise UserError(f"the config of {kind} cannot express it: {str(error).splitlines()[0]}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            raise UserError(
                f"the config of {kind} cannot express it: {name} has shape {tuple(tensor.shape)} here, and "
                f"would have {shapes.get(name)}. leantune.load opens the run as it is; "
                f"--to lora puts its adapter on the whole base"
            )
