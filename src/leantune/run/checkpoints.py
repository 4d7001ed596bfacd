"""Checkpoints that are complete or not there: written aside, listed in a manifest, renamed.

transformers writes straight into `checkpoint-N` and resumes from the highest number, complete or not. Here a
checkpoint counts only with a manifest whose sizes and hashes agree with what lies on disk.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from leantune.run import manifest
from leantune.run.folder import flush, remove_folder, take_place, write_json
from leantune.run.manifest import MANIFEST

WRITING = ".writing-"  # a checkpoint's folder begins with this until it is complete
_NAME = re.compile(r"^checkpoint-([0-9]{1,18})$")


def seal(written: Path, place: Path, step: int, versions: dict[str, str], processes: int = 1) -> None:
    """Make `written` a complete checkpoint and move it to `place`.

    Args:
        written: The folder with all files of the checkpoint.
        place: Its name from now on.
        step: Optimizer steps done.
        versions: Of the packages that wrote it.
        processes: That train together; each has written its own random numbers' state.
    """
    facts = manifest.describe(written, step=step, versions=versions, processes=processes)
    write_json(written / MANIFEST, facts)
    flush(written)
    take_place(written, place)


def sweep(folder: Path) -> None:
    """Remove what a killed process was about to write or to remove."""
    for pattern in (f"{WRITING}*", ".*.tmp", ".*.gone"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


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


def processes_of(folder: Path) -> int | None:
    """How many processes wrote the folder's newest checkpoint; None if there is none that says it."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return int(json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")).get("processes", 1))
        except (ValueError, TypeError, AttributeError, RecursionError, OSError):
            continue  # a damaged one is passed over later, and said so
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def whats_wrong(checkpoint: Path) -> str | None:
    """None if the checkpoint is whole, else what is not."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():
        return "not a folder"
    known = manifest.read(checkpoint)
    if known is None:
        return "incomplete (no manifest)"
    if isinstance(known, str):
        return known
    files, step = known["files"], known.get("step")
    if f"checkpoint-{step}" != checkpoint.name:
        return f"its manifest is of step {step!r}"
    there = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if not file.is_dir()}
    for name in sorted(there - {MANIFEST} - files.keys()):
        return f"{name} is not in its manifest"  # nothing is read that was not checked
    return manifest.first_damaged(checkpoint, files)


def keep_newest(folder: Path, count: int, newest: int) -> None:
    """Remove old checkpoints, and those that were passed over when the run was resumed.

    Args:
        folder: Of checkpoints.
        count: How many stay.
        newest: Step of the one that was just written, and is therefore whole. Whatever has a higher number
            was not, or the run would have been resumed from it.
    """
    steps = {int(path.name.removeprefix("checkpoint-")): path for path in list_checkpoints(folder)}
    older = [step for step in steps if step < newest and (steps[step] / MANIFEST).is_file()]
    kept = {newest, *(older[-(count - 1) :] if count > 1 else ())}
    for step, path in steps.items():
        if step not in kept:
            remove_folder(path)
