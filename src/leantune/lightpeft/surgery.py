"""Cutting units out of a model: which layers lose what, and the cut itself, in place.

module_cuts       plan and masks → what happens to each linear layer
prune_base        a whole model, in place
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from leantune.anatomy import Attribute, Group, find_head
from leantune.errors import UserError
from leantune.lightpeft.slices import ModuleCut, ParameterCut, parameter_cuts, slice_parameter

__all__ = [
    "ModuleCut",
    "ParameterCut",
    "is_pruned",
    "module_cuts",
    "parameter_cuts",
    "prune_base",
    "slice_parameter",
]

_MARK = "_leantune_pruned"


def module_cuts(
    groups: Sequence[Group],
    kept: Mapping[str, Sequence[int]],
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, ModuleCut]:
    """What happens to each linear layer, by its name inside `find_head(model)`.

    Args:
        groups: As `find_groups` gave them.
        kept: Group name → numbers of the units that stay; groups left out stay whole.
        masks: Group name → mask values (count,) to fold into the output projections; None to fold nothing.

    Raises:
        UserError: A group that does not exist or is left empty, a unit that does not exist, a mask that
            does not fit.
    """
    known = {group.name: group for group in groups}
    for key in (*kept, *(masks or {})):
        if key not in known:
            first = next(iter(known), None)
            raise UserError(f"no group of heads or neurons is called {key!r}; there is, say, {first!r}")
    cuts: dict[str, dict[str, Any]] = {}
    for group in groups:
        units = _units(group, kept.get(group.name))
        mask = None if masks is None else masks.get(group.name)
        for cut in group.cuts:
            sizes = {"in_features": cut.in_features, "out_features": cut.out_features}
            if units is not None:
                cuts.setdefault(cut.module, sizes)[f"keep_{cut.axis}"] = cut.features(units)
            if mask is not None and cut in group.outputs:
                factors = _factors(group, mask, units).repeat_interleave(cut.blocks[0][1])
                cuts.setdefault(cut.module, sizes)["scale_in"] = factors
    return {name: ModuleCut(**values) for name, values in cuts.items()}


def _units(group: Group, kept: Sequence[int] | None) -> Tensor | None:
    """The kept units (int64), or None if all stay."""
    if kept is None:
        return None
    units = [int(unit) for unit in kept]
    if not units:
        raise UserError(f"{group.name}: no unit is kept; at least one of {group.count} must stay")
    if units != sorted(set(units)) or units[0] < 0 or units[-1] >= group.count:
        raise UserError(
            f"{group.name}: kept units must be ascending numbers in 0…{group.count - 1}, each once"
        )
    return None if len(units) == group.count else torch.tensor(units)


def _factors(group: Group, mask: Tensor, units: Tensor | None) -> Tensor:
    """Mask values (count,) → those of the kept units, float32."""
    if mask.shape != (group.count,):
        raise UserError(f"{group.name}: its mask has shape {tuple(mask.shape)}, not ({group.count},)")
    mask = mask.detach().to("cpu", torch.float32)
    return mask if units is None else mask[units]


# -- a whole model -------------------------------------------------------------------------------------------


def prune_base(
    model: nn.Module,
    groups: Sequence[Group],
    kept: Mapping[str, Sequence[int]],
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """Cut a plain model in place: weights, biases, sizes, head counts. Arguments as of `module_cuts`.

    On meta only shapes change. Parameters are new objects: make the optimizer afterwards.

    Raises:
        UserError: The model has adapters, is quantised or was pruned before, or the plan does not fit it. The
            model is then as it was.
    """
    head = find_head(model)
    if is_pruned(head):
        raise UserError("the model was pruned before; a plan is for the whole base")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise UserError(f"{name} carries an adapter: prune the base first, then attach the adapter")
    cuts = module_cuts(groups, kept, masks)
    parameters = parameter_cuts(head, cuts)
    for name, cut in parameters.items():
        owner, _, key = name.rpartition(".")
        module = head.get_submodule(owner)
        old = module.get_parameter(key)
        setattr(module, key, nn.Parameter(slice_parameter(old, cut), requires_grad=old.requires_grad))
    for name, cut_module in cuts.items():
        _set_sizes(head.get_submodule(name), cut_module)
    for group in groups:
        units = len(kept.get(group.name, range(group.count)))
        for attribute in group.attributes:
            _set(head, attribute, attribute.base + attribute.per_unit * units)
    setattr(head, _MARK, True)


def is_pruned(model: nn.Module) -> bool:
    """Whether `prune_base` cut this model."""
    return bool(find_head(model).__dict__.get(_MARK, False))


def _set_sizes(module: Any, cut: ModuleCut) -> None:
    inputs, outputs = ("in_features", "nx"), ("out_features", "nf", "embedding_dim")
    for keep, names in ((cut.keep_in, inputs), (cut.keep_out, outputs)):
        for name in names:
            if keep is not None and name in vars(module):
                setattr(module, name, len(keep))


def _set(head: nn.Module, attribute: Attribute, value: int) -> None:
    module: Any = head.get_submodule(attribute.module)
    if attribute.name.startswith("config."):
        config = module.config if isinstance(module.config, ConfigOfOne) else ConfigOfOne(module.config)
        config.own[attribute.name.removeprefix("config.")] = value
        module.config = config
    else:
        setattr(module, attribute.name, value)


class ConfigOfOne:
    """A model's config as one module sees it, with some values of its own (Phi-3 counts heads by it)."""

    def __init__(self, config: Any):
        self.shared = config
        self.own: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name in ("shared", "own") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # while unpickling
        return self.own[name] if name in self.own else getattr(self.shared, name)
