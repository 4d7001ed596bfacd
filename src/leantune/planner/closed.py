"""The closed form: a training step's memory from the model's shapes alone, without running anything.

The peak is the higher of two moments: the start of the backward pass, when everything that the layers kept
and the logits are there, and its end, when all gradients are. See `shapes` for what a layer keeps.
"""

from __future__ import annotations

import functools
from typing import Any

from accelerate import init_empty_weights

from leantune.anatomy import find_groups
from leantune.errors import UserError
from leantune.planner.building import attached, base_model
from leantune.planner.forecast import Figures, Memory
from leantune.planner.setting import Setting, check
from leantune.planner.shapes import Shapes, read_shapes

_LOGIT_BYTES = 12  # float32 logits, their log-softmax, its gradient
_SCORES = 3  # matrices of scores that unfused attention keeps: before, after softmax, after dropout


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
    widest = max(layer.wide for layer in shapes.layers)
    again = chosen * (max(layer.kept for layer in shapes.layers) + widest) if setting.checkpointing else 0
    logits = chosen * shapes.vocabulary * _LOGIT_BYTES
    fixed = shapes.trained_bytes if setting.accumulates else 0
    moment = max(logits, again or 2 * chosen * widest)
    starts = fixed + kept + moment >= shapes.trained_bytes + again
    memory = Memory(
        weights=shapes.weights,
        gradients=fixed if starts else shapes.trained_bytes,
        optimizer=2 * shapes.trained_bytes,
        activations=kept if starts else 0,
        logits=min(logits, moment) if starts else 0,
        temporary=moment - min(logits, moment) if starts else again,
    )
    forward, backward = _operations(shapes, setting, tokens, chosen)
    saved = kept + chosen * shapes.vocabulary * 4
    return Figures(memory, saved, shapes.parameters, shapes.trained, forward, backward, "closed form")


def _chosen(setting: Setting) -> int:
    """Tokens of the batch that have a gradient."""
    tokens = setting.recipe.lean.tokens
    if tokens is None:
        return setting.batch * setting.length
    share = tokens.keep if isinstance(tokens.keep, int) else int(tokens.keep * setting.length + 0.5)
    return setting.batch * max(1, min(setting.length, share))


def _kept(shapes: Shapes, setting: Setting, tokens: int, chosen: int) -> int:
    """Bytes that the layers keep from the forward pass to the backward pass."""
    whole = shapes.all
    if setting.checkpointing:
        start = tokens * shapes.hidden if chosen < tokens else 0  # keys and values are made again from it
        return chosen * shapes.hidden * len(shapes.layers) + start
    kept = chosen * whole.kept
    if chosen < tokens:
        kept += (tokens - chosen) * whole.keys
    if not shapes.fused:
        kept += _SCORES * chosen * setting.length * whole.heads * setting.dtype.itemsize
    return kept


def _operations(shapes: Shapes, setting: Setting, tokens: int, chosen: int) -> tuple[int, int]:
    """Forward and backward: two operations a multiply-add, as many for each gradient asked for."""
    body, head = 2 * shapes.products, 2 * shapes.head_products
    forward = tokens * body + chosen * head + (chosen * body if chosen < tokens else 0)
    gradients = 2 if shapes.trained > shapes.parameters // 2 else 1
    again = chosen * body if setting.checkpointing else 0
    return forward, chosen * (body + head) * gradients + again


def _shapes_of(setting: Setting) -> Shapes:
    recipe = setting.recipe
    text = (
        recipe.model.model_dump_json()
        + recipe.lean.model_dump_json(exclude={"tokens"})
        + setting.stage
        + setting.device
    )
    return _cached(_Key(text + setting.config.to_json_string(), setting))


class _Key:
    """A setting, equal to every other one of the same shapes."""

    def __init__(self, text: str, setting: Setting) -> None:
        self.text, self.setting = text, setting

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@functools.lru_cache(maxsize=32)
def _cached(key: _Key) -> Shapes:
    with init_empty_weights(include_buffers=False):
        base = base_model(key.setting)
    base.tie_weights()
    groups = find_groups(base)
    if not groups:
        raise UserError(f"{type(base).__name__}: no attention heads or feed-forward blocks are found in it")
    return read_shapes(attached(base, key.setting), groups, key.setting)
