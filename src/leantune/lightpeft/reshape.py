"""An adapter's tensors, cut to a pruned base; and back on the whole one."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from leantune.errors import UserError
from leantune.lightpeft.adapters import Axes, adapter_axes, adapter_config, adapter_layers
from leantune.lightpeft.shared import whole
from leantune.lightpeft.surgery import ModuleCut

_ROOT = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter apart from any model.

    Attributes:
        config: Its PEFT config.
        state: Its tensors, under the names that a saved adapter file uses.
    """

    config: PeftConfig
    state: dict[str, Tensor]

    def attach(self, base: nn.Module, trainable: bool = True) -> PeftModel:
        """A `PeftModel` of this adapter on `base`.

        Raises:
            UserError: Its tensors do not fit the base.
        """
        config = copy.deepcopy(self.config)
        config.inference_mode = not trainable
        # Copied: a file's memory may be unaligned, and some kernels round differently there.
        state = {key: value.clone() for key, value in self.state.items()}
        # On meta first: nothing is initialised (LaMDA needs an SVD a layer) that is overwritten right after.
        model: Any = get_peft_model(base, config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
        try:
            result: Any = set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
        except RuntimeError as error:
            raise UserError(
                f"the adapter does not fit the base: {str(error).splitlines()[-1].strip()}"
            ) from None
        if result.unexpected_keys:
            raise UserError(f"the adapter does not fit the base: no place for {result.unexpected_keys[0]}")
        return model

    def save(self, folder: Path) -> None:
        """Write it as PEFT does: it opens with `PeftModel.from_pretrained` on the base it was made for."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: value.cpu().contiguous() for key, value in self.state.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        self.config.save_pretrained(str(folder))


def take(model: nn.Module) -> Adapter:
    """The model's one adapter, its tensors copied (whole, where processes share them).

    Raises:
        UserError: There is none, or there are several.
    """
    name, config = adapter_config(model)
    state = get_peft_model_state_dict(model, adapter_name=name)
    return Adapter(
        copy.deepcopy(config), {key: whole(value.detach()).clone() for key, value in state.items()}
    )


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Module → rank of the model's one adapter."""
    name, _ = adapter_config(model)
    return {module: layer.r[name] for module, layer in adapter_layers(model) if name in layer.r}  # type: ignore[attr-defined, operator, index]


def shrink(model: nn.Module, cuts: Mapping[str, ModuleCut], kept: Mapping[str, tuple[int, ...]]) -> Adapter:
    """The model's adapter for the pruned base: features that are gone, ranks and modules that are gone.

    The scaling of every module stays what it was, whatever its rank becomes.

    Args:
        model: A PEFT model on the whole base.
        cuts: From `module_cuts`: layer → what it loses.
        kept: Module → its ranks that stay; none: the module goes. Modules not in it stay whole.

    Raises:
        UserError: No module would be left, or the method has tensors that cannot be cut.
    """
    adapter = take(model)
    name, _ = adapter_config(model)
    axes = adapter_axes(adapter.config)
    layers = {module: layer for module, layer in adapter_layers(model) if name in layer.r}  # type: ignore[attr-defined, operator]
    staying = {module: kept.get(module, tuple(range(layer.r[name]))) for module, layer in layers.items()}  # type: ignore[attr-defined, index]
    staying = {module: ranks for module, ranks in staying.items() if ranks}
    if not staying:
        raise UserError("the pruning plan leaves no module of the adapter")
    state = {}
    for key, value in adapter.state.items():
        module, axis_names = _place(key, layers, axes)
        if module is None:
            state[key] = value
        elif module in staying:
            state[key] = _cut(value, axis_names, cuts.get(module), staying[module], layers[module].r[name])  # type: ignore[attr-defined, index]
    scalings = {module: layers[module].scaling[name] for module in staying}  # type: ignore[attr-defined, index]
    return Adapter(_config(adapter.config, {m: len(r) for m, r in staying.items()}, scalings), state)


def grow(adapter: Adapter, cuts: Mapping[str, ModuleCut]) -> Adapter:
    """An adapter of the pruned base for the whole one: zeros where features had been cut (LoRAM's recovery).

    Args:
        adapter: From the pruned model.
        cuts: Those that the base was pruned by.
    """
    axes = adapter_axes(adapter.config)
    modules = dict.fromkeys(cuts)
    state = {}
    for key, value in adapter.state.items():
        module, axis_names = _place(key, modules, axes)
        state[key] = value if module is None else _pad(value, axis_names, cuts[module])
    return Adapter(copy.deepcopy(adapter.config), state)


def _place(key: str, modules: Mapping[str, Any], axes: Axes) -> tuple[str | None, tuple[str, ...]]:
    """Of which module a saved tensor is, and what its axes run over; None for modules trained in full."""
    path = key.removeprefix(_ROOT)
    for tensor, axis_names in axes.items():
        for ending in (f".{tensor}", f".{tensor}.weight", f".{tensor}.bias"):
            if path.endswith(ending):
                module = path.removesuffix(ending)
                names = axis_names[:1] if ending.endswith(".bias") else axis_names
                return (module, names) if module in modules else (None, ())
    owner = next((module for module in modules if path.startswith(f"{module}.")), None)
    if owner is not None:
        raise UserError(f"Light-PEFT cannot prune the tensor {path.removeprefix(owner + '.')} of {owner}")
    return None, ()


def _cut(
    value: Tensor, axis_names: tuple[str, ...], cut: ModuleCut | None, ranks: tuple[int, ...], r: int
) -> Tensor:
    for dim, axis in enumerate(axis_names):
        keep = torch.tensor(ranks) if axis == "rank" and len(ranks) < r else _kept(cut, axis)
        if keep is not None:
            value = value.index_select(dim, keep.to(value.device))
        if axis == "in" and cut is not None and cut.scale_in is not None:
            shape = [-1 if d == dim else 1 for d in range(value.dim())]
            value = (value * cut.scale_in.to(value.device).view(shape)).to(value.dtype)
    return value.contiguous()


def _pad(value: Tensor, axis_names: tuple[str, ...], cut: ModuleCut) -> Tensor:
    for dim, axis in enumerate(axis_names):
        keep = _kept(cut, axis)
        if keep is None:
            continue
        shape = list(value.shape)
        shape[dim] = cut.in_features if axis == "in" else cut.out_features
        value = value.new_zeros(shape).index_copy(dim, keep.to(value.device), value)
    return value


def _kept(cut: ModuleCut | None, axis: str) -> Tensor | None:
    if cut is None or axis == "rank":
        return None
    return cut.keep_in if axis == "in" else cut.keep_out


def _config(config: Any, ranks: dict[str, int], scalings: dict[str, float]) -> PeftConfig:
    """The same method on exactly these modules, with these ranks, the scalings as they were."""
    new = copy.deepcopy(config)
    power = 0.5 if getattr(new, "use_rslora", False) else 1.0
    new.target_modules = set(ranks)
    new.exclude_modules = None
    for key in ("layers_to_transform", "layers_pattern"):
        if hasattr(new, key):
            setattr(new, key, None)
    if config.rank_pattern or config.alpha_pattern or set(ranks.values()) != {config.r}:
        new.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
        new.alpha_pattern = {
            f"^{re.escape(name)}": scalings[name] * rank**power for name, rank in ranks.items()
        }
    return new
