"""What `metrics.json` says of a run (DESIGN.md, "Run folder": its keys are stable)."""

from __future__ import annotations

import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from leantune._version import __version__
from leantune.peft_methods.quantised import logical_numel
from leantune.recipes import Recipe
from leantune.run.callbacks import read_log
from leantune.run.estimation import STAGE
from leantune.run.folder import RunFolder
from leantune.run.models import head_modules
from leantune.run.quantization import KINDS, quantised_weights

WARM_UP_STEPS = 5
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


def count_parameters(model: nn.Module, classifies: bool) -> dict[str, int]:
    """Parameters by kind.

    Args:
        model: In training.
        classifies: It is a sequence classifier (or regressor): what lies beside its base model is its head.

    Returns:
        `total` (of the base and its head; adapters left out), `trainable`, and `head`: the trainable part
        that is a task head, trained by every method alike; `quantized`, how many of the total are held
        quantised. Counted are weights, not the numbers they are packed into.
    """
    adapted = hasattr(model, "peft_config")
    heads = set(head_modules(model)) if classifies and not adapted else set()
    total = trainable = head = 0
    for name, parameter in model.named_parameters():
        in_head = "modules_to_save" in name or name.split(".")[0] in heads
        adapter = adapted and parameter.requires_grad and not in_head
        if not adapter and "original_module" not in name:
            total += logical_numel(parameter)
        if parameter.requires_grad:
            trainable += parameter.numel()
            head += parameter.numel() if in_head else 0
    quantized = quantised_weights(model)
    return {"total": total, "trainable": trainable, "head": head, "quantized": quantized}


def collect_metrics(
    recipe: Recipe,
    folder: RunFolder,
    evaluation: dict[str, dict[str, float]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Everything measured, under DESIGN's keys.

    Args:
        recipe: The run's.
        folder: The run's, with its weights and log.
        evaluation: Split → metric → value.
        facts: What training measured: parameter counts, saved bytes, peak, tokens, steps, what was removed,
            how many processes (bytes are of the first).
    """
    seconds = _step_seconds(folder)
    spent, estimated = sum(seconds), sum(_step_seconds(folder, STAGE))
    counts, peak = facts["parameters"], facts["peak"]
    return {
        "model": recipe.model.path,
        "method": recipe.method,
        "seed": recipe.train.seed,
        "versions": versions(recipe.lean.quantize),
        "hardware": hardware(),
        "processes": facts.get("processes", 1),
        "parameters": {
            "total": counts["total"],
            "trainable_start": counts["trainable"],
            "trainable_end": facts["trainable_end"],
            "head": counts["head"],
            "quantized": counts["quantized"],
            "base_removed_fraction": 0.0,
            **facts.get("removed", {}),
        },
        "memory": {
            "saved_activation_bytes": facts["saved_activation_bytes"],
            "weight_bytes": facts["weight_bytes"],
            "peak_bytes": peak.bytes,
            "peak_kind": peak.kind,
            "forecast_peak_bytes": facts.get("forecast"),
            "process_bytes_before_model": facts.get("before"),
        },
        "speed": {
            "step_seconds_median": statistics.median(seconds[WARM_UP_STEPS:] or seconds) if seconds else None,
            "tokens_per_second": round(facts["tokens_seen"] / spent, 1) if spent else None,
            "train_seconds": round(spent, 3),
            "estimate_seconds": round(estimated, 3),
        },
        "evaluation": evaluation,
        "adapter_bytes": sum(file.stat().st_size for file in folder.saved_weights().glob("*.safetensors")),
        "steps": facts["steps"],
        "skipped_steps": sum(
            line.get("skipped", False) for stage in (STAGE, None) for line in read_log(folder.log_file, stage)
        ),
    }


def _step_seconds(folder: RunFolder, stage: str | None = None) -> list[float]:
    return [line["step_seconds"] for line in read_log(folder.log_file, stage) if "step_seconds" in line]


def versions(quantize: str | None = None) -> dict[str, str]:
    """Versions of what decides the result, the library of a quantised base included."""
    found = {"leantune": __version__, "python": platform.python_version()}
    for package in (*PACKAGES, *([KINDS[quantize].package] if quantize else [])):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine in a few words: nothing that names a person or a host."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
