"""From a config to the model that a recipe trains: without weights, or (to check that) with random ones.

    config → model on meta → units cut → adapter → quantised → fake tensors → token selection, masks

PEFT cannot be attached to fake tensors, so the adapter comes before; token selection runs the model once, so
it comes after.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from leantune.anatomy import Group, find_groups
from leantune.errors import UserError
from leantune.lamda.model import lamda_layers
from leantune.lightpeft import LightPeftConfig, attach_masks
from leantune.lightpeft.adapters import adapter_layers
from leantune.lightpeft.config import ratio
from leantune.lightpeft.select import Kept, keep_units
from leantune.lightpeft.surgery import prune_base
from leantune.planner.quantized import quantize_for_real, stand_in
from leantune.planner.setting import Setting
from leantune.planner.tracker import Tracker
from leantune.recipes import AdapterRecipe, LamdaRecipe, Recipe
from leantune.run import lean
from leantune.run.models import quiet_transformers
from leantune.run.tasks import TASKS

ADAPTER = "default"


def build_fake(setting: Setting, tracker: Tracker) -> nn.Module:
    """The setting's model on fake tensors, in training mode, with all its methods.

    Buffers are real: positions and masks made from them must be numbers.

    Raises:
        UserError: The model class cannot be made from its config, or a method does not fit it.
    """
    with init_empty_weights(include_buffers=False):
        base = base_model(setting)
    base.tie_weights()  # which were made one by one
    model = attached(base, setting)
    if setting.storage is not None:
        stand_in(model, setting.storage, lambda: tracker.during("dequantise"))
    _to_fake(model, tracker)
    with tracker, tracker.lenient(), tracker.during("attach"):
        _attach_late(model, setting, verify=False)
    return _ready(model, setting)


def build_real(setting: Setting) -> nn.Module:
    """The same model with random weights on the CPU."""
    base = base_model(setting)
    if setting.storage is not None:
        quantize_for_real(base, setting.storage)
    model = attached(base, setting)
    _attach_late(model, setting, verify=True)
    return _ready(model, setting)


def base_model(setting: Setting) -> PreTrainedModel:
    """The model with its head, from the config.

    Raises:
        UserError: transformers cannot make it.
    """
    recipe, task = setting.recipe, TASKS[setting.recipe.model.task]
    options: dict[str, Any] = {"dtype": setting.dtype}
    if recipe.model.attention is not None:
        options["attn_implementation"] = recipe.model.attention
    try:
        with quiet_transformers():
            return task.auto_class.from_config(setting.config, **options)
    except (ValueError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"model.path = {recipe.model.path!r}: no model from its config: {reason}") from None


def attached(model: PreTrainedModel, setting: Setting) -> nn.Module:
    """The base, cut, with its adapter: what works without numbers."""
    recipe, prune = setting.recipe, setting.recipe.lean.prune
    if prune is not None and setting.stage != "estimate":
        groups = find_groups(model)
        prune_base(model, groups, spread_units(lean.prune_config(recipe), groups))
        recipe = _fewer_ranks(recipe)
    without = {"prune": None, "tokens": None, "quantize": None, "adapter": _even_ranks(recipe)}
    bare = recipe.model_copy(update={"lean": recipe.lean.model_copy(update=without)})
    adapted = lean.attach(model, bare, TASKS[recipe.model.task].peft_task_type)
    if prune is not None and setting.stage != "estimate":
        _drop_modules(adapted, lean.prune_config(recipe))
    if setting.stage == "frozen":
        for layer in lamda_layers(adapted).values():
            layer.split_columns(ADAPTER, layer.r[ADAPTER])
    return adapted


def _even_ranks(recipe: Recipe) -> AdapterRecipe:
    """The adapter; of LaMDA++, whose ranks come from weights, which are not read, with their mean."""
    adapter = recipe.lean.adapter
    if not isinstance(adapter, LamdaRecipe) or adapter.spectral_ranks is None:
        return adapter
    return adapter.model_copy(update={"spectral_ranks": None, "r": adapter.spectral_ranks.budget})


def _attach_late(model: nn.Module, setting: Setting, verify: bool) -> None:
    """Token selection, which tries the model, and the masks of a pruned run's first stage."""
    lean.attach_tokens(model, setting.recipe, verify)
    if setting.stage == "estimate":
        attach_masks(model, lean.prune_config(setting.recipe))


def _ready(model: nn.Module, setting: Setting) -> nn.Module:
    model.train()
    if setting.checkpointing:
        target: Any = model
        enable = getattr(target, "activation_checkpointing_enable", None)
        (enable or target.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def spread_units(config: LightPeftConfig, groups: tuple[Group, ...]) -> Kept:
    """Units that stay when every layer loses the same share, whatever the scope: as good a guess as any."""
    kept: Kept = {}
    for kind, how_much in (("heads", config.heads), ("neurons", config.neurons)):
        even = {g.name: torch.linspace(0, 1, g.count) for g in groups if g.kind == kind}
        scope = config.heads_scope if kind == "heads" else config.neurons_scope
        multiple, least = (config.width_multiple, config.least_neurons) if kind == "neurons" else (1, 0.0)
        kept |= keep_units(even, ratio(how_much, kind), scope, multiple, least)
    return kept


def _fewer_ranks(recipe: Recipe) -> Recipe:
    """The recipe with its adapter's rank lowered by the share of ranks that goes."""
    assert recipe.lean.prune is not None
    adapter, share = recipe.lean.adapter, ratio(recipe.lean.prune.ranks, "ranks")
    if adapter.type == "none" or not share:
        return recipe
    fewer = adapter.model_copy(update={"r": max(1, round(adapter.r * (1 - share)))})
    return recipe.model_copy(update={"lean": recipe.lean.model_copy(update={"adapter": fewer})})


def _drop_modules(model: nn.Module, config: LightPeftConfig) -> None:
    """Take the adapter off an evenly spread share of its layers."""
    layers = list(adapter_layers(model))
    gone = int(ratio(config.modules, "modules") * len(layers))
    for number in range(gone):
        name, layer = layers[number * len(layers) // gone]
        owner, _, child = name.rpartition(".")
        setattr(lean_root(model).get_submodule(owner), child, layer.get_base_layer())


def lean_root(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _to_fake(model: nn.Module, tracker: Tracker) -> None:
    """Replace what is on meta by fake tensors of the CPU; shared ones stay shared."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with tracker.fake:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in _on_meta(held):
                held[name] = fake(tensor)  # type: ignore[assignment]


def _on_meta(held: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in held.items() if t is not None and t.device.type == "meta"]


@contextmanager
def undisturbed() -> Iterator[None]:
    """One thread (small operations are not worth waking others), and no garbage collection on the way.

    What hangs in reference cycles stays until Python happens to collect it; a forecast counts it as staying.
    """
    threads, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()
