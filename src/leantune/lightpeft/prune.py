"""Carry a plan out on a model in memory."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from leantune.anatomy import find_groups
from leantune.lightpeft.estimation import detach_masks
from leantune.lightpeft.plan import PruningPlan
from leantune.lightpeft.reshape import Adapter
from leantune.lightpeft.reshape import shrink as shrink_tensors
from leantune.lightpeft.surgery import prune_base


def prune(model: nn.Module, plan: PruningPlan) -> Any:
    """Prune a model for real (Light-PEFT; Gu et al., Findings of ACL 2024, arXiv 2406.03792).

    Weights are sliced in their own dtype and device; masks, where the plan has them, are folded into what
    stays and taken off. Parameters are new ones: make the optimizer afterwards.

    Args:
        model: A transformers model, or a PEFT model with one adapter, which is cut to the plan as well.
        plan: For this model's base.

    Returns:
        The pruned model: the same object for a plain model, a new `PeftModel` otherwise (`model` is used up).

    Raises:
        UserError: The plan is for another base, or a layer cannot be sliced.
    """
    detach_masks(model)
    if not isinstance(model, PeftModel):
        prune_base(model, plan.check(model), plan.kept, plan.masks)
        return model
    adapter = shrink(model, plan)
    name = next(iter(model.peft_config))
    trainable = not model.peft_config[name].inference_mode
    return adapter.attach(prune(model.unload(), plan), trainable)  # type: ignore[operator]


def shrink(model: nn.Module, plan: PruningPlan) -> Adapter:
    """The model's adapter, cut to the plan; the model stays as it is.

    Raises:
        UserError: The plan is for another base or another adapter, or would leave no module of this one.
    """
    groups = plan.check(model, find_groups(model))
    kept = {name: module.kept for name, module in plan.modules.items()}
    return shrink_tensors(model, plan.cuts(groups), kept)
