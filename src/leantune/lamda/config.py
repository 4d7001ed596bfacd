"""Settings of a LaMDA adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from leantune.errors import UserError

INITS = ("svd", "smallest", "random", "orthogonal")
INIT_SCALES = ("spectrum", "normalized", "identity")
INIT_BS = ("vectors", "zero")
FREEZE_ORDERS = ("largest", "smallest")


@dataclass
class LamdaConfig(PeftConfig):
    """Settings of a LaMDA adapter (Azizi, Kundu, Pedram; Findings of EMNLP 2024; arXiv 2406.12832).

    Give it to `peft.get_peft_model` as any other PEFT config. What each field does is in its help text below
    and in `leantune/lamda/README.md`.

    Raises:
        UserError: A value is out of range or unknown; the message names the key, the value and what is
            accepted.
    """

    r: int = field(default=32, metadata={"help": "Rank: rows of A, size of the square matrix S."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or a regular expression) of the layers to adapt, or 'all-linear'. "
            "Default: PEFT's choice for LoRA on the architecture."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regular expression) of layers to leave out."}
    )
    lamda_alpha: float | None = field(
        default=None,
        metadata={
            "help": "The adapter's output is scaled by lamda_alpha / r. Default: r, so the scale is 1."
        },
    )
    lamda_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on A x (r numbers a token), never on the layer's input."}
    )
    init: str = field(
        default="svd",
        metadata={
            "help": "What A (and B0) span: 'svd' the leading singular vectors of W, 'smallest' "
            "those of the smallest (needs a full SVD), 'random' a scaled Gaussian, 'orthogonal' a random "
            "orthonormal basis."
        },
    )
    init_scale: str = field(
        default="identity",
        metadata={
            "help": "The diagonal S0: 'spectrum' W's leading singular values, 'normalized' the same over "
            "their mean, 'identity' ones."
        },
    )
    init_b: str = field(
        default="zero",
        metadata={"help": "The fixed part of B: 'vectors' the left singular vectors (the paper), or 'zero'."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True: the adapter is exactly zero at the start. False: S and B random (for tests)."
        },
    )
    freeze_ratio: float = field(
        default=0.3,
        metadata={
            "help": "Part of the run after which all columns of B are frozen (eta in the paper): "
            "0 from the start, 1 at the very end. Needs `LamdaFreezing` or `freeze_columns` in the training."
        },
    )
    freeze_order: str = field(
        default="largest",
        metadata={
            "help": "Which column of B freezes first: that of the 'largest' or 'smallest' singular value."
        },
    )
    svd_seed: int = field(default=0, metadata={"help": "Seed of the randomised SVD and of random inits."})
    svd_iterations: int = field(
        default=4, metadata={"help": "Power iterations of the randomised SVD; more is more exact."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Layer name or regular expression -> its rank, instead of `r`."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Layer name or regular expression -> its alpha, instead of `lamda_alpha`."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained in full and saved with the adapter, for example a classifier."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Adapt only the layers with these indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layers' list in the model, with `layers_to_transform`."}
    )

    def __post_init__(self) -> None:
        # PEFT writes its version into every saved config and leaves it empty in a new one. A config that
        # comes from a file will most likely get its factors from the file too, so the SVD waits until it is
        # needed.
        self._from_file = self.peft_version is not None
        super().__post_init__()
        self.peft_type = PeftType["LAMDA"]
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_numbers()
        self._check_choices()
        self._check_layers()

    @property
    def from_file(self) -> bool:
        """Whether this config was read from a saved adapter (whose factors are then expected, too)."""
        return self._from_file

    def _check_numbers(self) -> None:
        _check_rank("r", self.r)
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        alphas = {f"alpha_pattern[{key!r}]": value for key, value in self.alpha_pattern.items()}
        if self.lamda_alpha is not None:
            alphas["lamda_alpha"] = self.lamda_alpha
        for key, alpha in alphas.items():
            if not _is_number(alpha) or alpha <= 0:
                raise UserError(f"{key}={alpha!r}: must be a number above 0 (or None for `r`)")
        if not _is_number(self.lamda_dropout) or not 0 <= self.lamda_dropout < 1:
            raise UserError(f"lamda_dropout={self.lamda_dropout!r}: must be a number in [0, 1)")
        if not _is_number(self.freeze_ratio) or not 0 <= self.freeze_ratio <= 1:
            raise UserError(f"freeze_ratio={self.freeze_ratio!r}: must be a number in [0, 1]")
        if not _is_int(self.svd_iterations) or self.svd_iterations < 0:
            raise UserError(f"svd_iterations={self.svd_iterations!r}: must be a whole number, 0 or more")
        if not _is_int(self.svd_seed):
            raise UserError(f"svd_seed={self.svd_seed!r}: must be a whole number")

    def _check_choices(self) -> None:
        for key, accepted in (
            ("init", INITS),
            ("init_scale", INIT_SCALES),
            ("init_b", INIT_BS),
            ("freeze_order", FREEZE_ORDERS),
            ("init_weights", (True, False)),
        ):
            value = getattr(self, key)
            if value not in accepted:
                raise UserError(f"{key}={value!r}: must be one of {', '.join(map(repr, accepted))}")
        if self.freeze_ratio == 0 and self.init_b == "zero" and self.init_weights:
            raise UserError(
                "freeze_ratio=0 with init_b='zero': B would stay zero and the adapter could never learn; "
                "use init_b='vectors', or freeze_ratio above 0"
            )

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for key in ("layers_to_transform", "layers_pattern"):
                if getattr(self, key) is not None:
                    raise UserError(
                        f"{key}={getattr(self, key)!r}: cannot be combined with target_modules="
                        f"{self.target_modules!r}, a regular expression; list names, or put layers into it"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(f"layers_pattern={self.layers_pattern!r}: needs layers_to_transform as well")


def _check_rank(key: str, rank: Any) -> None:
    if not _is_int(rank) or rank < 1:
        raise UserError(f"{key}={rank!r}: must be a whole number, 1 or more")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
