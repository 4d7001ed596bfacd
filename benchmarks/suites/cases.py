"""What is measured: suites, each a table of shapes and batches × methods. The first method is built first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FULL: dict[str, Any] = {"adapter": {"type": "none"}}
LORA: dict[str, Any] = {"adapter": {"type": "lora", "r": 8}}
# Random rows for A: what A spans changes neither memory nor time, and an SVD of 224 matrices takes minutes.
LAMDA: dict[str, Any] = {"adapter": {"type": "lamda", "r": 32, "init": "random"}}
CHECKPOINTING = {"gradient_checkpointing": True}
NF4 = {"quantize": "nf4"}


def pruned(share: str | float, **more: Any) -> dict[str, Any]:
    """Light-PEFT at a share of heads and neurons, the same in every layer; widths fit tensor cores."""
    return {
        "prune": {
            "heads": share, "neurons": share, "neurons_scope": "layer", "width_multiple": 64, **more,
        }
    }  # fmt: skip


def tokens(keep: int | float) -> dict[str, Any]:
    """TokenTune's random choice."""
    return {"tokens": {"keep": keep, "strategy": "random"}}


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        lean: As in a recipe.
        train: As in a recipe.
        stage: As of `leantune.planner.Setting`: `frozen` is after LaMDA froze B, `estimate` Light-PEFT's
            masked first stage.
        changes: Names in `build.CHANGES`: what no recipe says.
        devices: Where it differs from the other methods.
    """

    lean: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    stage: str = "train"
    changes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda", "cpu")


CKPT = "LoRA + checkpointing"
METHODS: dict[str, Method] = {
    "full": Method(FULL),
    "full + checkpointing": Method(FULL, CHECKPOINTING),
    "LoRA": Method(LORA),
    "LoRA, adapter in bf16": Method(LORA, changes=("adapter dtype",), devices=("cuda",)),
    CKPT: Method(LORA, CHECKPOINTING),
    "LoRA + chunked loss": Method(LORA, changes=("chunked loss",)),
    "LoRA + checkpointing + chunked loss": Method(LORA, CHECKPOINTING, changes=("chunked loss",)),
    "LoRA-FA": Method(LORA, changes=("freeze A",)),
    "LaMDA": Method(LAMDA),
    "LaMDA, B frozen": Method(LAMDA, stage="frozen"),
    "Light-PEFT 1/3 + 1/3, whole adapter": Method(LORA | pruned("1/3")),
    "Light-PEFT 1/3 + 1/3": Method(LORA | pruned("1/3", modules=0.75, ranks=0.5)),
    "Light-PEFT 40 % + 40 %": Method(LORA | pruned(0.4, modules=0.75, ranks=0.5)),
    "Light-PEFT, estimation step": Method(LORA | pruned("1/3", modules=0.75, ranks=0.5), stage="estimate"),
    "full, 16 tokens": Method(FULL | tokens(16)),
    "LoRA, 16 tokens": Method(LORA | tokens(16)),
    **{f"full, {share} % of tokens": Method(FULL | tokens(share / 100)) for share in (10, 25, 50)},
    **{f"LoRA, {share} % of tokens": Method(LORA | tokens(share / 100)) for share in (10, 25, 50, 100)},
    "LoRA, 25 % of tokens + checkpointing": Method(LORA | tokens(0.25), CHECKPOINTING),
    "QLoRA": Method(LORA | NF4),
    "QLoRA + checkpointing": Method(LORA | NF4, CHECKPOINTING),
    "QLoRA + checkpointing + chunked loss": Method(LORA | NF4, CHECKPOINTING, changes=("chunked loss",)),
    **{f"QLoRA, {share} % of tokens": Method(LORA | NF4 | tokens(share / 100)) for share in (10, 25)},
    "lean": Method(LAMDA | pruned("1/3") | tokens(0.25)),
    "lean + checkpointing": Method(LAMDA | pruned("1/3") | tokens(0.25), CHECKPOINTING),
    "LaMDA, 25 % of tokens, NF4": Method(LAMDA | NF4 | tokens(0.25)),
    "LoRA, unsloth": Method(LORA, changes=("unsloth",)),  # a row that says why there is none
}


@dataclass(frozen=True)
class Group:
    """Methods that are compared with each other: one shape, one batch, steps in turn.

    Attributes:
        shape: Name in `shapes.SHAPES`.
        batch: Rows.
        length: Tokens of a row; of the encoder's side for seq2seq.
        target: Tokens of the decoder's side.
        methods: Names in `METHODS`.
    """

    shape: str
    batch: int
    length: int
    methods: tuple[str, ...]
    target: int = 0

    @property
    def name(self) -> str:
        """As in tables and results."""
        return f"{self.shape}, {self.batch} × {self.length}" + (f"/{self.target}" if self.target else "")


@dataclass(frozen=True)
class Suite:
    """A question, and the groups that answer it.

    Attributes:
        title: In words.
        baselines: Methods that ratios are taken to, the first one's for evaluation as well.
        weight: Its share of a budget that all suites are given together.
        groups: By scale.
    """

    title: str
    baselines: tuple[str, ...]
    weight: int
    groups: dict[str, tuple[Group, ...]]

    def cases(self, scale: str, device: str) -> Iterator[tuple[Group, list[str]]]:
        """Each group with the names of its methods on a device."""
        for group in self.groups[scale]:
            yield group, [name for name in group.methods if device in METHODS[name].devices]


_ADAPTERS = ("LoRA", "LoRA, adapter in bf16", "LoRA-FA", "LaMDA", "LaMDA, B frozen")
_LIGHT = (
    "LoRA", "Light-PEFT 1/3 + 1/3, whole adapter", "Light-PEFT 1/3 + 1/3", "Light-PEFT 40 % + 40 %",
    "Light-PEFT, estimation step",
)  # fmt: skip
_BERT = ("full", "full + checkpointing", "full, 16 tokens", "LoRA", CKPT, "LoRA, 16 tokens")
_CORE = (
    "full", "LoRA", "LoRA, adapter in bf16", CKPT, "LoRA + checkpointing + chunked loss",
    "LoRA, 10 % of tokens", "LoRA, 25 % of tokens", "QLoRA", "QLoRA, 25 % of tokens",
)  # fmt: skip
_TOKENS = (
    "full", "full, 10 % of tokens", "full, 25 % of tokens", "full, 50 % of tokens",
    "LoRA", "LoRA, adapter in bf16", CKPT, "LoRA + chunked loss", "LoRA + checkpointing + chunked loss",
    "LoRA, 10 % of tokens", "LoRA, 25 % of tokens", "LoRA, 25 % of tokens + checkpointing",
    "LoRA, 50 % of tokens", "LoRA, 100 % of tokens",
    "QLoRA", "QLoRA + checkpointing", "QLoRA, 10 % of tokens", "QLoRA, 25 % of tokens",
)  # fmt: skip
_TOKENS_SMALL = tuple(
    name
    for name in _TOKENS
    if name
    not in ("full, 10 % of tokens", "full, 50 % of tokens", "LoRA + chunked loss", "QLoRA, 10 % of tokens")
)
_LEAN = (
    CKPT, "lean", "lean + checkpointing", "full", "LoRA", "LoRA, adapter in bf16", "LoRA + chunked loss",
    "LoRA + checkpointing + chunked loss", "QLoRA", "QLoRA + checkpointing",
    "QLoRA + checkpointing + chunked loss", "LaMDA, 25 % of tokens, NF4", "LoRA, unsloth",
)  # fmt: skip

SUITES: dict[str, Suite] = {
    "lamda-memory": Suite("LaMDA: memory of a step", ("LoRA",), 2, {
        "full": tuple(Group("BART-large", rows, 1024, _ADAPTERS, 128) for rows in (8, 64, 16, 32, 4)),
        "small": tuple(Group("BART-large", rows, 512, _ADAPTERS, 64) for rows in (4, 8)),
        "tiny": (Group("BART-large", 2, 12, _ADAPTERS, 8),),
    }),
    "light-peft-speed": Suite("Light-PEFT: time and memory of the pruned model", ("LoRA",), 2, {
        "full": (
            Group("RoBERTa-large", 32, 128, _LIGHT),
            Group("OPT-1.3B", 8, 512, _LIGHT),
            Group("OPT-6.7B", 4, 512, _LIGHT[:-1]),
        ),
        "small": (
            Group("RoBERTa-large", 16, 128, _LIGHT),
            Group("OPT-1.3B", 4, 512, _LIGHT[:-1]),
            Group("OPT-6.7B", 4, 512, _LIGHT[:-1]),
        ),
        "tiny": (Group("RoBERTa-large", 2, 12, _LIGHT),),
    }),
    "tokentune-memory": Suite("TokenTune: memory and time of a step", ("full", CKPT), 3, {
        "full": (
            Group("Llama-2-7B", 1, 2048, _TOKENS),
            Group("BERT-large", 32, 512, _BERT),
            Group("BERT-large", 32, 256, _BERT),
            Group("BERT-large", 32, 128, _BERT),
            Group("Llama-2-7B", 1, 512, _CORE),
            Group("Llama-2-7B", 1, 8192, _CORE),
            Group("Llama-2-7B", 1, 1024, _CORE),
            Group("Llama-2-7B", 1, 4096, _CORE),
        ),
        "small": (
            Group("Llama-2-7B", 4, 512, _TOKENS_SMALL),
            Group("BERT-large", 4, 512, _BERT),
            Group("BERT-large", 16, 128, ("full", "full, 16 tokens", CKPT, "LoRA, 16 tokens")),
        ),
        "tiny": (Group("BERT-large", 2, 32, _BERT),),
    }),
    "lean": Suite("All three together", (CKPT, "full"), 3, {
        "full": (Group("Llama-2-7B", 2, 2048, _LEAN), Group("Llama-3.1-8B", 2, 2048, _LEAN)),
        "small": (
            Group("Llama-2-7B", 4, 512, _LEAN),
            Group("Llama-3.1-8B", 4, 512, (*_LEAN[:5], "QLoRA + checkpointing")),
        ),
        "tiny": (Group("Llama-2-7B", 2, 24, _LEAN),),
    }),
}  # fmt: skip
ACCURACY = "accuracy"
