"""Settings of a bottleneck adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig, PeftType

from leantune.errors import UserError
from leantune.peft_methods import check_choices, check_layers, check_positive, check_ranks, check_share

MODES = ("serial", "parallel")
PLACEMENTS = ("houlsby", "pfeiffer")
ACTIVATION_NAMES = ("relu", "gelu", "silu", "swish", "tanh")


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings of a bottleneck adapter: a small two-layer network behind or beside a frozen linear layer.

    Serial: Houlsby et al. 2019 (arXiv 1902.00751), Pfeiffer et al. 2021 (arXiv 2005.00247); parallel: He et
    al. 2022 (arXiv 2110.04366). Give it to `peft.get_peft_model` as any other PEFT config. What each field
    does is in its help text below and in `leantune/bottleneck/README.md`.

    Raises:
        UserError: A value is out of range or unknown; the message names the key, the value and what is
            accepted.
    """

    r: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    mode: str = field(
        default="serial",
        metadata={
            "help": "'serial': the adapter reads the frozen layer's output; 'parallel': the layer's input."
        },
    )
    placement: str = field(
        default="houlsby",
        metadata={
            "help": "Which layers, where `target_modules` is None: 'houlsby' the output projections of "
            "attention and of the feed-forward network, 'pfeiffer' those of the latter."
        },
    )
    activation: str = field(
        default="relu", metadata={"help": "Between down and up: 'relu', 'gelu', 'silu' ('swish'), 'tanh'."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or a regular expression) of the layers to adapt, or 'all-linear'. "
            "Default: as `placement` says."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regular expression) of layers to leave out."}
    )
    bottleneck_alpha: float | None = field(
        default=None,
        metadata={
            "help": "The adapter's output is scaled by bottleneck_alpha / r. Default: r, so the scale is 1."
        },
    )
    bottleneck_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout on the activated bottleneck (r numbers a token), never on what it reads."},
    )
    bottleneck_bias: bool = field(default=True, metadata={"help": "Whether down and up have biases."})
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True: the adapter is exactly zero at the start. False: up random, too (for tests)."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Layer name or regular expression -> its width, instead of `r`."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "Layer name or regular expression -> its alpha, instead of `bottleneck_alpha`."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained in full and saved with the adapter, for example a classifier."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={
            "help": "Adapt only the layers with these indices; with `placement`, counted over the whole "
            "model, encoder first."
        },
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layers' list in the model, with `layers_to_transform`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["BOTTLENECK"]
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        check_ranks(self)
        check_positive(self, "bottleneck_alpha")
        check_share(self, "bottleneck_dropout", closed=False)
        check_choices(
            self,
            {
                "mode": MODES,
                "placement": PLACEMENTS,
                "activation": ACTIVATION_NAMES,
                "bottleneck_bias": (True, False),
                "init_weights": (True, False),
            },
        )
        check_layers(self)
        if self.layers_pattern and self.target_modules is None:
            raise UserError(
                f"layers_pattern={self.layers_pattern!r}: needs target_modules as well; `placement` counts "
                f"layers by itself"
            )
