"""The closed form: a training step's memory from the model's shapes alone, without running anything.

The peak is the highest of a few moments: the start of the backward pass, when everything that the layers kept
and the logits are there, and its end, when all gradients are. See `shapes` for what a layer keeps.
"""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from leantune.anatomy import find_groups, find_head, find_stacks
from leantune.errors import UserError
from leantune.planner.building import attached, base_model
from leantune.planner.forecast import Figures, Memory
from leantune.planner.quantized import stand_in
from leantune.planner.resident import saving_peak
from leantune.planner.setting import Setting, check
from leantune.planner.shapes import Shapes, read_shapes

_FEW = 2
_LOGIT_BYTES = 12  # float32 logits, their log-softmax, its gradient


def estimate(setting: Setting) -> Figures:
    """Forecast one training step by formula.

    Args:
        setting: What to train and on which batch.

    Raises:
        UserError: The setting is refused, or the model's heads and feed-forward blocks are not found.
    """
    check(setting)
    shapes, tokens = _shapes_of(setting), setting.batch * setting.length
    chosen = _chosen(setting)  # tokens with a gradient
    kept = _kept(shapes, setting, tokens, chosen)
    forward, backward = _operations(shapes, setting, tokens, chosen)
    return Figures(
        memory=max(_moments(shapes, setting, chosen, kept), key=lambda memory: memory.total),
        saved_activation_bytes=kept + chosen * shapes.vocabulary * 4,
        parameters=shapes.whole.parameters,
        trained=shapes.whole.trained,
        forward_flops=forward,
        backward_flops=backward,
        engine="closed form",
        evaluation_peak=_evaluation_peak(shapes, setting) if setting.evaluates else 0,
        saving_peak=saving_peak(
            setting,
            shapes.whole.weights + shapes.whole.scales,
            2 * shapes.whole.trained_bytes,
            shapes.whole.trained_bytes,
        ),
    )


def _moments(shapes: Shapes, setting: Setting, chosen: int, kept: int) -> list[Memory]:
    """Start and end of the backward pass, and the update."""
    weights, gradients, optimizer = setting.sharing.shares
    fixed: dict[str, int] = {
        "weights": round(shapes.whole.weights * weights),
        "optimizer": round(2 * shapes.whole.trained_bytes * optimizer),
        "communication": setting.sharing.communication(shapes.units),
    }
    scales = round(shapes.whole.scales * weights)
    whole = round(shapes.whole.trained_bytes * gradients)
    early = whole if setting.accumulates else 0
    widest = max(layer.wide for layer in shapes.layers)
    logits = chosen * shapes.vocabulary * _LOGIT_BYTES
    backwards = 2 * chosen * widest
    again = chosen * (max(layer.kept for layer in shapes.layers) + widest) if setting.checkpointing else 0
    again += _score_bytes(shapes, setting, chosen, shapes.scores) if setting.checkpointing else 0
    copy = 0 if setting.fused or setting.device == "cpu" else shapes.whole.trained_bytes
    inside = scales + shapes.dequantised
    return [
        Memory(gradients=early, activations=kept, logits=logits, temporary=0, quantization=scales, **fixed),
        Memory(
            gradients=early,
            activations=kept,
            logits=0,
            temporary=again or backwards,
            quantization=inside,
            **fixed,
        ),
        Memory(gradients=whole, activations=0, logits=0, temporary=again, quantization=inside, **fixed),
        Memory(gradients=whole, activations=0, logits=0, temporary=copy, quantization=scales, **fixed),
    ]


def _chosen(setting: Setting) -> int:
    """Tokens of the batch that have a gradient."""
    tokens = setting.recipe.lean.tokens
    if tokens is None:
        return setting.batch * setting.length
    share = tokens.keep if isinstance(tokens.keep, int) else int(tokens.keep * setting.length + 0.5)
    return setting.batch * max(1, min(setting.length, share))


def _kept(shapes: Shapes, setting: Setting, tokens: int, chosen: int) -> int:
    """Bytes that the layers keep from the forward pass to the backward pass."""
    whole, outside = shapes.all, tokens * shapes.outside
    if setting.checkpointing:
        start = tokens * shapes.hidden if chosen < tokens else 0  # keys and values are made again from it
        return chosen * shapes.hidden * len(shapes.layers) + start + outside
    kept = chosen * whole.kept + outside
    if chosen < tokens:
        kept += (tokens - chosen) * whole.keys
    kept += len(shapes.layers) * _mask_bytes(shapes, setting, chosen)
    return kept + len(shapes.layers) * _score_bytes(shapes, setting, chosen, shapes.scores)


def _mask_bytes(shapes: Shapes, setting: Setting, queries: int) -> int:
    """Of the padding mask as one layer's fused attention keeps it; token selection makes one for all."""
    shared = shapes.scores or setting.recipe.lean.tokens is not None or not setting.padded
    return 0 if shared else queries * setting.length * setting.dtype.itemsize


