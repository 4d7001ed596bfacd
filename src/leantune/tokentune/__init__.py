"""TokenTune for any architecture: gradients, activations and loss for chosen tokens only. See README.md."""

from leantune.tokentune.attach import (
    TokenTuneState,
    check,
    chosen_tokens,
    has_tokens,
    learned_tokens,
    set_token_state,
    token_part,
    token_state,
    token_tune,
)
from leantune.tokentune.collate import ChoosingCollator
from leantune.tokentune.config import CHOOSE_AHEAD, STRATEGIES, TokenTuneConfig

__all__ = [
    "STRATEGIES",
    "CHOOSE_AHEAD",
    "ChoosingCollator",
    "TokenTuneConfig",
    "TokenTuneState",
    "check",
    "chosen_tokens",
    "has_tokens",
    "learned_tokens",
    "set_token_state",
    "token_part",
    "token_state",
    "token_tune",
]
