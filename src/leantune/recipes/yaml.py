"""YAML as a recipe needs it: safe, the 1.2 core schema, no duplicate keys, no aliases.

PyYAML reads YAML 1.1, where `5e-4` is a string, `no` is False and a repeated key silently wins. Aliases and
tags are refused because a recipe has no use for them and a hostile one has (entity expansion, constructors).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from leantune.errors import UserError

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's implicit types."""

    yaml_implicit_resolvers: dict[Any, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*name) are not accepted in a recipe{_where(self.peek_event())}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"key {key!r} is not a word{_where(key_node)}")
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is given twice{_where(key_node)}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _where(item: Any) -> str:
    return f", line {item.start_mark.line + 1}"


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    # int comes before float: the first pattern that matches decides
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    """`010` is ten: YAML 1.1's octal is a trap."""
    text = str(loader.construct_scalar(node))
    base = {"0x": 16, "0o": 8}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, source: str) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        source: What to call it in an error (a file name, a `key=value`).

    Raises:
        UserError: It is no YAML, or uses an alias, a tag or a key twice; with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise UserError(f"{source}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise UserError(f"{source}{line}: not valid YAML: {reason}") from None


def read(path: Path) -> Any:
    """Read a YAML file of at most 1 MiB.

    Raises:
        UserError: The file is missing, no file, too large, not UTF-8 or not valid.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: larger than 1 MiB, this is no recipe")
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def dump(value: Any) -> str:
    """Write plain data as YAML, keys in their own order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
