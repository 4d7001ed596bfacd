"""What our PEFT methods share: room in PEFT's list of methods, mixed batches, checks of settings."""

from leantune.peft_methods.checks import check_choices, check_layers, check_positive, check_ranks, check_share
from leantune.peft_methods.mixed_batch import MixedBatch, rows_by_adapter
from leantune.peft_methods.types import add_peft_type

__all__ = [
    "MixedBatch",
    "add_peft_type",
    "check_choices",
    "check_layers",
    "check_positive",
    "check_ranks",
    "check_share",
    "rows_by_adapter",
]
