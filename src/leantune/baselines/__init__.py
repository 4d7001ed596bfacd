"""LoRA and its variants out of PEFT, as baselines: what each needs beside its config is here."""

from leantune.baselines.variants import (
    LORA_VARIANTS,
    AdaLoraBudget,
    freeze_down_projections,
    lora_variant,
    opened,
)

__all__ = ["LORA_VARIANTS", "AdaLoraBudget", "freeze_down_projections", "lora_variant", "opened"]
