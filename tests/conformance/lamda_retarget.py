"""A pytest plugin: PEFT's own test suite with LaMDA in place of LoRA. No file of PEFT's is touched.

    PEFT_CONFORMANCE=lora|lamda|lamda-paper python -m pytest -p lamda_retarget <peft's tests>

A test is in scope if one of its parameters is a `LoraConfig`, as class or as object. Of its rows, those of
other methods go, and those of LoRA stay if LaMDA has a counterpart of their settings. With `lora` they run as
they are; with `lamda` as LaMDA, under the same ids. The rows without a counterpart, and what became of each
test, are written to the file `PEFT_CONFORMANCE_OUT`.

Top-level and without imports from our tests: PEFT's folder of tests is called `tests` too.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig

from leantune import LamdaConfig

FORM = os.environ.get("PEFT_CONFORMANCE", "lora")
_FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lamda": {},
    "lamda-paper": {"init_scale": "spectrum", "init_b": "vectors"},
}
_NAMES = {"lora_alpha": "lamda_alpha", "lora_dropout": "lamda_dropout", "init_lora_weights": "init_weights"}
_KNOWN = {field.name for field in fields(LamdaConfig)}
# LoRA's ranks over this. LaMDA refuses ranks above a layer's size, and the smallest here has two outputs.
_RANKS = 4


class NoCounterpartError(Exception):
    """LaMDA has nothing like these settings of LoRA's; the message is the reason."""


