"""Peak memory of a training step, an evaluation batch and saving, each apart.

On CUDA: the allocator's peaks, allocated and reserved, with nothing but the case on the device. On a CPU:
the allocator's reports under torch's profiler over what is held (weights, optimizer state, batch), the same
to the byte in every run and whatever else the process holds; nothing is reserved there.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.suites.build import Built
from leantune.measure import saved_activation_bytes
from leantune.planner.measured import allocator_peak, held_tensors

# Writing a whole 7B model takes longer than everything else: such a case's saving is not measured.
LARGEST_SAVED = 2**31


def measure_memory(built: Built, device: str) -> dict[str, Any]:
    """All memory of a case, in bytes, after a first step has made the optimizer's state.

    Returns:
        Under `training`: `peak_allocated`, `peak_reserved` (None on a CPU), `saved_activation_bytes`; under
        `evaluation` and `saving` the peaks, of what is saved `bytes` and `seconds` (or `skipped`); besides
        `weight_bytes`, `trained_parameters`, `parameters`.
    """
    model = built.model
    built.train()  # the optimizer's state, kernels chosen
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "training": peak(built, device, built.train),
        "evaluation": peak(built, device, built.evaluate),
    }
    found["training"]["saved_activation_bytes"] = saved_activation_bytes(model, built.batch)
    found["saving"] = saving(built, device)
    return found


def peak(built: Built, device: str, action: Callable[[], None]) -> dict[str, int | None]:
    """Bytes at the peak of an action, with what is held before it."""
    gc.collect()
    if device == "cpu":
        held = [*held_tensors(built.model, built.optimizer), *built.batch.values()]
        return {"peak_allocated": allocator_peak(action, held), "peak_reserved": None}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return {
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }


def saving(built: Built, device: str) -> dict[str, Any]:
    """Write what a checkpoint of the model holds: the adapter, or all weights."""
    model: Any = built.model
    adapted = hasattr(model, "peft_config")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if not adapted and size > LARGEST_SAVED:
        return {"skipped": f"{size / 2**30:.0f} GiB of weights"}
    with tempfile.TemporaryDirectory() as folder:
        options = {"save_embedding_layers": False} if adapted else {}
        found: dict[str, Any] = peak(built, device, lambda: model.save_pretrained(folder, **options))
        began = time.perf_counter()
        model.save_pretrained(folder, **options)
        seconds = round(time.perf_counter() - began, 3)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        return found | {"bytes": size, "seconds": seconds}
