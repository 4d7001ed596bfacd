"""What a folder's files were when it was complete: each one's size and SHA-256, in `manifest.json`.

A flipped bit in a file of weights changes numbers and nothing else; only a hash shows it. A checkpoint
without a manifest counts for nothing (checkpoints.py); a finished run's folder may lack one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from leantune.errors import UserError

MANIFEST = "manifest.json"
_LARGEST = 1 << 24  # bytes
_DAMAGED = "its manifest is damaged"


def describe(folder: Path, **facts: Any) -> dict[str, Any]:
    """The manifest of a folder as it is now, with further facts before the list of files."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    return {**facts, "files": files}


def read(folder: Path) -> dict[str, Any] | str | None:
    """A folder's manifest; what is wrong with it, as text; or None where there is none."""
    manifest = folder / MANIFEST
    try:
        if manifest.stat().st_size > _LARGEST:
            return _DAMAGED
        content = json.loads(manifest.read_text(encoding="utf-8"))
        return content if isinstance(content["files"], dict) else _DAMAGED
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        return _DAMAGED


def first_damaged(folder: Path, files: dict[str, Any]) -> str | None:
    """What is wrong with the first of a manifest's files that is not as it was; None if all are."""
    for name, facts in files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            return f"its manifest names a file outside ({name})"
        if not file.is_file():
            return f"{name} is missing"
        known = facts if isinstance(facts, dict) else {}
        if file.stat().st_size != known.get("bytes") or sha256(file) != known.get("sha256"):
            return f"{name} is damaged"
    return None


def check(folder: Path) -> None:
    """See that a folder's files are those that its manifest lists; one without a manifest passes.

    Raises:
        UserError: One is missing or another than it was.
    """
    manifest = read(folder)
    wrong = first_damaged(folder, manifest["files"]) if isinstance(manifest, dict) else manifest
    if wrong is not None:
        raise UserError(f"{folder}: {wrong}; if it was changed on purpose, remove {MANIFEST} there")


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
