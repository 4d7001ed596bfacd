"""Telling one base model from another without reading all of it.

A plan made for one base would run on any other of the same shape and give nonsense. So a plan carries the
shapes of what it cuts and a few weights of each block; they are compared before anything is sliced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from leantune.anatomy import Group, find_head
from leantune.errors import UserError
from leantune.lightpeft.shared import whole

_SAMPLES = 4  # weights of each output projection
# bfloat16 keeps 8 bits: the same weights in another dtype differ by this much, relatively.
_TOLERANCE = 2.0**-7

Reader = Callable[[str], Tensor]


class Fingerprint(BaseModel):
    """Of a base model, as far as plans care.

    Attributes:
        architecture: The config's `model_type`, for messages.
        shapes: SHA-256 of the names and shapes of all layers that can be cut.
        samples: Block → a few weights of its output projection.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    shapes: str
    samples: dict[str, tuple[float, ...]]


def fingerprint(model: nn.Module, groups: tuple[Group, ...], read: Reader | None = None) -> Fingerprint:
    """The fingerprint of the model's base, of a file's weights where `read` reads them by parameter name."""
    head = find_head(model)
    weights = base_weights(model)
    shapes = sorted(
        f"{plain_name(head, cut.module)}:{tuple(weights[cut.module].shape)}"
        for group in groups
        for cut in group.cuts
    )
    samples = {}
    for group in groups:
        name = group.outputs[0].module
        samples[group.name] = _sample(read(f"{name}.weight") if read else weights[name])
    digest = hashlib.sha256("\n".join(shapes).encode()).hexdigest()
    return Fingerprint(architecture=head.config.model_type, shapes=digest, samples=samples)


def check_same_base(
    expected: Fingerprint, model: nn.Module, groups: tuple[Group, ...], read: Reader | None = None
) -> None:
    """Compare with a model's base (or, through `read`, with a file's).

    Raises:
        UserError: It is another base, or one that is pruned already.
    """
    found = fingerprint(model, groups, read)
    if found.shapes != expected.shapes:
        raise UserError(
            f"the pruning plan is for another base model: {expected.architecture} of other shapes than this "
            f"{found.architecture} (or this one is pruned already)"
        )
    for name, values in expected.samples.items():
        there = torch.tensor(found.samples.get(name, ()), dtype=torch.float64)
        mine = torch.tensor(values, dtype=torch.float64)
        if there.shape != mine.shape or not torch.allclose(there, mine, rtol=_TOLERANCE, atol=1e-6):
            raise UserError(
                f"the pruning plan is for another base model: same shapes, other weights (seen at {name})"
            )


def base_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Weight of every layer by its name in the plain model, adapters looked through."""
    weights: dict[str, Any] = {}
    for name, module in find_head(model).named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            weights[name.removesuffix(".base_layer")] = weight
    return weights


def plain_name(head: nn.Module, name: str) -> str:
    """A name without the base model's prefix: the same whatever head sits on it."""
    return name.removeprefix(f"{getattr(head, 'base_model_prefix', '')}.")


def _sample(weight: Tensor) -> tuple[float, ...]:
    """Weights along the diagonal, evenly spaced."""
    weight = whole(weight.detach())
    steps = [(side - 1) * i // (_SAMPLES - 1) for side in weight.shape[:2] for i in range(_SAMPLES)]
    rows, columns = steps[:_SAMPLES], steps[_SAMPLES:]
    return tuple(float(weight[row, column]) for row, column in zip(rows, columns, strict=True))
