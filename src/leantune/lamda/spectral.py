"""LaMDA++: the spectra of a model's layers, and ranks from them, for LaMDA and for ordinary LoRA."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import Tensor, nn

from leantune.errors import UserError
from leantune.lamda.config import LamdaConfig
from leantune.lamda.init import Spectrum, energy_score, leading_spectrum, needs_spectrum
from leantune.lamda.progress import with_progress
from leantune.lamda.ranks import SpectralRanks, allocate


@dataclass(frozen=True)
class SpectralPattern:
    """Ranks by layer, from `spectral_rank_pattern`.

    Attributes:
        rank_pattern: For a PEFT config: layer name as an anchored regular expression -> rank.
        scores: Layer name -> energy score in [0, 1] that the ranks come from.
        budget: The rank that an equal treatment would have given to every layer.
    """

    rank_pattern: dict[str, int]
    scores: dict[str, float]
    budget: int

    def alpha_pattern(self, lora_alpha: float = 8, use_rslora: bool = False) -> dict[str, float]:
        """For a LoRA config: alphas that give every layer the scale of a layer of rank `budget`.

        LoRA scales by alpha / r (rsLoRA by alpha / sqrt(r)), so a `rank_pattern` alone also changes how
        strongly each layer learns. With these alphas the scale is lora_alpha / budget (lora_alpha /
        sqrt(budget)) everywhere.

        Args:
            lora_alpha: As in the LoRA config.
            use_rslora: As in the LoRA config.
        """
        power = 0.5 if use_rslora else 1.0
        return {key: lora_alpha * (rank / self.budget) ** power for key, rank in self.rank_pattern.items()}


def spectral_rank_pattern(
    model: nn.Module,
    budget: int,
    *,
    choices: Sequence[int] | None = None,
    target_modules: list[str] | str = "all-linear",
    exclude_modules: list[str] | str | None = None,
    task_type: str | None = None,
    more_rank_to: str = "spread",
    cost: Literal["linear", "square"] = "linear",
    seed: int = 0,
) -> SpectralPattern:
    """Ranks for each layer from the spectra of its pretrained weights, for an ordinary LoRA.

        pattern = leantune.spectral_rank_pattern(model, budget=8)
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear",
            rank_pattern=pattern.rank_pattern, alpha_pattern=pattern.alpha_pattern(16),
        )

    The rule is that of LaMDA++ (METHODS 1); `SpectralRanks` says how layers are scored and
    `leantune.lamda.ranks.allocate` how ranks are given out. `LamdaConfig(spectral_ranks=...)` does the same
    by itself.

    Args:
        model: The base model, before `get_peft_model`. Only its weights are read (quantised ones too).
        budget: The rank that every layer would have if they were treated alike.
        choices: Ranks to give out. Default: the budget times 1/2, 3/4, 1, 3/2 and 2.
        target_modules: As in the LoRA config, and it must be the same there.
        exclude_modules: As in the LoRA config.
        task_type: As in the LoRA config: "SEQ_CLS" leaves the classifier out of "all-linear".
        more_rank_to: "spread" or "concentrated".
        cost: What the budget limits: "linear" the trained parameters of LoRA, sum of r (d_in + d_out);
            "square" those of LaMDA, sum of r^2.
        seed: Of the randomised SVD.

    Returns:
        `SpectralPattern`. A `rank_pattern` without its `alpha_pattern` also changes each layer's scale.

    Raises:
        UserError: A value is out of range, no layer matches, or the model has an adapter already.
    """
    from leantune.lamda.model import LamdaModel

    if cost not in ("linear", "square"):
        raise UserError(f"cost={cost!r}: must be one of 'linear', 'square'")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("spectral_rank_pattern reads the base model: call it before an adapter is attached")
    config = LamdaConfig(
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        task_type=task_type,  # type: ignore[arg-type]
        spectral_ranks=SpectralRanks(budget, choices, more_rank_to),
        init="random",  # so that no more is computed than the scores need
        svd_seed=seed,
    )
    layers = targeted_layers(config, model)
    if not layers:
        raise UserError(f"target_modules={target_modules!r}: matches no layer of the model")
    matrices = {
        name: LamdaModel._new_layer(cast(Any, model), layer, name).base_matrix  # as the tuner reads weights
        for name, layer in layers.items()
    }
    return spectral_ranks(matrices, config, cost)[0]


def targeted_layers(config: LamdaConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter with this config will be put on, by name: PEFT's own rules."""
    _maybe_include_all_linear_layers(config, model)
    inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    return {
        name: module
        for name, module in model.named_modules()
        if name and not name.startswith(inside) and check_target_module_exists(config, name)
    }


def spectral_ranks(
    matrices: Mapping[str, Callable[[], Tensor]], config: LamdaConfig, cost: str = "square"
) -> tuple[SpectralPattern, dict[str, Spectrum]]:
    """Score the layers and share out the ranks.

    Args:
        matrices: Layer name -> how to get its weight (d_out, d_in); one is held at a time.
        config: With `spectral_ranks`.
        cost: See `spectral_rank_pattern`.

    Returns:
        Ranks and scores, and the singular vectors that the config's `init` will ask for (none, if none).

    Raises:
        UserError: A weight holds no values (it is on the meta device), or a layer is too small.
    """
    settings = config.spectral_ranks
    assert settings is not None
    scores, shapes, spectra = {}, {}, {}
    for name in with_progress(matrices, "spectra of the layers"):
        W = matrices[name]()
        if W.is_meta:
            raise UserError(f"spectral_ranks: the weight of layer {name!r} is on meta and has no spectrum")
        W = W.detach().to(torch.promote_types(W.dtype, torch.float32))  # once for both of the following
        spectrum = leading_spectrum(W, settings.budget, config)
        scores[name], shapes[name] = energy_score(W, spectrum.sigma, settings.budget), W.shape
        if needs_spectrum(config):
            spectra[name] = spectrum._replace(
                U=spectrum.U if config.init_b == "vectors" else None,
                V=spectrum.V if config.init == "svd" else None,
            )
    sides = {name: min(shape) for name, shape in shapes.items()}
    widths = {name: sum(shape) for name, shape in shapes.items()} if cost == "linear" else None
    ranks = allocate(scores, sides, settings, widths)
    pattern = {anchored(name): rank for name, rank in ranks.items()}
    return SpectralPattern(pattern, scores, settings.budget), spectra


def anchored(name: str) -> str:
    """A layer's full name as a key of `rank_pattern` that matches it and nothing else."""
    return f"^{re.escape(name)}"
