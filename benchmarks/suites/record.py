"""Under which conditions a figure was measured, and the file that it is written to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.suites.build import DTYPES, SEED

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "liger-kernel",
    "unsloth",
    "leantune",
)
# Results that are being written are no change of what is measured.
SOURCES = (".", ":(exclude)benchmarks/results", ":(exclude)*.md")
CPU_INFO = Path("/proc/cpuinfo")


def record(device: str, command: list[str], rounds: int) -> dict[str, Any]:
    """Machine, versions, commit, command; `finish` adds how it ended."""
    return {
        "command": " ".join(["python", "benchmarks/run.py", *command]),
        "git": {
            "commit": _git("rev-parse", "HEAD"),
            "changed_files": bool(_git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)),
        },
        "device": device,
        "machine": machine(device),
        "dtype": DTYPES[device],
        "seed": SEED,
        "rounds": rounds,
        "interleaving": INTERLEAVING[device],
        "versions": dict(filter(lambda pair: pair[1] is not None, map(_version, PACKAGES))),
        "python": platform.python_version(),
        "started": _now(),
        "load_at_start": list(os.getloadavg()),
    }


INTERLEAVING = {
    "cpu": "all methods of a group are in memory; each takes one step in turn, every round in another order",
    "cuda": "one method on the device at a time; in a round each is built, warmed up, timed and let go",
}


def finish(conditions: dict[str, Any]) -> dict[str, Any]:
    """With the time and the load at the end."""
    return conditions | {"ended": _now(), "load_at_end": list(os.getloadavg())}


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads, and the GPU."""
    found: dict[str, Any] = {
        "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


class Results:
    """One suite's file: groups by name, each with its conditions and rows.

    Args:
        file: Where; what lies there is gone on with.
        suite, device, scale: What it holds.

    Raises:
        ValueError: The file holds another suite, device or scale.
    """

    def __init__(self, file: Path, suite: str, device: str, scale: str) -> None:
        self.file = file
        self.head = {"suite": suite, "device": device, "scale": scale}
        self.groups: dict[str, dict[str, Any]] = {}
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            self.groups = found.pop("groups")
            if found != self.head:
                raise ValueError(f"{file} holds {found}, not {self.head}: name another --out")

    def is_done(self, group: str, methods: list[str]) -> bool:
        """Whether a group was measured to its end with these methods."""
        found = self.groups.get(group)
        return found is not None and found["complete"] and list(found["rows"]) == methods

    def put(
        self, group: str, conditions: dict[str, Any], rows: dict[str, Any], *, complete: bool = False
    ) -> None:
        """Write a group as far as it is; a reader never sees half a file."""
        self.groups[group] = {"complete": complete, "record": finish(conditions), "rows": rows}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.head | {"groups": self.groups}, indent=1) + "\n", encoding="utf-8")
        new.replace(self.file)


def _processor() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> tuple[str, str | None]:
    if package == "leantune":
        return package, importlib.import_module("leantune").__version__
    try:
        return package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return package, None


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line() -> list[str]:
    """The arguments of this process."""
    return sys.argv[1:]
