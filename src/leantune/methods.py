"""The registry of methods: one row each. What each can do is not said here: see capabilities.json."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What a method is. What it can do stands in `capabilities.json`, which is made from tests that ran."""

    name: str
    key: str
    what: str
    paper: str
    card: str | None


METHODS: tuple[Method, ...] = (
    Method(
        name="lamda",
        key="lean.adapter.type: lamda",
        what="adapter B·S·A: spectral A frozen, r×r S trained, B frozen gradually",
        paper="Azizi et al. 2024, arXiv 2406.12832",
        card="src/leantune/lamda/README.md",
    ),
    Method(
        name="lamda++",
        key="lean.adapter: {type: lamda, spectral_ranks: {budget: 32}}",
        what="LaMDA with ranks by layer from the spectra of the pretrained weights, under one budget",
        paper="Azizi et al. 2024, arXiv 2406.12832",
        card="src/leantune/lamda/README.md",
    ),
    Method(
        name="bottleneck",
        key="lean.adapter.type: bottleneck",
        what="the Adapter: a small two-layer network behind (serial) or beside (parallel) a layer",
        paper="Houlsby et al. 2019, arXiv 1902.00751",
        card="src/leantune/bottleneck/README.md",
    ),
    Method(
        name="light-peft",
        key="lean.prune: {heads: 1/3, neurons: 1/3}",
        what="learn masks, then prune base and adapter for real; with any adapter; the base on disk stays",
        paper="Gu et al. 2024, arXiv 2406.03792",
        card="src/leantune/lightpeft/README.md",
    ),
    Method(
        name="tokentune",
        key="lean.tokens: {keep: 0.25}",
        what="back-propagate through chosen tokens; attention sees all; with any adapter or none",
        paper="Simoulin, Park et al. 2024, arXiv 2501.18824",
        card="src/leantune/tokentune/README.md",
    ),
    Method(
        name="lora",
        key="lean.adapter.type: lora",
        what="baseline: PEFT's LoRA; `variant: rslora`, `dora`, `adalora`, `vera`, `lora-fa` its relatives",
        paper="Hu et al. 2021, arXiv 2106.09685",
        card=None,
    ),
    Method(
        name="qlora",
        key="lean: {adapter: {type: lora}, quantize: nf4}",
        what="baseline: LoRA on a base in 4 bits; `quantize` goes with every adapter and with tokentune",
        paper="Dettmers et al. 2023, arXiv 2305.14314",
        card="docs/quantised.md",
    ),
    Method(
        name="full",
        key="lean.adapter.type: none",
        what="baseline: every weight is trained",
        paper="",
        card=None,
    ),
)
