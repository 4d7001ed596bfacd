"""LaMDA as a PEFT tuner: where adapters go, how they are saved and loaded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from leantune.errors import UserError
from leantune.lamda.combining import Combining
from leantune.lamda.config import LamdaConfig
from leantune.lamda.init import Spectrum
from leantune.lamda.layer import LamdaLinear
from leantune.lamda.spectral import anchored, spectral_ranks, targeted_layers
from leantune.peft_methods import MixedBatch
from leantune.peft_methods.quantised import make_trainable


class LamdaModel(MixedBatch, Combining):
    """The PEFT tuner of LaMDA. Made by `peft.get_peft_model(model, LamdaConfig(...))`, not by hand."""

    prefix = "lamda_"
    tuner_layer_cls = LamdaLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @classmethod
    def tensor_axes_for(cls, config: LamdaConfig) -> dict[str, tuple[str, ...]]:
        """What each axis of a saved tensor runs over; Light-PEFT prunes adapters by it."""
        return {
            "lamda_A": ("rank", "in"),
            "lamda_S": ("rank", "rank"),
            "lamda_S0": ("rank",),
            "lamda_B": ("out", "rank"),
            "lamda_B0": ("out", "rank"),
        }

    def _create_and_replace(  # type: ignore[override]
        self,
        config: LamdaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        r = _of_layer(config.rank_pattern, current_key, config.r)
        alpha = _of_layer(config.alpha_pattern, current_key, config.lamda_alpha)
        settings: dict[str, Any] = {
            "r": r,
            "alpha": float(r if alpha is None else alpha),
            "config": config,
            "name": current_key,
            "spectrum": self._spectra.pop(current_key, None),
        }
        if isinstance(target, LamdaLinear):
            target.update_layer(adapter_name, **settings)
            return
        layer = self._new_layer(target, current_key)
        layer._active_adapter = self.active_adapters
        layer.update_layer(adapter_name, **settings)
        self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, target: nn.Module, name: str) -> LamdaLinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        make_trainable(base, name)
        backend = resolve_quantization_backend(base, **get_quantization_kwargs(self))
        if backend is not None and not backend.supports_merge:
            raise UserError(
                f"layer {name!r} is quantised with {backend.backend_name}, whose weights cannot be read; "
                f"LaMDA needs them for its start. bitsandbytes and torchao weight-only quantisation work"
            )
        if backend is None and not isinstance(base, nn.Linear | Conv1D):
            raise ValueError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (quantised too) "
                f"and `transformers.pytorch_utils.Conv1D` are; layer {name!r} is a {type(base).__name__}."
            )
        return LamdaLinear(target, quantization_backend=backend)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in lamda_layers(self.model).values():
            layer.keep_projection_dtype(adapter_name)

    # -- LaMDA++: ranks from the spectrum, when an adapter is made -------------------------------------------

    def _prepare_model(self, config: LamdaConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Fill in `rank_pattern` from `spectral_ranks`. Loading finds it filled in, and needs no spectrum."""
        # Layer name -> what was computed for its score and is used again for its factors.
        self._spectra: dict[str, Spectrum] = {}
        if config.spectral_ranks is None:
            return
        layers = targeted_layers(config, model)
        if not config.spectral_scores:
            matrices = {name: self._new_layer(layer, name).base_matrix for name, layer in layers.items()}
            pattern, self._spectra = spectral_ranks(matrices, config)
            config.rank_pattern, config.spectral_scores = pattern.rank_pattern, pattern.scores
        strangers = [name for name in layers if name not in config.spectral_scores]
        if strangers:
            raise UserError(
                f"spectral_scores: this config carries the ranks of another model, without layer "
                f"{strangers[0]!r}; make a new LamdaConfig for this one"
            )

    # -- files: B in one piece, everything that the adapter needs, no SVD on loading -------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for name, layer in lamda_layers(model).items():
            if adapter_name in layer.pending:
                layer.materialize(adapter_name)
                for attribute in ("lamda_A", "lamda_S0", "lamda_B0"):
                    key = f"{name}.{attribute}.{adapter_name}"
                    if key in state:
                        state[key] = getattr(layer, attribute)[adapter_name]
        _warn_if_never_frozen(model, adapter_name)
        suffix = f".lamda_B_frozen.{adapter_name}"
        for key in [key for key in state if key.endswith(suffix)]:
            trained = key.removesuffix(suffix) + f".lamda_B.{adapter_name}"
            state[trained] = torch.cat([state.pop(key), state[trained]], dim=1)
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in lamda_layers(model).items():
            if adapter_name not in layer.r:
                continue
            if f"{name}.lamda_A.{adapter_name}" in state:
                layer.pending.pop(adapter_name, None)
            key = f"{name}.lamda_B.{adapter_name}"
            frozen = layer.lamda_B_frozen[adapter_name].shape[1]
            if frozen and key in state:  # loading into an adapter that has been frozen in part
                B = state[key]
                state[f"{name}.lamda_B_frozen.{adapter_name}"] = B[:, :frozen].contiguous()
                state[key] = B[:, frozen:].contiguous()
        return state


def _of_layer(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """A layer's own value: of its anchored full name, else of the first key that matches, else the default.

    Full names first because they are many with LaMDA++, and matching each against all takes long.
    """
    own = pattern.get(anchored(name))
    return pattern.get(get_pattern_key(list(pattern), name), default) if own is None else own


def lamda_layers(model: nn.Module) -> dict[str, LamdaLinear]:
    """The adapted layers of a model by name, as the keys of its state dict begin."""
    return {
        name.removeprefix("_fsdp_wrapped_module."): module
        for name, module in model.named_modules()
        if isinstance(module, LamdaLinear)
    }


# In-place updates of a parameter after which it has certainly been through a training (an AdamW step makes
# two or three, loading an adapter one).
_MANY_UPDATES = 50


def _warn_if_never_frozen(model: nn.Module, adapter_name: str) -> None:
    """Say so when an adapter is saved after a training in which nobody minded the freezing of B.

    The version counter of a parameter counts the optimizer's updates for free; a hook in the forward pass
    would cost every step and break compilation.
    """
    for layer in lamda_layers(model).values():
        B = layer.lamda_B[adapter_name] if adapter_name in layer.r else None
        if B is None or not B.requires_grad or adapter_name in layer.scheduled:
            continue
        if layer.config[adapter_name].freeze_ratio < 1 and B._version > _MANY_UPDATES:
            warnings.warn(
                f"LaMDA adapter {adapter_name!r} was trained without gradual freezing: pass "
                f"`callbacks=[leantune.LamdaFreezing()]` to the Trainer, or call `leantune.freeze_columns` "
                f"after each optimizer step; freeze_ratio=1 says that B is meant to be trained to the end",
                UserWarning,
                stacklevel=2,
            )
        return
