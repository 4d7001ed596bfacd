"""PEFT's LoRA variants: one config each, and the two that need more than a config.

LoRA-FA (arXiv 2308.03303) is LoRA with A frozen at its random start, so that layer inputs need not be kept.
PEFT's `LoraFAOptimizer` preconditions B's gradient besides, which the paper does not, and it takes the place
of the optimizer: here A asks for no gradient, under any optimizer.

AdaLoRA (arXiv 2303.10512) starts at one and a half times the rank and gives ranks up where they matter least.
PEFT leaves it to the training loop to say when; forgotten, no rank ever goes. `AdaLoraBudget` says it.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leantune.errors import UserError

LORA_VARIANTS = ("lora", "rslora", "dora", "adalora", "vera", "lora-fa")

# At every load PEFT takes AdaLoRA's own pattern of ranks for LoRA's and says that it ignores it; it does not.
warnings.filterwarnings("ignore", r"The following rank_pattern keys .*\.lora_E'", RuntimeWarning)

_START = 3 / 2  # AdaLoRA's rank at the start over that at the end, as in its paper
# Shares of an AdaLoRA run: no rank goes in the first, none any more in the last.
_WARM_UP, _LAST = 0.1, 0.2


def lora_variant(variant: str, r: int, alpha: float, dropout: float, common: dict[str, Any]) -> PeftConfig:
    """The PEFT config of a variant.

    Args:
        variant: One of `LORA_VARIANTS`.
        r: Rank; AdaLoRA's is the mean at the end, VeRA's that of the random matrices which all layers share.
        alpha: The scale is alpha / r, for rsLoRA alpha / sqrt(r); VeRA has none.
        dropout: On the layer's input.
        common: What all of them take: targets, task type, modules to save.

    Raises:
        UserError: VeRA was given modules to leave out.
    """
    if variant == "vera":
        if common.get("exclude_modules") is not None:
            raise UserError(
                f"exclude_modules={common['exclude_modules']!r}: PEFT's VeRA has none; give target_modules"
            )
        common = {key: value for key, value in common.items() if key != "exclude_modules"}
        return VeraConfig(r=r, vera_dropout=dropout, **common)
    settings = {"lora_alpha": alpha, "lora_dropout": dropout, **common}
    if variant == "adalora":
        start = round(_START * r)
        # The length of the run is not known yet; `AdaLoraBudget` fills it in.
        return AdaLoraConfig(init_r=start, target_r=r, total_step=1, **settings)
    return LoraConfig(r=r, use_rslora=variant == "rslora", use_dora=variant == "dora", **settings)


def freeze_down_projections(model: nn.Module) -> None:
    """LoRA-FA: no LoRA layer's A asks for a gradient any more, whatever is switched on and off later."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.frozen_peft_weight_names = dict.fromkeys(layer.lora_A, ("lora_A",))
            layer._freeze_non_trainable_peft_weights()


def opened(model: PeftModel) -> PeftModel:
    """The loaded model itself; an AdaLoRA with what PEFT leaves out and its forward pass needs for a loss."""
    for tuner in _adalora(model):
        if "trainable_adapter_name" not in vars(tuner):
            tuner.trainable_adapter_name = tuner.active_adapters[0]
    return model


class AdaLoraBudget(TrainerCallback):
    """Has AdaLoRA give up ranks as the training goes; nothing happens for other models.

    The scores by which ranks go are in no checkpoint of PEFT's, and a saved adapter has lost the ranks that
    are masked at the time: a run cannot be gone on with.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The length of the run is known now."""
        for tuner in _adalora(kwargs["model"]):
            config = cast(AdaLoraConfig, tuner.peft_config[tuner.trainable_adapter_name])
            total = state.max_steps
            config.total_step, config.tinit = total, int(_WARM_UP * total)
            config.tfinal = int(_LAST * total)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimizer's step, while the gradients are still there."""
        for tuner in _adalora(kwargs["model"]):
            trained = [p for name, p in tuner.named_parameters() if ".lora_E." in name]
            if all(p.grad is not None for p in trained):  # else the step was skipped
                tuner.update_and_allocate(state.global_step + 1)


def _adalora(model: nn.Module) -> list[AdaLoraModel]:
    return [module for module in model.modules() if isinstance(module, AdaLoraModel)]
