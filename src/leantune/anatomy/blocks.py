"""Attention heads and feed-forward neurons of a model: which features of which layers belong to each.

Read off the module tree: `projections` is the table of names, `layer` reads one layer with it. A removed unit
must leave no trace anywhere else, so whatever could be silently wrong is refused by name: projections that no
row of the table claims, parameters that run over all heads or neurons (a norm over the whole width, experts
stored as one tensor), sizes that do not add up, numbers of unknown meaning that the block's code reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from leantune.anatomy import projections as table
from leantune.anatomy.counts import takes_bias
from leantune.anatomy.layer import Block, blocks_of
from leantune.anatomy.leaves import plain
from leantune.anatomy.stack import find_head, find_stacks
from leantune.anatomy.units import Attribute, Cut, Group
from leantune.errors import UserError

__all__ = ["Attribute", "Cut", "Group", "find_groups"]


def find_groups(model: nn.Module) -> tuple[Group, ...]:
    """The groups of every layer, in order of the layers, heads before neurons, encoder first.

    The model may be plain, wrapped by PEFT, or on meta; the groups are the same.

    Raises:
        UserError: A layer is not understood; the message names what is missing.
    """
    head = find_head(model)
    prefix = head.base_model_prefix
    prefix = f"{prefix}." if prefix and hasattr(head, prefix) else ""
    stacks, number = [], 0
    for layers in _stacks(head):
        stack = []
        for name, layer in layers:
            stack += blocks_of(layer, name, number, prefix)
            number += 1
        stacks.append(stack)
    groups = [group for stack in stacks for group in _with_bias(head, stack)]
    _check_sharing(head, groups)
    return tuple(sorted(groups, key=lambda group: (group.layer, group.kind)))


def _stacks(head: PreTrainedModel) -> list[list[tuple[str, nn.Module]]]:
    """Names and modules of the layers; where they bear no mark (MPNet), the longest list of equals."""
    try:
        return [list(zip(stack.names, stack.layers, strict=True)) for stack in find_stacks(head)]
    except UserError:
        lists = [
            [(f"{name}.{i}", layer) for i, layer in enumerate(module)]
            for name, module in head.named_modules()
            if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
        ]
        if not lists:
            raise
        return [max(lists, key=len)]


# -- a learned bias per head and distance, made once and handed from layer to layer --------------------------


def _with_bias(head: PreTrainedModel, stack: list[Block]) -> Iterator[Group]:
    """The groups of a stack; attentions that are handed one bias share their units."""
    biased: dict[str, list[Block]] = {}
    for block in stack:
        if block.heads and (takes_bias(block.module) or hasattr(block.module, table.BIAS_TABLE)):
            biased.setdefault(block.path, []).append(block)
        else:
            yield block.group
    for blocks in biased.values():
        yield from _share_bias(head, blocks, stack)


def _share_bias(head: PreTrainedModel, blocks: list[Block], stack: list[Block]) -> Iterator[Group]:
    tables = [b for b in blocks if hasattr(b.module, table.BIAS_TABLE)]
    if len(tables) == len(blocks):  # every layer has its own
        for block in blocks:
            yield _tied([block], [_table_cut(head, block)])
    elif len(tables) == 1:  # made in one layer, handed on (T5)
        yield _tied(blocks, [_table_cut(head, tables[0])])
    elif not tables and all(getattr(b.module, "has_relative_attention_bias", None) is False for b in blocks):
        # No bias: zeros that the first layer makes, one for each of its heads. One for all fits every layer.
        for block in blocks:
            own = tuple(
                replace(a, per_unit=0, base=1) if a.name in table.QUERY_HEADS else a
                for a in block.group.attributes
            )
            yield replace(block.group, attributes=own)
    else:
        yield _tied(blocks, [_outer_table_cut(head, blocks)])


def _tied(blocks: list[Block], cuts: list[Cut]) -> Group:
    """One group whose units are removed from all these blocks."""
    groups = [block.group for block in blocks]
    if len({(g.count, b.heads) for g, b in zip(groups, blocks, strict=True)}) != 1:
        raise UserError(f"{groups[0].name}: layers with one position bias differ in their number of heads")
    return replace(
        groups[0],
        cuts=(*cuts, *(cut for group in groups for cut in group.cuts)),
        outputs=tuple(cut for group in groups for cut in group.outputs),
        attributes=tuple(a for group in groups for a in group.attributes),
    )


def _table_cut(head: PreTrainedModel, block: Block) -> Cut:
    name = next(name for name, module in head.named_modules() if plain(module) is block.module)
    return _embedding_cut(f"{name}.{table.BIAS_TABLE}", getattr(block.module, table.BIAS_TABLE), block)


def _outer_table_cut(head: PreTrainedModel, blocks: list[Block]) -> Cut:
    """The table of a bias that is made outside the layers (MPNet)."""
    found = [(n, m) for n, m in head.named_modules() if n.endswith(f".{table.BIAS_TABLE}")]
    if len(found) != 1:
        kind, name = type(blocks[0].module).__name__, blocks[0].group.name
        raise UserError(
            f"{name} ({kind}) is handed a bias per head; leantune finds no {table.BIAS_TABLE} for it"
        )
    return _embedding_cut(*found[0], blocks[0])


def _embedding_cut(name: str, embedding: Any, block: Block) -> Cut:
    embedding = plain(embedding)
    size = block.heads // block.group.count
    if not isinstance(embedding, nn.Embedding) or embedding.embedding_dim != block.heads:
        raise UserError(f"{name}: expected an embedding of {block.heads} features, one per head")
    return Cut(name, "out", ((0, size),), embedding.num_embeddings, embedding.embedding_dim)


# -- no weight in two places ---------------------------------------------------------------------------------


def _check_sharing(head: PreTrainedModel, groups: list[Group]) -> None:
    """No cut layer's weight is used by another layer."""
    seen = Counter(id(p) for _, p in head.named_parameters(remove_duplicate=False))
    for group in groups:
        for cut in group.cuts:
            module = plain(head.get_submodule(cut.module))
            if any(seen[id(p)] > 1 for p in module.parameters(recurse=False)):
                raise UserError(f"{cut.module}: its weight is shared with another layer and cannot be cut")
