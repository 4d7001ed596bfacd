"""`leantune doctor`: is everything here that a run needs, and what would help."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftType

from leantune.run.facts import PACKAGES, versions
from leantune.run.models import BUNDLED

OPTIONAL = {
    "bitsandbytes": "quantised bases: pip install 'leantune[quant]'",
    "torchao": "quantised bases: pip install 'leantune[quant]'",
    "trl": "chat trainers: pip install 'leantune[chat]'",
    "gguf": "GGUF files: pip install 'leantune[gguf]'",
}


@dataclass(frozen=True)
class Check:
    """One thing looked at: `ok` is None where it is a matter of taste."""

    name: str
    ok: bool | None
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Look at versions, devices, weights that are at hand, memory and disk."""
    checks = [Check(name, True, found) for name, found in versions().items()]
    checks += [
        Check(name, False, "missing", f"pip install {name}") for name in PACKAGES if name not in versions()
    ]
    checks.append(_device())
    registered = {"LAMDA", "BOTTLENECK"} <= PeftType.__members__.keys()
    checks.append(Check("own PEFT methods", registered, "registered" if registered else "not registered"))
    for name, (package, _, install) in BUNDLED.items():
        there = importlib.util.find_spec(package) is not None
        checks.append(_optional(f"bundled:{name}", there, f"pip install '{install}'"))
    for package, advice in OPTIONAL.items():
        checks.append(_optional(package, importlib.util.find_spec(package) is not None, advice))
    checks += [_memory(), _disk()]
    return checks


def _optional(name: str, there: bool, advice: str) -> Check:
    return Check(
        name, True if there else None, "there" if there else "not installed", "" if there else advice
    )


def _device() -> Check:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Check("device", True, ", ".join(names))
    return Check("device", None, f"CPU, {torch.get_num_threads()} threads", "no GPU that torch can use")


def _memory() -> Check:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return Check("memory", None, "unknown")
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Check("memory", None, f"{size / 2**30:.1f} GiB")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    return Check(
        "disk free here", free > 2**30, f"{free / 2**30:.1f} GiB", "" if free > 2**30 else "free some"
    )
