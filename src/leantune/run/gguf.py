"""Base models from GGUF files: dequantised once, then a plain folder in the cache like any other model.

The weights come out in bfloat16 where the file holds quantised blocks, else in the file's own float type.
What was lost in quantising stays lost: this is the quantised model, in a form that can be trained and saved.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from leantune.errors import UserError
from leantune.run.folder import whole_folder, write_json

INSTALL = "pip install 'leantune[gguf]'"
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BLOCK = 1 << 20


def cache() -> Path:
    """Where plain folders are kept: `models` in $LEANTUNE_CACHE, or in `~/.cache/leantune`."""
    root = os.environ.get("LEANTUNE_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "leantune") / "models"


def open_file(path: str) -> str:
    """A `.gguf` file → the plain folder that holds the same model, made the first time (a minute or so).

    Raises:
        UserError: No such file, not a GGUF file, one that transformers cannot read, no package `gguf`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"model.path = {path!r}: no such file")
    status = file.stat()
    digest = _sha256(file.resolve(), status.st_size, status.st_mtime_ns)
    return str(_plain_folder(path, file.stem, digest, lambda place: file))


def open_parts(path: str, sums: Path, parts: Sequence[Path | None], install: str) -> str:
    """As `open_file`, for a file that packages carry in parts.

    Args:
        path: What the recipe says, for messages.
        sums: The checksum file: one line, `SHA256  NAME.gguf`.
        parts: The parts in order; None where one is not installed.
        install: What to install where something is missing.

    Raises:
        UserError: As `open_file`; parts that are missing or do not add up to the published checksum.
    """
    if not sums.is_file():
        raise UserError(f"model.path = {path!r}: {sums.name} is missing; install it anew: {install}")
    digest, name = sums.read_text(encoding="utf-8").split()

    def joined(place: Path) -> Path:
        whole = place / name
        found = _join(path, parts, whole, install)
        if found != digest:
            raise UserError(
                f"model.path = {path!r}: its parts do not add up to the published file "
                f"(SHA-256 {found[:12]}…, not {digest[:12]}…); install it anew: {install}"
            )
        return whole

    return str(_plain_folder(path, Path(name).stem, digest, joined))


def _join(path: str, parts: Sequence[Path | None], whole: Path, install: str) -> str:
    """Write the parts as one file. Returns its SHA-256."""
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for number, part in enumerate(parts, start=1):
            if part is None:
                raise UserError(
                    f"model.path = {path!r}: part {number} of {len(parts)} is missing; "
                    f"install it anew: {install}"
                )
            with part.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    out.write(block)
    return digest.hexdigest()


@functools.lru_cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """The file's SHA-256; size and time of change are there to notice another file under the same name."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _plain_folder(path: str, name: str, digest: str, source: Callable[[Path], Path]) -> Path:
    """The cached folder of a GGUF file with this name and SHA-256.

    `source` is called where the file itself is needed, with a folder that it may use. Two processes that want
    the same model wait for each other.
    """
    folder = cache() / f"{name}-{digest[:12]}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model.path = {path!r}: GGUF files need one more package; {INSTALL}")
    from filelock import FileLock  # comes with the extra

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not (folder / "config.json").is_file():
                _make(path, folder, digest, source)
    except OSError as error:
        raise UserError(
            f"model.path = {path!r}: {folder} cannot be written ({error.strerror or error}); "
            "the variable LEANTUNE_CACHE names another place"
        ) from None
    return folder


def _make(path: str, folder: Path, digest: str, source: Callable[[Path], Path]) -> None:
    with whole_folder(folder) as place:
        file = source(place)
        model, tokenizer = _read(path, file, _float_type(path, file))
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        if file.parent == place:
            file.unlink()
        write_json(
            place / "source.json",
            {"file": file.name, "sha256": digest, "transformers": transformers.__version__},
        )


def _float_type(path: str, file: Path) -> torch.dtype:
    """The type to keep the weights in. Reads the file's table of tensors: damage is noticed here."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"model.path = {path!r}: not a GGUF file")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        split = reader.get_field("split.count")
        count = 1 if split is None else int(split.contents())
        kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError):  # a reader past the end of its file
        raise UserError(f"model.path = {path!r}: the GGUF file is damaged or cut off") from None
    if count > 1:
        raise UserError(f"model.path = {path!r}: one of {count} files of a split model; join them first")
    if kinds - FLOATS.keys():
        return torch.bfloat16
    return next((FLOATS[kind] for kind in FLOATS if kind in kinds), torch.float32)


def _read(path: str, file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model with its weights as plain tensors, and its tokenizer.

    Raises:
        UserError: Transformers does not know the architecture, or weights are missing.
    """
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        if hasattr(transformers, "GgufConfig"):  # earlier releases always dequantise
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with redirect_stderr(io.StringIO()):  # a bar that no setting of transformers' switches off
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=dtype, output_loading_info=True, **options
            )
    except Exception as error:  # whatever a reader of a foreign format stumbles over
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"model.path = {path!r}: transformers cannot read this GGUF file: {reason}") from None
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"model.path = {path!r}: {len(missing)} weights are not in the GGUF file: {missing[0]}, …"
        )
    return model, tokenizer
