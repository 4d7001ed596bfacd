"""Peak memory of a stretch of code: what the CUDA allocator gave out, or what the process held."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch

PeakKind = Literal["cuda_allocated", "cpu_rss"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): set the high-water mark of the resident set to what is resident now


class PeakMemory:
    """Measure the peak memory of a `with` block.

    On a CUDA device that is `torch.cuda.max_memory_allocated` (kind "cuda_allocated"). Everywhere else it is
    the high-water mark of the process's resident set (kind "cpu_rss"): weights, data and the interpreter are
    in it, and Apple's GPU, whose memory is the process's, counts too.

    Blocks may be nested (training inside a run, evaluation inside training): each knows its own peak,
    although the counters underneath can only be set back for everybody.

        with PeakMemory("cuda") as peak:
            trainer.train()
        peak.bytes, peak.kind

    Attributes:
        kind: What `bytes` counts.
        since_start_of_process: The system did not let the mark be set back: `bytes` covers the life of the
            process, not the block alone.
    """

    kind: PeakKind
    since_start_of_process: bool

    _open: list[PeakMemory] = []  # from the outermost to the innermost block that is being measured

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.kind = "cuda_allocated" if self.device.type == "cuda" else "cpu_rss"
        self.since_start_of_process = False
        self._seen: int | None = None
        self._seen_reserved: int | None = None

    def __enter__(self) -> Self:
        for block in self._open:
            block._look()
        self._seen = self._seen_reserved = None
        if self.kind == "cuda_allocated":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.since_start_of_process = not reset_peak_rss()
        self._open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        self._open.remove(self)

    @property
    def bytes(self) -> int | None:
        """The peak so far inside the block, of the whole block after it; None where no system counter is."""
        if self in self._open:
            self._look()
        return self._seen

    @property
    def reserved_bytes(self) -> int | None:
        """Peak of what CUDA's caching allocator took from the device; None on other devices."""
        if self in self._open:
            self._look()
        return self._seen_reserved

    def _look(self) -> None:
        """Take note of the counters before somebody sets them back."""
        if self.kind == "cuda_allocated":
            self._seen = max(self._seen or 0, torch.cuda.max_memory_allocated(self.device))
            self._seen_reserved = max(self._seen_reserved or 0, torch.cuda.max_memory_reserved(self.device))
        elif (now := peak_rss()) is not None:
            self._seen = max(self._seen or 0, now)


def reset_peak_rss() -> bool:
    """Set the process's high-water mark back to what is resident now; False where the system forbids it."""
    before = _status_bytes("VmHWM")
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    # some sandboxes take the write and do nothing
    after, resident = _status_bytes("VmHWM"), _status_bytes("VmRSS")
    if before is None or after is None or resident is None:
        return False
    return after < before or after <= resident * 1.05


def peak_rss() -> int | None:
    """High-water mark of the process's resident set in bytes; None on systems that keep none (Windows)."""
    # VmHWM first: ru_maxrss is inherited through exec, so a small process could show its parent's peak
    mark = _status_bytes("VmHWM")
    if mark is not None:
        return mark
    try:
        import resource
    except ImportError:
        return None
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024  # macOS counts bytes, others KiB


def resident_bytes() -> int | None:
    """What the process has in memory now, in bytes; None on systems that do not say."""
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int | None:
    """A line of /proc/self/status ("VmHWM:  2012 kB") in bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return None
