"""The stack of layers of a transformers model, read off its module tree.

A stack is a list of layers through which a sequence of tokens runs: the decoder's of a Llama, the encoder's
of a BERT, one of each in a T5. transformers marks their layers by one base class
(`GradientCheckpointingLayer`), so no table of architectures is needed; what does not follow the pattern is
refused by name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from leantune.errors import UserError

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers that pass one sequence on.

    Attributes:
        side: `decoder` if it feeds the output head (also the only stack of a BERT or a Llama); `encoder` for
            the other stack of a sequence-to-sequence model.
        names: Dotted name of each layer, in order of the module tree.
        layers: The modules.
    """

    side: Side
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]


def find_head(model: nn.Module) -> PreTrainedModel:
    """The transformers model with its task head inside `model`: itself, or what PEFT, DDP, … wrap.

    Raises:
        UserError: There is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UserError(f"{type(model).__name__} holds no transformers model (PreTrainedModel)")


def find_stacks(head: PreTrainedModel) -> tuple[Stack, ...]:
    """The model's stacks, encoder first.

    Raises:
        UserError: No layers were found (the model mixes its tokens in a way of its own).
    """
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in head.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not name.startswith(inside):
            found.append((name, module))
            inside = (*inside, f"{name}.")
    if not found:
        raise UserError(f"{type(head).__name__} has no stack of GradientCheckpointingLayer modules")
    two_sided = bool(getattr(head.config, "is_encoder_decoder", False))
    encoder = [(n, m) for n, m in found if two_sided and "encoder" in n.split(".")]
    decoder = [(n, m) for n, m in found if (n, m) not in encoder]
    return tuple(_stack(side, part) for side, part in (("encoder", encoder), ("decoder", decoder)) if part)


def _stack(side: Any, part: list[tuple[str, nn.Module]]) -> Stack:
    return Stack(side, tuple(name for name, _ in part), tuple(module for _, module in part))


def argument_names(layer: nn.Module) -> list[str]:
    """Names of the positional parameters of the layer's forward, without self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(layer).forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds][1:]


_NEVER = ("mask", "bias", "relative", "encoder_", "past", "cache", "rel_embed", "cu_seq", "key_value_states")


def position_axis(name: str, tensor: Tensor, batch: int, length: int) -> int | None:
    """Which axis of a layer's argument counts the sequence's positions, if its rows belong to tokens.

    Masks and biases are left alone (their rows are taken at the attention call, where it is known what they
    mean), and so is everything of the other sequence of an encoder–decoder.

    Args:
        name: The argument's name.
        tensor: The argument, e.g. cos and sin (batch or 1, n, d), position ids (batch or 1, n), rotary angles
            (batch or 1, 1, n, d) or without a batch axis (n, d).
        batch: Sequences.
        length: n.

    Returns:
        The axis (0 means: no batch axis), or None.
    """
    if any(part in name for part in _NEVER) or tensor.dim() == 0:
        return None
    if tensor.dim() >= 2 and tensor.size(0) in (1, batch):
        if tensor.size(1) == length:
            return 1
        if tensor.dim() == 4 and tensor.size(1) == 1 and tensor.size(2) == length:
            return 2
    if tensor.dim() == 2 and tensor.size(0) == length and tensor.is_floating_point():
        return 0
    return None
