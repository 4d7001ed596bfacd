"""Several tasks over one base model in memory: switch between finished runs without reading it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from leantune.errors import UserError
from leantune.lightpeft import Adapter, PruningPlan, Weights
from leantune.recipes import Recipe
from leantune.run.folder import RunFolder
from leantune.run.loading import base_for_run, open_saved, told_in_a_line
from leantune.run.models import resolve
from leantune.run.tasks import Task


@dataclass(frozen=True)
class _Ready:
    """What a task needs besides the base: all of it in memory."""

    recipe: Recipe
    task: Task
    config: PretrainedConfig
    plan: PruningPlan | None
    adapter: Adapter
    tokenizer: PreTrainedTokenizerBase


class TaskSwitcher:
    """Finished runs over one base: each task is a small plan and adapter, the base is in memory once.

        tasks = leantune.TaskSwitcher(["runs/banking", "runs/trec"])
        model = tasks.switch("runs/trec")

    Switching cuts the task's weights from the base in memory and reads no file; what a task leaves whole is
    shared, not copied. The model of the task before is not touched, but counts in memory as long as you hold
    on to it.

    Args:
        runs: Finished runs with an adapter, all on the same base model.

    Raises:
        UserError: A run is not finished, or is full fine-tuning, or on another base, or on a quantised one.
    """

    def __init__(self, runs: Sequence[str | Path]) -> None:
        if not runs:
            raise UserError("TaskSwitcher needs at least one run")
        self._ready = {str(run): _make_ready(RunFolder.existing(run)) for run in runs}
        first = next(iter(self._ready.values())).recipe.model
        for run, ready in self._ready.items():
            if ready.recipe.lean.quantize is not None:
                raise UserError(f"{run}: is on a quantised base, which cannot be shared; use leantune.load")
            if (ready.recipe.model.path, ready.recipe.model.dtype) != (first.path, first.dtype):
                raise UserError(f"{run}: is on another base ({ready.recipe.model.path}, not {first.path})")
        self._base = Weights.from_files(resolve(first.path)).in_memory(
            torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )
        self.task: str | None = None
        self.model: nn.Module | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks: the runs as they were given."""
        return tuple(self._ready)

    def switch(self, task: str | Path) -> nn.Module:
        """The task's model, in evaluation mode: the same outputs, bit for bit, as `leantune.load(task)`.

        Raises:
            UserError: There is no such task.
        """
        ready = self._find(task)
        if self.task != str(task):
            self.model = None  # the old one goes before the new one comes
            base: Any = base_for_run(ready.recipe, ready.task, ready.config, ready.plan, self._base)
            self.model = ready.adapter.attach(base.to(self._base.device), trainable=False).eval()
            self.task = str(task)
        assert self.model is not None
        return self.model

    def tokenizer(self, task: str | Path) -> PreTrainedTokenizerBase:
        """The task's tokenizer."""
        return self._find(task).tokenizer

    def _find(self, task: str | Path) -> Any:
        if str(task) not in self._ready:
            raise UserError(f"{task}: no such task; there are {', '.join(self._ready)}")
        return self._ready[str(task)]


def _make_ready(folder: RunFolder) -> _Ready:
    recipe, weights = folder.recipe(), folder.saved_weights()
    if weights != folder.adapter:
        raise UserError(f"{folder.path}: is full fine-tuning; its weights are not the base's")
    folder.check_undamaged()
    config, task, tokenizer = open_saved(recipe, weights)
    plan = PruningPlan.load(folder.plan_file) if recipe.lean.prune is not None else None
    with told_in_a_line(f"{weights}: the adapter cannot be loaded"):
        adapter = Adapter(
            PeftConfig.from_pretrained(str(weights)), load_file(weights / "adapter_model.safetensors")
        )
    return _Ready(recipe, task, config, plan, adapter, tokenizer)
