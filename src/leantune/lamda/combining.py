"""Several LaMDA adapters as one: `model.add_weighted_adapter([...], [...], "name")`, exact."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor

from leantune.errors import UserError
from leantune.lamda.config import LamdaConfig
from leantune.lamda.layer import LamdaLinear
from leantune.lamda.spectral import anchored


class Combining(BaseTuner):
    """The part of `LamdaModel` that adds adapters up. It has no state of its own."""

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: Any,
    ) -> None:
        """Add the adapter whose output is the weighted sum of others' outputs, to rounding.

        Adapters with the same A (the same base, settings and seed) are added up at their own rank. Others are
        joined, and their ranks add up. The new adapter is not made active.

        Args:
            adapters: Names of adapters of this model.
            weights: One for each.
            adapter_name: Of the new adapter.
            combination_type: LoRA's name for the exact sum, `cat`. It has others, all of them approximations.
            **options: Of those others; there are none here.

        Raises:
            UserError: A name is unknown or taken, there are not as many weights as names, the combination is
                another, or an adapter has something beside its factors that cannot be added up: modules that
                it saves, rows of an embedding, biases.
        """
        if combination_type != "cat" or options:
            asked = {"combination_type": combination_type, **options}
            raise UserError(
                f"add_weighted_adapter: {', '.join(f'{key}={value!r}' for key, value in asked.items())}: "
                f"LaMDA has 'cat' alone, the exact sum; for another, export the adapters with "
                f"`leantune.save_as_lora` and combine those"
            )
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters or len(adapters) != len(weights):
            raise UserError(
                f"add_weighted_adapter: adapters={list(adapters)}, weights={list(weights)}: must be names "
                f"out of {list(self.peft_config)}, with a weight each"
            )
        if adapter_name in self.peft_config:
            raise UserError(f"add_weighted_adapter: adapter_name={adapter_name!r} is taken")
        self._refuse_what_has_no_sum(adapters)
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, LamdaLinear) and any(adapter in module.r for adapter in adapters)
        }
        sums = {name: _sum(layer, adapters, weights) for name, layer in layers.items()}
        config = _config(self.peft_config[adapters[0]], {name: len(A) for name, (_, A) in sums.items()})
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for name, (left, A) in sums.items():
            layers[name].set_product(adapter_name, left, A)
        self.set_adapter(self.active_adapters)

    def _refuse_what_has_no_sum(self, adapters: Sequence[str]) -> None:
        for adapter in adapters:
            for key in ("modules_to_save", "trainable_token_indices", "bias"):
                value = getattr(self.peft_config[adapter], key)
                if value and value != "none":
                    raise UserError(
                        f"add_weighted_adapter: adapter {adapter!r} has {key}={value!r}: what is trained "
                        f"beside the adapter has no weighted sum"
                    )


def _sum(layer: LamdaLinear, adapters: Sequence[str], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The sum as a product of (d_out, r) and (r, d_in)."""
    present = [(weight, name) for weight, name in zip(weights, adapters, strict=True) if name in layer.r]
    factors = [layer.lora_factors(name) for _, name in present]
    lefts = [weight * left for (weight, _), (left, _) in zip(present, factors, strict=True)]
    first = factors[0][1]
    if all(A.shape == first.shape and torch.equal(A, first) for _, A in factors):
        return torch.stack(lefts).sum(0), first
    return torch.cat(lefts, dim=1), torch.cat([A for _, A in factors])


def _config(first: Any, ranks: dict[str, int]) -> LamdaConfig:
    """The settings of the first, on these layers with these ranks, its factors to be filled in."""
    config = copy.copy(first)
    config.target_modules, config.exclude_modules = set(ranks), None
    config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {anchored(name): rank for name, rank in ranks.items()}
    config.alpha_pattern, config.lamda_alpha = {}, None
    config.spectral_ranks, config.spectral_scores = None, {}
    config.init, config.init_scale, config.init_b = "svd", "identity", "zero"
    config._from_file = True  # nothing is computed for it
    return config
