"""The registry of methods: one row each. `leantune methods` and the README's table are made from it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """What a method is and what it can do; the tests' settings table checks the claims."""

    name: str
    key: str
    what: str
    paper: str
    card: str | None
    tasks: tuple[str, ...]
    can: dict[str, bool] = field(default_factory=dict)


ALL_TASKS = ("classification", "regression", "causal-lm")
# What a run with the method can do; a missing key means no.
ABILITIES = ("resume", "bf16", "checkpointing", "quantised", "export lora", "export merged", "export pruned")
WHOLE = ABILITIES[:-1]  # all that a method can do that does not prune


def _can(*names: str) -> dict[str, bool]:
    return {name: name in names for name in ABILITIES}


METHODS: tuple[Method, ...] = (
    Method(
        name="lamda",
        key="lean.adapter.type: lamda",
        what="adapter B·S·A: spectral A frozen, r×r S trained, B frozen gradually",
        paper="Azizi et al. 2024, arXiv 2406.12832",
        card="src/leantune/lamda/README.md",
        tasks=ALL_TASKS,
        can=_can(*WHOLE),
    ),
    Method(
        name="bottleneck",
        key="lean.adapter.type: bottleneck",
        what="the Adapter: a small two-layer network behind (serial) or beside (parallel) a layer",
        paper="Houlsby et al. 2019, arXiv 1902.00751",
        card="src/leantune/bottleneck/README.md",
        tasks=ALL_TASKS,
        can=_can("resume", "bf16", "checkpointing", "quantised"),
    ),
    Method(
        name="light-peft",
        key="lean.prune: {heads: 1/3, neurons: 1/3}",
        what="learn masks, then prune base and adapter for real; with any adapter; the base on disk stays",
        paper="Gu et al. 2024, arXiv 2406.03792",
        card="src/leantune/lightpeft/README.md",
        tasks=ALL_TASKS,
        can=_can("resume", "bf16", "checkpointing", "export lora", "export pruned"),
    ),
    Method(
        name="tokentune",
        key="lean.tokens: {keep: 0.25}",
        what="back-propagate through chosen tokens; attention sees all; with any adapter or none",
        paper="Simoulin, Park et al. 2024, arXiv 2501.18824",
        card="src/leantune/tokentune/README.md",
        tasks=ALL_TASKS,
        can=_can(*WHOLE),
    ),
    Method(
        name="lora",
        key="lean.adapter.type: lora",
        what="baseline: PEFT's LoRA",
        paper="Hu et al. 2021, arXiv 2106.09685",
        card=None,
        tasks=ALL_TASKS,
        can=_can(*WHOLE),
    ),
    Method(
        name="full",
        key="lean.adapter.type: none",
        what="baseline: every weight is trained",
        paper="",
        card=None,
        tasks=ALL_TASKS,
        can=_can("resume", "bf16", "checkpointing", "export merged"),
    ),
)
