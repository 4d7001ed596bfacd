"""From a YAML file and `key=value` overrides to a validated Recipe; all mistakes are told at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from leantune.errors import UserError, brief, shown
from leantune.recipes import yaml
from leantune.recipes.schema import Recipe
from leantune.recipes.training_arguments import check_extra_arguments


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override, validate.

    Raises:
        UserError: One line for each mistake: the key as typed, the value, what is accepted.
    """
    data = yaml.read(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {_join(Recipe.model_fields)}")
    for keys, value in parse_overrides(overrides):
        _set(data, keys, value)
    return validate(data, str(path))


def parse_overrides(overrides: Iterable[str]) -> list[tuple[list[str], Any]]:
    """`train.epochs=1` → (["train", "epochs"], 1); values are read as YAML.

    Raises:
        UserError: One of them is not of that form.
    """
    parsed = []
    for text in overrides:
        key, sign, value = text.partition("=")
        keys = key.strip().split(".")
        if not sign or not all(keys):
            raise UserError(f"{shown(text)}: an override is key=value, for example train.epochs=1")
        parsed.append((keys, yaml.parse(value, brief(text))))
    return parsed


def validate(data: Mapping[str, Any], source: str) -> Recipe:
    """Plain data → Recipe.

    Raises:
        UserError: As `load_recipe`.
    """
    lines: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        lines += [_line(data, details) for details in error.errors()]
    train = data.get("train")
    if isinstance(train, Mapping):
        lines += check_extra_arguments(train)
    if lines or recipe is None:
        raise UserError("\n".join(f"{source}: {line}" for line in dict.fromkeys(lines)))
    return recipe


def _set(data: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1], 1):
        inner = data.setdefault(key, {})
        if inner is None:
            inner = data[key] = {}
        if not isinstance(inner, dict):
            whole, part = brief(".".join(keys)), brief(".".join(keys[:depth]))
            raise UserError(f"{whole}: {part} is {shown(inner)}, not a group of keys")
        data = inner
    data[keys[-1]] = value


_WHAT = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "none_required": "null",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
    "dict_type": "a group of keys",
}
_BOUND = {"greater_than": ("above", "gt"), "greater_than_equal": ("at least", "ge")}
_BOUND |= {"less_than": ("below", "lt"), "less_than_equal": ("at most", "le")}


def _line(data: Mapping[str, Any], details: ErrorDetails) -> str:
    """One mistake in one line: key, value, what is accepted, and a guess at what was meant."""
    keys = _typed_keys(data, details["loc"])
    key, kind, context = brief(".".join(keys)), details["type"], details.get("ctx", {})
    if kind == "missing":
        return f"{key} is missing"
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggest(keys[-1], _accepted_keys(keys[:-1], data))}"
    given = f"{key} = {shown(details['input'])}"
    if kind in ("literal_error", "enum"):
        return f"{given}: accepted are {context['expected']}{_near(details['input'], context['expected'])}"
    if kind == "union_tag_invalid":
        tags = context["expected_tags"]
        return f"{key}.type = {shown(context['tag'])}: accepted are {tags}{_near(context['tag'], tags)}"
    if kind == "union_tag_not_found":
        return f"{key}.type is missing: accepted are 'lamda', 'lora', 'bottleneck', 'none'"
    if kind in _BOUND:
        word, name = _BOUND[kind]
        return f"{given}: must be {word} {context[name]}"
    if kind in _WHAT:
        return f"{given}: must be {_WHAT[kind]}"
    return f"{given}: {details['msg'].removeprefix('Value error, ')}"


def _typed_keys(data: Any, location: tuple[int | str, ...]) -> list[str]:
    """The keys as the person typed them: pydantic adds union members' names, which are not in the data."""
    keys: list[str] = []
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(data, Mapping) and (part in data or last):
            keys.append(str(part))
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int):
            keys.append(str(part))
            data = data[part]
    return keys


def _accepted_keys(keys: list[str], data: Any) -> list[str]:
    """Keys that the group at `keys` may have."""
    model: Any = Recipe
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
        model = _group(model.model_fields[key].annotation, data) if key in model.model_fields else None
        if model is None:
            return []
    return list(model.model_fields)


def _group(annotation: Any, data: Any) -> type[BaseModel] | None:
    """The model behind an annotation; of a tagged union, the one that the data's `type` names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    groups = [group for part in get_args(annotation) if (group := _group(part, data))]
    tag = data.get("type") if isinstance(data, Mapping) else None
    for group in groups:
        if "type" in group.model_fields and tag in get_args(group.model_fields["type"].annotation):
            return group
    return groups[0] if groups else None


def _suggest(word: str, accepted: list[str]) -> str:
    near = difflib.get_close_matches(word, accepted, n=1, cutoff=0.6)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"{guess} (accepted: {_join(accepted)})" if accepted else guess


def _near(value: Any, expected: str) -> str:
    words = [word for word in expected.replace(" or ", ", ").replace("'", "").split(", ") if word]
    near = difflib.get_close_matches(str(value), words, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _join(words: Iterable[str]) -> str:
    return ", ".join(words)
