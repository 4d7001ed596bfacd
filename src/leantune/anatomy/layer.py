"""The blocks of one layer, read off its module tree with the table of names in `projections`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from leantune.anatomy import projections as table
from leantune.anatomy.counts import head_attributes, neuron_attributes, reads
from leantune.anatomy.leaves import Leaf, class_of, resolve, walk
from leantune.anatomy.units import Attribute, Cut, Group
from leantune.errors import UserError


@dataclass(frozen=True, eq=False)
class Block:
    """A group with what is needed to see whether other layers share its units.

    Attributes:
        group: The group, by itself.
        path: Of the module that holds the block, relative to the layer.
        module: That module.
        heads: Query heads (0 for a feed-forward block).
    """

    group: Group
    path: str
    module: nn.Module
    heads: int = 0


def blocks_of(layer: nn.Module, name: str, number: int, prefix: str) -> list[Block]:
    """Attention and feed-forward blocks of one layer.

    Args:
        layer: The layer.
        name: Its dotted name.
        number: Which layer it is.
        prefix: What group names leave out.

    Raises:
        UserError: A part of it is not understood.
    """
    return _Reader(layer, name, number, prefix).blocks()


class _Reader:
    def __init__(self, layer: nn.Module, name: str, number: int, prefix: str):
        self.layer, self.name, self.number, self.prefix = layer, name, number, prefix
        self.leaves, self.holders = walk(layer, name)
        self.claimed: set[str] = set()
        self.attention: dict[str, int] = {}  # path of a module that holds an attention → its head size
        self.inner: dict[str, int] = {}  # path of a module that holds a feed-forward block → its neurons

    def blocks(self) -> list[Block]:
        found = [b for path, m in self.holders.items() if (b := self._attention(path, m)) is not None]
        neurons = [b for path, m in self.holders.items() if (b := self._forward(path, m)) is not None]
        for path, leaf in self.leaves.items():
            if path not in self.claimed:
                kind = class_of(leaf.module).__name__
                raise UserError(f"{leaf.name} ({kind}): leantune does not know this projection")
        self._check_parameters()
        for blocks, what in ((found, "attention"), (neurons, "feed-forward block")):
            if not blocks:
                kind = class_of(self.layer).__name__
                raise UserError(f"{self.name} ({kind}): no {what} whose projections leantune knows by name")
        return found + neurons

    # -- attention -------------------------------------------------------------------------------------------

    def _attention(self, path: str, module: nn.Module) -> Block | None:
        kind = class_of(module).__name__
        for row in table.APART:
            if found := self._claim(path, row.query, row.key, row.value, row.out):
                return self._apart(path, module, *found)
        if kind in table.CROSS and (found := self._claim(path, *table.CROSS[kind])):
            return self._fused(path, module, found[1], found[2], "blocks", query=found[0])
        if kind in table.FUSED:
            fused = table.FUSED[kind]
            if found := self._claim(path, fused.qkv, fused.out):
                return self._fused(path, module, found[0], found[1], fused.layout)
        return None

    def _apart(self, path: str, module: nn.Module, query: Leaf, key: Leaf, value: Leaf, out: Leaf) -> Block:
        d, heads = self._heads(path, module, out)
        groups = key.out_features // d
        sizes = {query.out_features: heads * d, key.out_features: groups * d, value.out_features: groups * d}
        if any(have != want for have, want in sizes.items()) or not groups or heads % groups:
            raise self._odd(path, query, key, value, out)
        units = groups if groups > 1 else heads  # of a lone KV head all query heads go one by one
        each = heads // units * d
        cuts = [_out(query, (0, each))]
        if units == groups:
            cuts += [_out(key, (0, d)), _out(value, (0, d))]
        for extra in table.ALSO_HEADS:
            for leaf in self._claim(path, extra):
                if leaf.out_features != heads * d:
                    raise self._odd(path, leaf, out)
                cuts.append(_out(leaf, (0, each)))
        return self._heads_block(path, module, cuts, out, heads, groups, d, units)

    def _fused(
        self, path: str, module: nn.Module, qkv: Leaf, out: Leaf, layout: str, query: Leaf | None = None
    ) -> Block:
        d, heads = self._heads(path, module, out)
        parts = 2 if query is not None else 3
        groups = (qkv.out_features // d - heads) // 2 if query is None else heads
        each = heads // max(groups, 1) * d
        width = 2 * groups * d + (heads * d if query is None else 0)
        uneven = groups < 1 or heads % groups or (layout == "heads" and heads != groups)
        if width != qkv.out_features or uneven:
            raise self._odd(path, qkv, out)
        if layout == "heads":
            cuts = [_out(qkv, (0, parts * d))]
        elif query is None:
            cuts = [_out(qkv, (0, each), (heads * d, d), ((heads + groups) * d, d))]
        else:
            cuts = [_out(query, (0, d)), _out(qkv, (0, d), (heads * d, d))]
        return self._heads_block(path, module, cuts, out, heads, groups, d)

    def _heads_block(
        self,
        path: str,
        module: nn.Module,
        cuts: list[Cut],
        out: Leaf,
        heads: int,
        groups: int,
        d: int,
        units: int | None = None,
    ) -> Block:
        units = units or groups
        output = _in(out, heads // units * d)
        name, kind = self._name(path), class_of(module).__name__
        if kind in table.UNFIT:
            raise UserError(f"{name} ({kind}) cannot be pruned: {table.UNFIT[kind]}")
        if reads(module).fixed_width:
            raise UserError(f"{name} ({kind}) cannot be pruned: its code reshapes to the width of its input")
        self.attention[path] = d
        self._check_buffers(name, module, {heads, groups, heads * d})
        attributes = tuple(head_attributes(name, module, heads, groups, d, units))
        group = self._group("heads", name, units, [*cuts, output], output, attributes)
        return Block(group, path, module, heads)

    def _heads(self, path: str, module: Any, out: Leaf) -> tuple[int, int]:
        """Size and number of query heads."""
        sizes = [getattr(module, n) for n in table.HEAD_DIM if type(getattr(module, n, None)) is int]
        counts = [getattr(module, n) for n in table.QUERY_HEADS if type(getattr(module, n, None)) is int]
        if not sizes and not counts:
            where = f"{self._name(path)} ({class_of(module).__name__})"
            raise UserError(f"{where} says neither its head size nor its number of heads")
        d = sizes[0] if sizes else out.in_features // counts[0]
        if not d or out.in_features % d or (counts and counts[0] * d != out.in_features):
            raise self._odd(path, out)
        return d, out.in_features // d

    # -- feed-forward ----------------------------------------------------------------------------------------

    def _forward(self, path: str, module: nn.Module) -> Block | None:
        fused = table.FUSED_FORWARD.get(class_of(module).__name__)
        for row in (fused,) if fused is not None else table.FORWARD:
            if found := self._claim(path, *row.up, row.down):
                *up, down = found
                return self._neurons_block(resolve(path, row.up[0]), up, down, 1 if fused is None else 2)
        return None

    def _neurons_block(self, first: str, up: list[Leaf], down: Leaf, parts: int) -> Block:
        count = down.in_features
        if any(leaf.out_features != parts * count for leaf in up):
            raise self._odd(first, *up, down)
        holder = first.rpartition(".")[0]
        name = self._name(holder or first)
        if holder:
            self.inner[holder] = count
        blocks = [(part * count, 1) for part in range(parts)]
        cuts = [_out(leaf, *blocks) for leaf in up]
        output = _in(down, 1)
        module = self.holders[holder]
        attributes = tuple(neuron_attributes(self._name(holder), module, count))
        return Block(self._group("neurons", name, count, [*cuts, output], output, attributes), holder, module)

    # -- what both need --------------------------------------------------------------------------------------

    def _claim(self, path: str, *relative: str) -> list[Leaf]:
        """These projections of the block at `path`; empty unless all are there."""
        paths = [resolve(path, r) for r in relative]
        if any(p not in self.leaves or p in self.claimed for p in paths):
            return []
        self.claimed.update(paths)
        return [self.leaves[p] for p in paths]

    def _group(
        self,
        kind: Any,
        name: str,
        count: int,
        cuts: list[Cut],
        output: Cut,
        attributes: tuple[Attribute, ...],
    ) -> Group:
        name = name.removeprefix(self.prefix)
        return Group(name, kind, self.number, count, tuple(cuts), (output,), attributes)

    def _name(self, path: str) -> str:
        return f"{self.name}.{path}" if path else self.name

    def _odd(self, path: str, *leaves: Leaf) -> UserError:
        shapes = ", ".join(f"{x.name.rpartition('.')[2]} {x.in_features}→{x.out_features}" for x in leaves)
        return UserError(f"{self._name(path)}: sizes do not add up to whole heads or neurons ({shapes})")

    # -- nothing may be left behind --------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        for path, holder in self.holders.items():
            for name, parameter in holder.named_parameters(recurse=False):
                if path.endswith(table.BIAS_TABLE):
                    continue
                reason = self._objection(path, holder, tuple(parameter.shape))
                if reason:
                    shape = "×".join(map(str, parameter.shape))
                    raise UserError(
                        f"{self._name(path)}.{name} ({class_of(holder).__name__}, {shape}): {reason}"
                    )

    def _objection(self, path: str, holder: nn.Module, shape: tuple[int, ...]) -> str | None:
        if all(size == 1 for size in shape):
            return None  # one factor for everything
        norm = "norm" in class_of(holder).__name__.lower()
        for inside, d in self.attention.items():
            if f"{path}.".startswith(f"{inside}.") and not (norm and shape == (d,)):
                return "heads cannot be pruned around a parameter that is not per head feature"
        for inside, count in self.inner.items():
            if f"{path}.".startswith(f"{inside}.") and (not norm or shape == (count,)):
                return "neurons cannot be pruned around a parameter of the feed-forward block"
        if len(shape) > 1:
            return "weights outside linear layers (a mixture of experts, for instance) cannot be pruned"
        return None

    def _check_buffers(self, name: str, module: nn.Module, sizes: set[int]) -> None:
        for key, buffer in module.named_buffers():
            if "freq" not in key and buffer.numel() in sizes:
                raise UserError(f"{name}.{key}: leantune does not know this buffer of one value per head")


def _out(leaf: Leaf, *blocks: tuple[int, int]) -> Cut:
    return Cut(leaf.name, "out", blocks, leaf.in_features, leaf.out_features)


def _in(leaf: Leaf, size: int) -> Cut:
    return Cut(leaf.name, "in", ((0, size),), leaf.in_features, leaf.out_features)
