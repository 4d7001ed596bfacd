"""Quantised base layers: what a packed weight stands for, and which of them an adapter may be trained on.

Nothing here imports a quantisation library: layers are told by what they hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leantune.errors import UserError

# torchao's weight-only tensors whose gradient with respect to the input was found exact, and the attribute
# that says that inputs are quantised as well.
_TORCHAO = {"Int8Tensor": "act_quant_kwargs", "IntxUnpackedToInt8Tensor": "activation_quantization"}


def packing(layer: nn.Module) -> str | None:
    """Who packed a layer's weight: `bnb 4bit`, `bnb 8bit`, `torchao`, or None for a plain layer."""
    kind = type(getattr(layer, "weight", None))
    if kind.__module__.startswith("torchao."):
        return "torchao"
    return {"Params4bit": "bnb 4bit", "Int8Params": "bnb 8bit"}.get(kind.__name__)


def logical_numel(parameter: Tensor) -> int:
    """Weights that a parameter stands for; bitsandbytes packs two of four bits into one number."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def dequantised_weight(layer: Any) -> Tensor:
    """The weight that a quantised layer computes with, (d_out, d_in), as its library unpacks it.

    Args:
        layer: One for which `packing` is not None.

    Returns:
        A new tensor; in the dtype that was quantised, float32 for bitsandbytes 8-bit, which forgets it.
    """
    weight = layer.weight
    if packing(layer) == "torchao":
        return weight.dequantize()
    from bitsandbytes import functional

    if packing(layer) == "bnb 4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scale = weight.SCB if layer.state.SCB is None else layer.state.SCB  # moves at the first forward pass
    return functional.int8_vectorwise_dequant(weight.data, scale)


def make_trainable(layer: Any, name: str) -> None:
    """See to it that a quantised layer computes and passes gradients; nothing happens to a plain one.

    On CPUs with AVX512_BF16, bitsandbytes repacks a 4-bit weight for inference in the first forward pass in
    evaluation mode. From then on no gradient passes, and nothing says so. Here that is switched off.
    And its CPU kernel (0.50.2) unpacks some 4-bit weights whose rows are no whole number of blocks with the
    scales of other blocks, just as silently. Such layers are refused.

    Args:
        layer: Any layer.
        name: Its name, for messages.

    Raises:
        UserError: The layer was repacked already, loses the gradient by its kind, or is unpacked wrongly.
    """
    kind = packing(layer)
    if kind == "bnb 4bit":
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise UserError(
                f"layer {name!r} was repacked for inference by bitsandbytes (a forward pass in evaluation "
                f"mode on this CPU), and no gradient passes it any more: load the model again, and attach "
                f"the adapter before it is used"
            )
        layer.support_avx512bf16_for_cpu = False
        _check_unpacking(layer, name)
    elif kind == "torchao":
        _check_torchao(layer.weight, name)


def _check_unpacking(layer: Any, name: str) -> None:
    """Where the rows of a 4-bit weight are no whole number of blocks: is it unpacked as it was packed?"""
    weight, state = layer.weight, layer.weight.quant_state
    if weight.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return
    from bitsandbytes import functional

    codes, count = weight.data.view(torch.uint8).flatten(), torch.Size(state.shape).numel()
    values = state.code[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()][:count]
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    expected = (values * scales.repeat_interleave(state.blocksize)[:count]).reshape(state.shape)
    if not torch.allclose(dequantised_weight(layer).float(), expected, rtol=1e-2, atol=0):
        raise UserError(
            f"layer {name!r} ({state.shape[1]} inputs): bitsandbytes unpacks 4-bit weights wrongly on this "
            f"CPU unless the inputs are a multiple of {state.blocksize}; quantise to 8 bits, or use a GPU"
        )


def _check_torchao(weight: Any, name: str) -> None:
    kind = type(weight).__name__
    accepted = "accepted are Int8WeightOnlyConfig and IntxWeightOnlyConfig"
    if kind == "LinearActivationQuantizedTensor" or getattr(weight, _TORCHAO.get(kind, ""), None) is not None:
        raise UserError(
            f"layer {name!r}: torchao quantises its input too (dynamic activation), which silently drops the "
            f"gradient; {accepted}"
        )
    if kind not in _TORCHAO:
        raise UserError(f"layer {name!r}: torchao's {kind} is not known to pass gradients; {accepted}")
