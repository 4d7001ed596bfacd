"""From importance to a plan."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from leantune.anatomy import Group, find_groups
from leantune.errors import UserError
from leantune.lightpeft.config import LightPeftConfig, ratio
from leantune.lightpeft.estimation import estimation_of
from leantune.lightpeft.fingerprint import fingerprint
from leantune.lightpeft.plan import Module, PruningPlan, Units
from leantune.lightpeft.reshape import ranks_of
from leantune.lightpeft.select import keep_modules, keep_ranks, keep_units


def make_plan(
    model: nn.Module,
    config: LightPeftConfig,
    scores: dict[str, Tensor],
    groups: tuple[Group, ...] | None = None,
    module_importance: dict[str, float] | None = None,
    rank_importance: dict[str, Tensor] | None = None,
    ranks: dict[str, int] | None = None,
) -> PruningPlan:
    """Choose what goes.

    Args:
        model: The model whose base is to be pruned, wrapped or not.
        config: How much.
        scores: Block → masks (count,); their absolute value ranks the units. Blocks without stay whole.
        groups: From `find_groups(model)`.
        module_importance: Module of the adapter → IM.
        rank_importance: Module → Taylor importance of its ranks (r,).
        ranks: Module → its rank, for the modules of the adapter.

    Raises:
        UserError: That much cannot be removed.
    """
    groups = groups or find_groups(model)
    kept = _units(config, scores, groups)
    units = {
        g.name: Units(kind=g.kind, layer=g.layer, count=g.count, kept=kept.get(g.name, tuple(range(g.count))))
        for g in groups
    }
    masks = (
        {name: score.detach().float().cpu().clone() for name, score in scores.items()} if config.fold else {}
    )
    modules = _modules(config, ranks or {}, module_importance or {}, rank_importance or {})
    return PruningPlan(units, fingerprint(model, groups), modules, masks, config)


def check_amounts(config: LightPeftConfig, groups: tuple[Group, ...]) -> None:
    """See before any training that so many heads and neurons can go.

    Raises:
        UserError: They cannot.
    """
    _units(config, {group.name: torch.ones(group.count) for group in groups}, groups)


def _units(
    config: LightPeftConfig, scores: dict[str, Tensor], groups: tuple[Group, ...]
) -> dict[str, tuple[int, ...]]:
    """Block → kept units."""
    kept: dict[str, tuple[int, ...]] = {}
    for kind, how_much in (("heads", config.heads), ("neurons", config.neurons)):
        of_kind = {g.name: scores[g.name].abs() for g in groups if g.kind == kind and g.name in scores}
        scope = config.heads_scope if kind == "heads" else config.neurons_scope
        multiple, least = (config.width_multiple, config.least_neurons) if kind == "neurons" else (1, 0.0)
        kept |= keep_units(of_kind, ratio(how_much, kind), scope, multiple, least)
    return kept


def learned_plan(model: nn.Module) -> PruningPlan:
    """The plan that a model's estimation leads to: `attach_masks`, some training with `LightPeftEstimation`,
    then this.

    Raises:
        UserError: No masks are attached, or that much cannot be removed.
    """
    estimation = estimation_of(model)
    if estimation is None:
        raise UserError("nothing was estimated: attach_masks, train with LightPeftEstimation, then plan")
    config = estimation.config
    return make_plan(
        model,
        config,
        {name: mask.detach() for name, mask in estimation.masks.items()},
        module_importance=estimation.module_importance() if ratio(config.modules, "modules") else None,
        rank_importance=estimation.rank_importance() if ratio(config.ranks, "ranks") else None,
        ranks=ranks_of(model),
    )


def random_plan(model: nn.Module, config: LightPeftConfig, seed: int) -> PruningPlan:
    """A plan of the same size drawn at random: the control that learned masks have to beat."""
    draw = torch.Generator().manual_seed(seed)
    groups, ranks = find_groups(model), ranks_of(model)
    plan = make_plan(
        model,
        config,
        {group.name: torch.rand(group.count, generator=draw) for group in groups},
        groups,
        {name: float(torch.rand((), generator=draw)) for name in ranks},
        {name: torch.rand(rank, generator=draw) for name, rank in ranks.items()},
        ranks,
    )
    return replace(plan, masks={})


def _modules(
    config: LightPeftConfig,
    ranks: dict[str, int],
    module_importance: dict[str, float],
    rank_importance: dict[str, Tensor],
) -> dict[str, Module]:
    staying = tuple(ranks)
    if ratio(config.modules, "modules"):
        staying = keep_modules(
            {name: module_importance[name] for name in ranks}, ratio(config.modules, "modules")
        )
    kept = {name: tuple(range(ranks[name])) for name in staying}
    if ratio(config.ranks, "ranks"):
        kept = keep_ranks({name: rank_importance[name] for name in staying}, ratio(config.ranks, "ranks"))
    return {
        name: Module(rank=rank, kept=kept.get(name, ()), importance=module_importance.get(name))
        for name, rank in ranks.items()
    }
