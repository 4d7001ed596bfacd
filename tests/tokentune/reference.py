"""TokenTune by brute force, from METHODS' formulas alone: what the implementation is compared with.

One ordinary forward over all tokens, in which everything of an unchosen token is cut off from the gradient:
its hidden state before and after every layer, its key and its value at every attention call. It saves
nothing; it is right by inspection. It shares no code with leantune but
the shift of a seq2seq model's labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from leantune.anatomy import decoder_inputs


def cut(x: Tensor, chosen: Tensor, axis: int) -> Tensor:
    """x with the positions (along `axis`) outside `chosen` (batch, n) bool detached: [sg x_Ḡ ; x_G]."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = chosen.shape
    return torch.where(chosen.view(shape), x, x.detach())


@contextmanager
def brute_force(model: nn.Module, *chosen: Tensor) -> Iterator[None]:
    """Inside, forwards of `model` cut unchosen tokens off.

    Args:
        model: Any model with the attention interface, or DeBERTa-v2.
        *chosen: Bool masks (batch, n): of the one sequence, or of the encoder's and the decoder's.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def mask_of(module: nn.Module, keys: bool = False) -> Tensor:
        parts = names[id(module)].split(".")
        cross = keys and any(part in ("encoder_attn", "EncDecAttention", "cross_attention") for part in parts)
        return chosen[0] if cross or "encoder" in parts else chosen[-1]

    def hidden_in(layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
        h = cut(args[0] if args else kwargs["hidden_states"], mask_of(layer), 1)
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    def hidden_out(layer: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if isinstance(output, Tensor):
            return cut(output, mask_of(layer), 1)
        return (cut(output[0], mask_of(layer), 1), *output[1:])

    def projected(projection: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        mask = mask_of(projection)  # the same projection also maps the table of relative positions: no tokens
        return cut(output, mask, 1) if output.shape[:2] == mask.shape else None

    original = ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(name: str, default: object) -> object:
        kernel = original(name, default)

        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: object,
            **kwargs: object,
        ) -> object:
            mine = mask_of(module, keys=True)
            return kernel(module, query, cut(key, mine, 2), cut(value, mine, 2), attention_mask, **kwargs)

        return attend

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, GradientCheckpointingLayer):
                stack.callback(module.register_forward_pre_hook(hidden_in, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(hidden_out).remove)
            if name.endswith(("key_proj", "value_proj")):  # DeBERTa
                stack.callback(module.register_forward_hook(projected).remove)
        ALL_ATTENTION_FUNCTIONS.get_interface = get_interface  # type: ignore[method-assign]
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS.get_interface


def as_mask(choice: Tensor, n: int) -> Tensor:
    """(batch, k) positions padded with -1 → (batch, n) bool."""
    mask = torch.zeros(choice.size(0), n + 1, dtype=torch.bool)
    return mask.scatter(1, choice.masked_fill(choice < 0, n), True)[:, :n]


def reference_batch(
    model: nn.Module, batch: dict[str, Tensor], task: str, chosen: Tensor
) -> dict[str, Tensor]:
    """The batch without the labels of unchosen tokens (batch, n), so that the model's own loss is ours."""
    if task in ("classification", "image", "qa"):
        return batch
    labels = batch["labels"]
    # a causal LM's token t predicts label t + 1
    keep = F.pad(chosen[:, :-1], (1, 0), value=False) if task == "causal-lm" else chosen
    out = {**batch, "labels": labels.masked_fill(~keep, -100)}
    if task == "seq2seq":  # the decoder reads the full labels
        out["decoder_input_ids"] = decoder_inputs(model, labels)
    return out
