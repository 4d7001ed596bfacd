"""Checkpoints that are complete or not there: written aside, listed in a manifest, renamed.

transformers writes straight into `checkpoint-N` and resumes from the highest number, complete or not. Here a
checkpoint counts only with a manifest whose sizes and hashes agree with what lies on disk.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from leantune._version import __version__
from leantune.run.folder import flush, write_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def seal(written: Path, place: Path, step: int) -> None:
    """Make `written` a complete checkpoint and move it to `place`."""
    files = {
        str(file.relative_to(written)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(written.rglob("*"))
        if file.is_file()
    }
    write_json(written / MANIFEST, {"step": step, "leantune": __version__, "files": files})
    flush(written)
    if place.exists():
        shutil.rmtree(place)
    written.replace(place)


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and why newer ones were passed over.

    Returns:
        (its folder or None, one line for each checkpoint that was skipped).
    """
    skipped: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        reason = whats_wrong(checkpoint)
        if reason is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name} skipped: {reason}")
    return None, skipped


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def whats_wrong(checkpoint: Path) -> str | None:
    """None if the checkpoint is whole, else what is not."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except FileNotFoundError:
        return "incomplete (no manifest)"
    except (ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    for name, facts in files.items():
        file = checkpoint / name
        if not file.resolve().is_relative_to(checkpoint.resolve()):
            return f"its manifest names a file outside ({name})"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts.get("bytes") or sha256(file) != facts.get("sha256"):
            return f"{name} is damaged"
    return None


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints."""
    for checkpoint in list_checkpoints(folder)[: -max(count, 1)]:
        shutil.rmtree(checkpoint)


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