def lamda_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """LoRA's settings as LaMDA's: names, and ranks and alphas over 4.

    Raises:
        NoCounterpartError: One of them is LoRA's alone.
    """
    out = dict(_FORMS[FORM])
    for key, value in settings.items():
        name = _NAMES.get(key, key)
        if name not in _KNOWN:
            raise NoCounterpartError(f"{key}: LoRA's alone")
        if name == "init_weights" and not isinstance(value, bool):
            raise NoCounterpartError(f"{key}={value!r}: LoRA's alone")
        if name == "r":
            value = max(1, value // _RANKS)
        elif name == "rank_pattern":
            value = {key: max(1, r // _RANKS) for key, r in value.items()}
        elif name == "lamda_alpha" and value is not None:
            value = value / _RANKS
        out[name] = value
    if "conv1d" in (out.get("target_modules") or ()):
        out["rank_pattern"] = {"conv1d": 1}  # the suite's Conv1D has one output
    return out


class Retargeted(LamdaConfig):
    """`LamdaConfig` that takes LoRA's names, with a quarter of its default rank. Files hold LaMDA's own."""

    target_parameters = None  # the suite reads this field of LoRA's

    def __init__(self, **settings: Any) -> None:
        own = "peft_type" in settings  # `dataclasses.replace` hands on what is there already
        super().__init__(**(settings if own else {"r": 8 // _RANKS, **lamda_settings(settings)}))


# -- which rows ----------------------------------------------------------------------------------------------


def _layer_kinds(row: tuple[Any, ...], settings: dict[str, Any]) -> None:
    """LaMDA adapts linear layers and `Conv1D`s; where a row targets others, PEFT's names say so."""
    targets = settings.get("target_modules") or ()
    names = {targets} if isinstance(targets, str) else set(targets)
    for model in row:
        if isinstance(model, str) and model.startswith(("Conv1d", "Conv2d", "Conv3d")) and " " not in model:
            raise NoCounterpartError("convolutions: linear layers only")
    for words, kind in (
        (("conv2d", "conv3d"), "convolutions"), (("mha",), "nn.MultiheadAttention"),
        (("emb", "embed_tokens"), "embeddings"),
    ):  # fmt: skip
        if any(word in name for name in names for word in words):
            raise NoCounterpartError(f"{kind}: linear layers only")


def _of_object(config: LoraConfig) -> dict[str, Any]:
    """What was said when a LoraConfig was made."""
    said = {}
    for field in fields(config):
        default = field.default if field.default is not MISSING else None
        if field.default_factory is not MISSING:
            default = field.default_factory()
        value = getattr(config, field.name)
        if value != default and field.name not in ("peft_type", "peft_version"):
            said[field.name] = value
    return said


def _is_lora(value: Any) -> bool:
    return value is LoraConfig or type(value) is LoraConfig


def _is_peft(value: Any) -> bool:
    return isinstance(value, PeftConfig) or (isinstance(value, type) and issubclass(value, PeftConfig))


def retargeted(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """The row as it is to run, in this form.

    Raises:
        NoCounterpartError: LaMDA has nothing like it.
    """
    out: list[Any] = []
    for value in row:
        if _is_lora(value) and not isinstance(value, type):
            settings = _of_object(value)
            _layer_kinds(row, settings)
            new: Any = Retargeted(**settings)
        elif value is LoraConfig:
            new = Retargeted
        elif isinstance(value, dict):
            _layer_kinds(row, value)
            new = lamda_settings(value)
        else:
            new = value
        out.append(value if FORM == "lora" else new)
    return tuple(out)


class Rows:
    """Replaces parameter lists in place, each once, and keeps account."""

    def __init__(self) -> None:
        self.lists: dict[int, tuple[list[Any], bool]] = {}
        self.without: dict[str, str] = {}

    def rewrite(self, module: str, values: list[Any]) -> bool:
        """Whether the list is one with LoRA in it; if so it holds this form's rows afterwards."""
        if id(values) not in self.lists:
            ours = any(_is_lora(v) for value in values for v in _row(value))
            if ours:
                values[:] = [new for value in values for new in self._rewritten(module, value)]
            self.lists[id(values)] = (values, ours)  # the list too, so that its id stays its own
        return self.lists[id(values)][1]

    def _rewritten(self, module: str, value: Any) -> list[Any]:
        row = _row(value)
        if not any(_is_lora(v) for v in row):
            return [] if any(_is_peft(v) for v in row) else [value]
        try:
            new = retargeted(row)
        except NoCounterpartError as reason:
            said = [_of_object(v) if type(v) is LoraConfig else v for v in row if v is not LoraConfig]
            self.without[f"{module}: {said}"] = str(reason)
            return []
        return [new if isinstance(value, tuple) else new[0]]


def _row(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


ROWS = Rows()
OUTCOMES: dict[str, str] = {}
MESSAGES: dict[str, str] = {}
OUT_OF_SCOPE: Counter[str] = Counter()


# -- hooks ---------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """PEFT's tests import diffusers for a pipeline that only its diffusion tests use."""
    stub = types.ModuleType("diffusers")
    stub.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules.setdefault("diffusers", stub)


def pytest_collection_finish() -> None:
    """And nobody else shall take it for the real one."""
    if not hasattr(sys.modules["diffusers"], "__file__"):
        del sys.modules["diffusers"]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Rewrite the lists before pytest reads them; note whether LoRA was in one."""
    ours = False
    for mark in metafunc.definition.iter_markers("parametrize"):
        values = mark.args[1] if len(mark.args) > 1 else mark.kwargs.get("argvalues")
        if isinstance(values, list):
            ours |= ROWS.rewrite(metafunc.module.__name__.rpartition(".")[2], values)
    metafunc.function.__dict__["conformance_scope"] = ours
    if ours and FORM != "lora":
        # The suite asks in places whether the method is LoRA, and skips or checks less if it is not.
        package = metafunc.module.__name__.rpartition(".")[0]
        for name in (metafunc.module.__name__, f"{package}.testing_common"):
            sys.modules[name].LoraConfig = Retargeted  # type: ignore[attr-defined]


@pytest.hookimpl(tryfirst=True)
def pytest_make_parametrize_id(config: pytest.Config, val: Any, argname: str) -> str | None:
    """The same id in every form."""
    if val in (LoraConfig, Retargeted) or isinstance(val, LoraConfig | Retargeted):
        return "Method"
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Out of scope: tests of other methods, and those of whose rows none is left."""
    kept, left = [], []
    for item in items:
        function = getattr(item, "function", None)
        rows = any(_is_peft(v) for v in getattr(getattr(item, "callspec", None), "params", {}).values())
        inside = function is not None and function.__dict__.get("conformance_scope") and rows
        (kept if inside else left).append(item)
        if not inside:
            OUT_OF_SCOPE[_module(item.nodeid)] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Passed, failed or skipped; a failure in setup or teardown is a failure."""
    key = report.nodeid.partition("tests/")[2] or report.nodeid
    if report.when == "call" or report.outcome != "passed":
        if OUTCOMES.get(key) != "failed":
            OUTCOMES[key] = report.outcome
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            MESSAGES[key] = report.longrepr[2].removeprefix("Skipped: ")[:200]
        elif report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            MESSAGES[key] = (crash.message if crash else str(report.longrepr)).splitlines()[0][:200]


def pytest_sessionfinish() -> None:
    """What the driver reads."""
    out = os.environ.get("PEFT_CONFORMANCE_OUT")
    if out:
        result = {
            "outcomes": OUTCOMES, "messages": MESSAGES, "without": ROWS.without, "out_of_scope": OUT_OF_SCOPE,
        }  # fmt: skip
        Path(out).write_text(json.dumps(result, indent=1, sort_keys=True))


def _module(nodeid: str) -> str:
    return nodeid.partition("::")[0].rpartition("/")[2]
