"""Rows of one batch through different adapters: `model(..., adapter_names=[...])`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


class MixedBatch(BaseTuner):
    """The part of a tuner that hands `adapter_names` down to its layers, and mends PEFT's unloading.

    It has no state of its own.
    """

    tuner_layer_cls: Any

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names=[...]` (one adapter a row, inference only) down to every adapted layer."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        # Beam search repeats every row in the decoder; an encoder sees the original batch.
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoded = self._encoder_modules()
        handles = []
        for module in self.modules():
            if isinstance(module, self.tuner_layer_cls | AuxiliaryTrainingWrapper):
                names = adapter_names if module in encoded else repeated
                hook = partial(_with_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        """PEFT's own takes what a `modules_to_save` wraps for one layer with a weight; it may be many."""
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _encoder_modules(self) -> set[nn.Module]:
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        if not isinstance(encoder, nn.Module) or encoder is self.model:
            return set()
        return set(encoder.modules())

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, self.tuner_layer_cls)]
        unknown = set(adapter_names) - {name for layer in layers for name in layer.r} - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")


def _with_adapter_names(
    module: nn.Module, args: Any, kwargs: Any, adapter_names: list[str]
) -> tuple[Any, Any]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def rows_by_adapter(
    x: Tensor, adapter_names: list[str], known: Any, merged: bool = False
) -> list[tuple[str, Tensor]]:
    """Which rows of a layer's input go through which of its adapters. Errors are in PEFT's words.

    Args:
        x: (batch, ..., d).
        adapter_names: One a row; `"__base__"` means none.
        known: Adapters of this layer (anything that knows `in`); rows of others, and those of `"__base__"`,
            are left out.
        merged: Whether an adapter is in the weight already.

    Raises:
        ValueError: There are not as many names as rows, or an adapter is merged.
    """
    if len(x) != len(adapter_names):
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )
    if merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(adapter_names):
        if name in known:
            rows.setdefault(name, []).append(row)
    return [(name, torch.tensor(numbers, device=x.device)) for name, numbers in rows.items()]
