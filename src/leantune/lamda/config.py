"""Settings of a LaMDA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig, PeftType

from leantune.errors import UserError
from leantune.lamda.ranks import SpectralRanks
from leantune.peft_methods import check_choices, check_layers, check_positive, check_ranks, check_share
from leantune.peft_methods.checks import is_whole

DATA_INITS = ("activation", "gradient")  # with `prepare_lamda`
INITS = ("svd", "smallest", "random", "orthogonal", *DATA_INITS)
INIT_SCALES = ("spectrum", "normalized", "identity")
INIT_BS = ("vectors", "zero")
FREEZE_ORDERS = ("largest", "smallest")
BIASES = ("none", "all", "lamda_only")


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
            "orthonormal basis; from task data, by `leantune.prepare_lamda` before training: 'activation' "
            "the leading directions of the layer's inputs, 'gradient' singular vectors of W's gradient."
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
    spectral_ranks: SpectralRanks | None = field(
        default=None,
        metadata={
            "help": "LaMDA++: the rank of each layer from the spectrum of its weight, under one budget for "
            "all (`r` is not used then). The ranks are written into `rank_pattern` when the adapter is made."
        },
    )
    spectral_scores: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Filled in with `spectral_ranks`: layer name -> energy score in [0, 1]. A config that "
            "has them keeps its ranks: make a new one for another model."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained in full and saved with the adapter, for example a classifier."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Rows of the embedding that are trained beside the adapter: token ids, or name of "
            "the embedding -> token ids."
        },
    )
    bias: str = field(
        default="none",
        metadata={
            "help": "Biases of the base that are trained too: 'none', 'all', or 'lamda_only' those of the "
            "adapted layers. The base without the adapter is then no longer what it was."
        },
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
        self._check_spectral()
        check_ranks(self)
        check_positive(self, "lamda_alpha")
        check_share(self, "lamda_dropout", closed=False)
        check_share(self, "freeze_ratio", closed=True)
        self._check_start()
        check_layers(self)

    @property
    def from_file(self) -> bool:
        """Whether this config was read from a saved adapter (whose factors are then expected, too)."""
        return self._from_file

    def _check_spectral(self) -> None:
        if isinstance(self.spectral_ranks, dict):  # from a file, or from a person who likes it plain
            try:
                self.spectral_ranks = SpectralRanks(**self.spectral_ranks)
            except TypeError as error:
                raise UserError(
                    f"spectral_ranks={self.spectral_ranks!r}: {str(error).rpartition('() ')[2]}; it takes "
                    f"budget, choices and more_rank_to"
                ) from None
        if self.spectral_ranks is not None and not isinstance(self.spectral_ranks, SpectralRanks):
            raise UserError(f"spectral_ranks={self.spectral_ranks!r}: must be a SpectralRanks, or None")
        if self.spectral_ranks is not None and self.rank_pattern and not self.spectral_scores:
            raise UserError(
                "rank_pattern and spectral_ranks are both given, and each says the ranks of layers: "
                "leave one of them out"
            )

    def _check_start(self) -> None:
        if not is_whole(self.svd_iterations) or self.svd_iterations < 0:
            raise UserError(f"svd_iterations={self.svd_iterations!r}: must be a whole number, 0 or more")
        if not is_whole(self.svd_seed):
            raise UserError(f"svd_seed={self.svd_seed!r}: must be a whole number")
        check_choices(
            self,
            {
                "init": INITS,
                "init_scale": INIT_SCALES,
                "init_b": INIT_BS,
                "freeze_order": FREEZE_ORDERS,
                "init_weights": (True, False),
                "bias": BIASES,
            },
        )
        if self.init in DATA_INITS and self.init_scale == "spectrum":
            raise UserError(
                f"init_scale='spectrum' with init={self.init!r}: the singular values of W do not belong to "
                f"directions from data; use 'identity' or 'normalized'"
            )
        if self.init == "activation" and self.init_b == "vectors":
            raise UserError(
                "init_b='vectors' with init='activation': inputs have no left singular vectors; "
                "use init_b='zero', or init='gradient'"
            )
        if self.freeze_ratio == 0 and self.init_b == "zero" and self.init_weights:
            raise UserError(
                "freeze_ratio=0 with init_b='zero': B would stay zero and the adapter could never learn; "
                "use init_b='vectors', or freeze_ratio above 0"
            )
