"""Counts that a block's code reads: ints that must follow when heads or neurons go, or that nobody knows.

A module that splits its features by `self.num_heads` is wrong once heads are gone and the number is not. So
what a class reads is taken from its source, and a number of unknown meaning is refused.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from leantune.anatomy import projections as table
from leantune.anatomy.leaves import class_of
from leantune.anatomy.units import Attribute
from leantune.errors import UserError


def head_attributes(
    name: str, module: nn.Module, heads: int, groups: int, d: int, units: int
) -> Iterator[Attribute]:
    """Ints of an attention module that must follow the number of its units.

    Units are its KV groups, or the query heads of a lone KV head (which then stays).
    """
    per = heads // units
    code = reads(module)
    widths = {heads, groups, heads * d, groups * d, (heads + 2 * groups) * d, 2 * heads * d, 2 * groups * d}
    for key, value in vars(module).items():
        if type(value) is not int:
            continue
        if key in table.QUERY_HEADS and value == heads:
            yield Attribute(name, key, per)
        elif key in table.SHARING and units != groups:
            yield Attribute(name, key, 1)
        elif key in table.KEY_HEADS and value == groups:
            yield Attribute(name, key, int(units == groups), int(units != groups))
        elif key in code.own and key in table.WIDTH and value == heads * d:
            yield Attribute(name, key, per * d)
        elif key in code.own and key not in table.NEVER and value in widths:
            raise _unknown(name, module, key, value)
    for key in sorted(code.config):
        value = getattr(getattr(module, "config", None), key, None)
        if key in table.QUERY_HEADS and value == heads:
            yield Attribute(name, f"config.{key}", per)
        elif key in table.KEY_HEADS and value == groups:
            yield Attribute(name, f"config.{key}", int(units == groups), int(units != groups))
        elif key not in table.NEVER and type(value) is int and value in widths:
            raise _unknown(name, module, f"config.{key}", value)


def neuron_attributes(name: str, module: nn.Module, count: int) -> Iterator[Attribute]:
    """Ints of a feed-forward module that must follow the number of its neurons."""
    code = reads(module)
    for key, value in vars(module).items():
        if type(value) is not int or key not in code.own or value not in (count, 2 * count):
            continue
        if key in table.NEURONS:
            yield Attribute(name, key, value // count)
        elif key not in table.NEVER:
            raise _unknown(name, module, key, value)


def _unknown(name: str, module: nn.Module, key: str, value: int) -> UserError:
    kind = class_of(module).__name__
    return UserError(
        f"{name} ({kind}): its code reads {key}={value}, and leantune does not know what it means"
    )


def takes_bias(module: nn.Module) -> bool:
    """Whether the attention is handed a bias per head."""
    return bool(set(table.BIAS_ARGUMENTS) & set(inspect.signature(type(module).forward).parameters))


# -- source ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """What the methods of a class (its __init__ aside) read.

    Attributes:
        own: Names read off `self`.
        config: Names read off `self.config`.
        fixed_width: Whether a tensor is given the width of the module's input in a `view` or `reshape`, which
            fits the joined heads only while none is missing.
    """

    own: frozenset[str]
    config: frozenset[str]
    fixed_width: bool


_WIDTHS = ("hidden_dim", "hidden_size", "embed_dim")


def reads(module: nn.Module) -> Reads:
    """What the code of a module's class reads, its bases included up to nn.Module.

    Raises:
        UserError: There is no code to be seen.
    """
    cls: Any = class_of(module)
    return _reads(cls)


@cache
def _reads(cls: Any) -> Reads:
    found = _Reading()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            raise UserError(f"{cls.__name__}: its source cannot be read, so no unit can go") from None
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                found.visit(node)
    return Reads(frozenset(found.own), frozenset(found.config), found.fixed_width)


class _Reading(ast.NodeVisitor):
    def __init__(self) -> None:
        self.own: set[str] = set()
        self.config: set[str] = set()
        self.inputs: set[str] = set()  # first parameters: the tensor that comes in
        self.last_sizes: set[str] = set()  # c of `a, b, c = hidden_states.shape`
        self.fixed_width = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: N802
        self.inputs |= {argument.arg for argument in node.args.args[1:2]}
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:  # noqa: N802
        value = node.value
        if isinstance(value, ast.Name) and value.id == "self":
            self.own.add(node.attr)
        elif isinstance(value, ast.Attribute) and value.attr == "config":
            self.config.add(node.attr)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:  # noqa: N802
        target = node.targets[0]
        source: Any = node.value.func if isinstance(node.value, ast.Call) else node.value
        if getattr(source, "attr", None) in ("shape", "size") and isinstance(target, ast.Tuple):
            whose, last = source.value, target.elts[-1]
            ours = isinstance(whose, ast.Name) and whose.id in self.inputs and len(target.elts) == 3
            if ours and isinstance(last, ast.Name):
                self.last_sizes.add(last.id)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:  # noqa: N802
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("view", "reshape"):
            for argument in node.args:
                by_name = isinstance(argument, ast.Name) and argument.id in self.last_sizes
                if by_name or (isinstance(argument, ast.Attribute) and self._is_width(argument)):
                    self.fixed_width = True
        self.generic_visit(node)

    def _is_width(self, node: ast.Attribute) -> bool:
        return node.attr in _WIDTHS and not (isinstance(node.value, ast.Name) and node.value.id == "self")
