"""How fast and how large a device is: for the time of a step, as far as arithmetic decides it.

    seconds = floating-point operations / (peak rate x utilisation)

Peak rates of GPUs are the makers' for dense matrices (16-bit inputs, float32 sums; float32 without tensor
cores), memory what `nvidia-smi` shows. `UTILISATION` is an assumption, not a measurement: plain transformers
training reaches 30 to 60 % of such a peak on models of a billion weights and more, less on small ones, whose
steps are bound by launching kernels. The machine at hand is measured instead: a product of large matrices,
so that its rate already is one that is reached.
"""

from __future__ import annotations

import difflib
import time
from dataclasses import dataclass

import torch

from leantune.errors import UserError
from leantune.planner.setting import Device as Kind

UTILISATION = 0.4
_TERA = 1e12
_MIB = 1 << 20
# Name → TFLOP/s at 16 bits, in float32, memory in MiB.
GPUS: dict[str, tuple[float, float, int]] = {
    "t4": (65, 8.1, 15360),
    "v100-32gb": (125, 15.7, 32510),
    "rtx-3090": (71, 35.6, 24576),
    "rtx-4090": (165, 82.6, 24564),
    "a10g": (70, 31.2, 23028),
    "l4": (121, 30.3, 23034),
    "l40s": (362, 91.6, 46068),
    "a100-40gb": (312, 19.5, 40536),
    "a100-80gb": (312, 19.5, 81920),
    "h100-80gb": (989, 67, 81559),
    "h200": (989, 67, 143771),
}
HERE = ("cpu", "cuda")


@dataclass(frozen=True)
class Device:
    """Where a run is planned for.

    Attributes:
        name: A GPU of the table, or `cpu`, `cuda`: the machine at hand.
        kind: Whose kernels.
        memory: Bytes; None: not known.
        half: Operations a second in 16-bit numbers that training reaches; None: not known.
        single: In float32.
        measured: Whether the rates were measured here.
    """

    name: str
    kind: Kind
    memory: int | None = None
    half: float | None = None
    single: float | None = None
    measured: bool = False

    def seconds(self, operations: float, dtype: torch.dtype) -> float | None:
        """Time of so many operations; None where the rate is not known."""
        rate = self.single if dtype == torch.float32 else self.half
        return None if rate is None else operations / rate

    @property
    def basis(self) -> str:
        """Where its times come from, for a person."""
        if self.measured:
            return f"{self.name}: at the rate of a matrix product measured here"
        return f"{self.name}: at {UTILISATION:.0%} of the maker's peak, an assumption".replace("%", " %")


def find_device(name: str | None, measure: bool = True) -> Device:
    """A device by name; None: this machine, its GPU if it has one.

    Args:
        name: Of the table, `cpu` or `cuda`.
        measure: Whether to measure this machine (a fraction of a second).

    Raises:
        UserError: There is no such device.
    """
    if name in GPUS:
        half, single, mebibytes = GPUS[name]
        rates = (half * _TERA * UTILISATION, single * _TERA * UTILISATION)
        return Device(name, "cuda", mebibytes * _MIB, *rates)
    if name is not None and name not in HERE:
        accepted = [*HERE, *GPUS]
        near = difflib.get_close_matches(name, accepted, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--device = {name!r}: accepted are {', '.join(accepted)}{guess}")
    available = torch.cuda.is_available()
    kind: Kind = "cuda" if name == "cuda" or (name is None and available) else "cpu"
    if kind == "cuda" and not available:
        return Device(kind, kind)
    memory = torch.cuda.get_device_properties(0).total_memory if kind == "cuda" else None
    if not measure:
        return Device(kind, kind, memory)
    rates = (matmul_rate(kind, torch.bfloat16), matmul_rate(kind, torch.float32))
    return Device(kind, kind, memory, *rates, measured=True)


def matmul_rate(kind: Kind, dtype: torch.dtype, size: int = 768, repeats: int = 3) -> float:
    """Operations a second of a product of square matrices: the best of a few."""
    a, b = (torch.ones(size, size, dtype=dtype, device=kind) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):  # the first warms up
        if kind == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
