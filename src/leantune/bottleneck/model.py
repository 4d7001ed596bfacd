"""The bottleneck adapter as a PEFT tuner: where adapters go."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from leantune.bottleneck.config import BottleneckConfig
from leantune.bottleneck.layer import NOT_MERGEABLE, BottleneckLinear
from leantune.errors import UserError
from leantune.peft_methods import MixedBatch
from leantune.peft_methods.quantised import make_trainable


class BottleneckModel(MixedBatch):
    """The PEFT tuner. Made by `peft.get_peft_model(model, BottleneckConfig(...))`, not by hand."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLinear
    target_module_mapping: Any = {}

    @classmethod
    def tensor_axes_for(cls, config: BottleneckConfig) -> dict[str, tuple[str, ...]]:
        """What each axis of a saved tensor runs over; Light-PEFT prunes adapters by it."""
        return {
            "bottleneck_down": ("rank", "out" if config.mode == "serial" else "in"),
            "bottleneck_down_bias": ("rank",),
            "bottleneck_up": ("out", "rank"),
            "bottleneck_up_bias": ("out",),
        }

    # -- which layers ----------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Turn `placement` (and the layers it is limited to) into names of layers, which files then carry."""
        if peft_config.target_modules is None:
            # late: registering this method must not load `anatomy`, which itself loads PEFT
            from leantune.bottleneck.placement import placed

            peft_config.target_modules = placed(self.model, peft_config)
            peft_config.layers_to_transform = None  # PEFT counts an encoder's and a decoder's layers alike
        return peft_config

    def _create_and_replace(  # type: ignore[override]
        self,
        config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), current_key), config.r)
        alpha = config.alpha_pattern.get(
            get_pattern_key(list(config.alpha_pattern), current_key), config.bottleneck_alpha
        )
        alpha = float(r if alpha is None else alpha)
        if isinstance(target, BottleneckLinear):
            target.update_layer(adapter_name, r, alpha, config)
            return
        layer = self._new_layer(target, current_key)
        layer._active_adapter = self.active_adapters
        layer.update_layer(adapter_name, r, alpha, config)
        self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, target: nn.Module, name: str) -> BottleneckLinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        make_trainable(base, name)
        known = isinstance(base, nn.Linear | Conv1D)
        if not known and resolve_quantization_backend(base, **get_quantization_kwargs(self)) is None:
            raise ValueError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (quantised too) "
                f"and `transformers.pytorch_utils.Conv1D` are; layer {name!r} is a {type(base).__name__}."
            )
        return BottleneckLinear(target)

    # -- what it cannot do -----------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        raise UserError(NOT_MERGEABLE)


def bottleneck_layers(model: nn.Module) -> dict[str, BottleneckLinear]:
    """The adapted layers of a model by name, as the keys of its state dict begin."""
    return {
        name.removeprefix("_fsdp_wrapped_module."): module
        for name, module in model.named_modules()
        if isinstance(module, BottleneckLinear)
    }
