"""leantune: fine-tune transformers with less memory, time and parameters.

Importing this package makes LaMDA and the bottleneck Adapter known to PEFT and costs milliseconds: every
public name below is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from leantune._imports import after_import
from leantune._version import __version__

if TYPE_CHECKING:
    from leantune.bottleneck import BottleneckConfig, BottleneckModel
    from leantune.comparison import compare
    from leantune.errors import UserError
    from leantune.lamda import (
        LamdaConfig,
        LamdaFreezing,
        LamdaModel,
        SpectralRanks,
        freeze_columns,
        frozen_columns,
        lamda_to_lora,
        prepare_lamda,
        save_as_lora,
        spectral_rank_pattern,
    )
    from leantune.lightpeft import (
        LightPeftConfig,
        LightPeftEstimation,
        PruningPlan,
        attach_masks,
        detach_masks,
        learned_plan,
        prune,
    )
    from leantune.measure import saved_activation_bytes
    from leantune.planner import plan
    from leantune.recipes import Recipe
    from leantune.run import TaskSwitcher, evaluate, export, load, predict, train
    from leantune.tokentune import (
        ChoosingCollator,
        TokenTuneConfig,
        TokenTuneState,
        chosen_tokens,
        token_tune,
    )

_HOME = {
    "UserError": "leantune.errors",
    "BottleneckConfig": "leantune.bottleneck",
    "BottleneckModel": "leantune.bottleneck",
    "LamdaConfig": "leantune.lamda",
    "LamdaModel": "leantune.lamda",
    "LamdaFreezing": "leantune.lamda",
    "SpectralRanks": "leantune.lamda",
    "freeze_columns": "leantune.lamda",
    "frozen_columns": "leantune.lamda",
    "lamda_to_lora": "leantune.lamda",
    "prepare_lamda": "leantune.lamda",
    "save_as_lora": "leantune.lamda",
    "spectral_rank_pattern": "leantune.lamda",
    "ChoosingCollator": "leantune.tokentune",
    "TokenTuneConfig": "leantune.tokentune",
    "TokenTuneState": "leantune.tokentune",
    "token_tune": "leantune.tokentune",
    "chosen_tokens": "leantune.tokentune",
    "LightPeftConfig": "leantune.lightpeft",
    "LightPeftEstimation": "leantune.lightpeft",
    "PruningPlan": "leantune.lightpeft",
    "attach_masks": "leantune.lightpeft",
    "detach_masks": "leantune.lightpeft",
    "learned_plan": "leantune.lightpeft",
    "prune": "leantune.lightpeft",
    "saved_activation_bytes": "leantune.measure",
    "plan": "leantune.planner",
    "Recipe": "leantune.recipes",
    "compare": "leantune.comparison",
    "train": "leantune.run",
    "evaluate": "leantune.run",
    "predict": "leantune.run",
    "export": "leantune.run",
    "load": "leantune.run",
    "TaskSwitcher": "leantune.run",
}

__all__ = [
    "BottleneckConfig",
    "BottleneckModel",
    "ChoosingCollator",
    "LamdaConfig",
    "LamdaFreezing",
    "LamdaModel",
    "LightPeftConfig",
    "LightPeftEstimation",
    "PruningPlan",
    "Recipe",
    "SpectralRanks",
    "TaskSwitcher",
    "TokenTuneConfig",
    "TokenTuneState",
    "UserError",
    "__version__",
    "attach_masks",
    "chosen_tokens",
    "compare",
    "detach_masks",
    "evaluate",
    "export",
    "freeze_columns",
    "frozen_columns",
    "lamda_to_lora",
    "learned_plan",
    "load",
    "plan",
    "predict",
    "prepare_lamda",
    "prune",
    "save_as_lora",
    "saved_activation_bytes",
    "spectral_rank_pattern",
    "token_tune",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'leantune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register_peft_methods() -> None:
    for method in ("lamda", "bottleneck"):
        importlib.import_module(f"leantune.{method}")


after_import("peft", _register_peft_methods)
