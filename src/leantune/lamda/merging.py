"""A LaMDA layer's adapter as a matrix: into the base weight and out again, or as a LoRA."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from leantune.errors import UserError


class Merging(BaseTunerLayer):
    """The part of `LamdaLinear` that turns adapters into weights. It has no state of its own."""

    # What it uses of the layer, which has these.
    scaling: dict[str, float]
    lamda_A: Any  # noqa: N815
    lamda_S: Any  # noqa: N815
    materialize: Any
    joined_columns: Any
    _fixed: Any

    @torch.no_grad()
    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The adapter as the product of two matrices: (d_out, r) with the scale inside, and A (r, d_in).

        In float64 (float32 where the device has none), so that merging and exporting round only once.
        """
        self.materialize(adapter_name)
        wide = torch.float32 if self.lamda_S[adapter_name].device.type == "mps" else torch.float64
        dS, dB = self.lamda_S[adapter_name].to(wide), self.joined_columns(adapter_name).to(wide)
        S0, B0 = self._fixed("lamda_S0", adapter_name), self._fixed("lamda_B0", adapter_name)
        S = dS + torch.diag(torch.ones_like(dS[0]) if S0 is None else S0.to(wide))
        left = dB @ S
        if B0 is not None:
            left = left + B0.to(wide) @ dS
        return self.scaling[adapter_name] * left, self.lamda_A[adapter_name].to(wide)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, in that weight's shape; float64 (see `lora_factors`)."""
        left, A = self.lora_factors(adapter_name)
        delta = left @ A
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters into the base weight.

        Args:
            safe_merge: Check the result for NaN and infinity before it replaces the weight.
            adapter_names: Which; default: the active ones.

        Raises:
            ValueError: The base is quantised, or `safe_merge` found a broken adapter.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.lamda_S:
                self._add_to_weight(adapter_name, sign=1, safe=safe_merge)
                self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again (equal to the old weight up to rounding)."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", UserWarning, stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            if adapter_name in self.lamda_S:
                self._add_to_weight(adapter_name, sign=-1)

    def _add_to_weight(self, adapter_name: str, sign: int, safe: bool = False) -> None:
        if self.quantization_backend is not None:
            raise UserError(
                f"a LaMDA adapter cannot be merged into a {self.quantization_backend.backend_name} layer: "
                f"rounding to so few values would lose it; merge into the unquantised base, or export as LoRA"
            )
        weight = cast(Tensor, self.get_base_layer().weight)
        delta = self.get_delta_weight(adapter_name)
        merged = (weight.data.to(delta.dtype) + sign * delta).to(weight.dtype)
        if safe and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
            )
        weight.data = merged

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Always: it is one (see `lora_factors`)."""
        return True