def _score_bytes(shapes: Shapes, setting: Setting, queries: int, matrices: float) -> int:
    """Of one layer's matrices of scores, where attention has them in memory."""
    if not shapes.scores:
        return 0
    heads = max(layer.heads for layer in shapes.layers)
    return int(matrices * queries * setting.length * heads * setting.dtype.itemsize)


def _evaluation_peak(shapes: Shapes, setting: Setting) -> int:
    """A forward pass without gradient: a layer at a time, keys and values of a decoder, and the logits."""
    weights, _, optimizer = setting.sharing.shares
    resident = (
        shapes.whole.weights + shapes.whole.scales
    ) * weights + 2 * shapes.whole.trained_bytes * optimizer
    tokens, size = setting.evaluation_batch * setting.length, setting.dtype.itemsize
    caches = shapes.vocabulary > 0 and getattr(setting.config.get_text_config(), "use_cache", False)
    cache = tokens * shapes.all.cache if caches else 0
    layer = tokens * (2 * max(each.wide for each in shapes.layers) + 2 * shapes.hidden)
    layer += _score_bytes(shapes, setting, tokens, shapes.passing_scores) + shapes.dequantised
    # stored, in float32 (unless they are), row by row for the kernel, log-softmax
    logits = tokens * shapes.vocabulary * (size + (4 if size < 4 else 0) + 8)
    communication = setting.sharing.communication(shapes.units)
    return round(resident + communication + cache + max(layer, logits + tokens * shapes.hidden))


def _operations(shapes: Shapes, setting: Setting, tokens: int, chosen: int) -> tuple[int, int]:
    """Forward and backward: two operations a multiply-add, as many for each gradient asked for.

    Attention: two products forward, as many or more backward (fused kernels make the scores again: five).
    """
    body, head = 2 * shapes.whole.products, 2 * shapes.head_products
    attention = 4 * setting.length * shapes.all.attention
    forward = tokens * (body + attention) + chosen * head
    forward += chosen * (body + attention) if chosen < tokens else 0
    gradients = 2 if shapes.whole.trained > shapes.whole.parameters // 2 else 1
    again = chosen * (body + attention) if setting.checkpointing else 0
    back = 2.0 if shapes.scores else 2.5
    return forward, round(chosen * ((body + head) * gradients + back * attention)) + again


def _shapes_of(setting: Setting) -> Shapes:
    recipe = setting.recipe
    text = (
        recipe.model.model_dump_json()
        + recipe.lean.model_dump_json(exclude={"tokens"})
        + f"{setting.stage} {setting.device} {setting.storage} {recipe.lean.tokens is None} "
        + setting.config.to_json_string()
    )
    return _cached(_Key(text, setting))


class _Key:
    """A setting, equal to every other one of the same shapes."""

    def __init__(self, text: str, setting: Setting) -> None:
        self.text, self.setting = text, setting

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@functools.lru_cache(maxsize=64)
def _cached(key: _Key) -> Shapes:
    """Of a model of two layers, where all are alike: the others are two times over."""
    setting = key.setting
    count = _alike(setting)
    if count is None:
        return _read(setting)
    config = copy.deepcopy(setting.config)
    config.num_hidden_layers = _FEW
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:_FEW]
    return _read(replace(setting, config=config)).grown(count)


def _read(setting: Setting) -> Shapes:
    base = _on_meta(setting)
    groups = find_groups(base)
    if not groups:
        raise UserError(f"{type(base).__name__}: no attention heads or feed-forward blocks are found in it")
    model = attached(base, setting)
    if setting.storage is not None:
        stand_in(model, setting.storage, nullcontext)
    return read_shapes(model, groups, setting)


def _on_meta(setting: Setting) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        base = base_model(setting)
    base.tie_weights()
    return base


def _alike(setting: Setting) -> int | None:
    """How many layers the model has, if they and what is done to them are alike; else None."""
    adapter: Any = setting.recipe.lean.adapter
    named = (getattr(adapter, "target_modules", None), getattr(adapter, "exclude_modules", None))
    if any(any(letter.isdigit() for letter in str(name)) for name in named if name != "all-linear"):
        return None  # single layers may be named
    recipe = setting.recipe.model_dump_json(include={"model"})
    return _count_alike(_Key(recipe + setting.config.to_json_string(), setting))


@functools.lru_cache(maxsize=8)
def _count_alike(key: _Key) -> int | None:
    head = find_head(_on_meta(key.setting))
    stacks = find_stacks(head)
    shapes = {tuple(p.shape for p in layer.parameters()) for stack in stacks for layer in stack.layers}
    count: Any = getattr(head.config.get_text_config(), "num_hidden_layers", None)
    plain = len(stacks) == 1 and len(shapes) == 1 and len(stacks[0].layers) == count
    return count if plain and count > _FEW else None
