"""LaMDA: adapters that train in r dimensions, as a PEFT method. See README.md in this folder.

Importing this package makes the method known to PEFT (`import leantune` sees to it).
"""

from __future__ import annotations

from peft.utils import register_peft_method

from leantune.lamda.config import LamdaConfig
from leantune.lamda.export import lamda_to_lora, save_as_lora
from leantune.lamda.freezing import (
    LamdaFreezing,
    freeze_columns,
    frozen_columns,
    frozen_in_place,
    frozen_share,
)
from leantune.lamda.model import LamdaModel
from leantune.lamda.prepare import prepare_lamda, unprepared_adapters
from leantune.lamda.ranks import SpectralRanks
from leantune.lamda.spectral import SpectralPattern, spectral_rank_pattern
from leantune.peft_methods import add_peft_type

__all__ = [
    "LamdaConfig",
    "LamdaFreezing",
    "LamdaModel",
    "SpectralPattern",
    "SpectralRanks",
    "freeze_columns",
    "frozen_columns",
    "frozen_in_place",
    "frozen_share",
    "lamda_to_lora",
    "prepare_lamda",
    "save_as_lora",
    "spectral_rank_pattern",
    "unprepared_adapters",
]

add_peft_type("LAMDA")
register_peft_method(name="lamda", config_cls=LamdaConfig, model_cls=LamdaModel, prefix="lamda_")
