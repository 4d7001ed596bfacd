"""The words in which a model's prunable units are described: `Group`, `Cut`, `Attribute`.

group   all units of one block: the heads of an attention, the neurons of a feed-forward block
unit    a neuron, or a KV group: one key and value head with all query heads that read it (where all query
        heads read one and the same, the unit is a query head)
cut     the features of one linear layer that belong to a group's units
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """Which features of one linear layer (nn.Linear, Conv1D, nn.Embedding) belong to a group's units.

    Attributes:
        module: Dotted name inside `find_head(model)`, PEFT's wrapping left out.
        axis: Whether they are input or output features.
        blocks: (offset, size): unit u owns features offset + u·size … offset + (u+1)·size of every block.
        in_features: Of the whole layer (an embedding's rows).
        out_features: Of the whole layer.
    """

    module: str
    axis: Literal["in", "out"]
    blocks: tuple[tuple[int, int], ...]
    in_features: int
    out_features: int

    def features(self, units: Tensor) -> Tensor:
        """The features (int64) of these units (int64), in the order given, block after block."""
        each = [
            (offset + units[:, None] * size + torch.arange(size, device=units.device)).flatten()
            for offset, size in self.blocks
        ]
        return torch.cat(each)


@dataclass(frozen=True)
class Attribute:
    """An int that counts heads or features and must follow: base + per_unit · (units kept).

    `name` is an attribute of the module, or "config.NAME" where the module's code reads the count off its
    config.
    """

    module: str
    name: str
    per_unit: int
    base: int = 0


@dataclass(frozen=True)
class Group:
    """The units of one block.

    Attributes:
        name: The same for every task head of an architecture (no `base_model_prefix`).
        kind: What a unit is.
        layer: Number of the layer, counted over the whole model, encoder first.
        count: Units.
        cuts: All layers that lose features, output projections included.
        outputs: The output projections, whose input features a mask scales: axis `in`, one block (0, size).
            More than one where layers share their units (T5's relative position bias).
        attributes: What else must follow, even if all units stay.
    """

    name: str
    kind: Literal["heads", "neurons"]
    layer: int
    count: int
    cuts: tuple[Cut, ...]
    outputs: tuple[Cut, ...]
    attributes: tuple[Attribute, ...]
