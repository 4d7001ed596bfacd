"""One linear layer with its bottleneck adapters.

    serial      y = f(x) + s up(act(down(f(x))))        f: the frozen layer, d_in -> d_out
    parallel    y = f(x) + s up(act(down(x)))

    t (n, d) ── down ──► act ──► dropout ── up ──► s ──► (n, d_out)     t = f(x) or x
               (r × d)                  (d_out × r)

up is zero at the start, so the model starts as the base model, bit for bit. The adapter computes in the dtype
of what it reads, whatever the dtype of its parameters (float32, as PEFT wants them). For its backward pass t
has to be kept, and r numbers a token (2 r with an activation other than relu and tanh, 3 r with dropout).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from torch.nn import functional as F

from leantune.bottleneck.config import BottleneckConfig
from leantune.bottleneck.function import linear
from leantune.errors import UserError
from leantune.peft_methods import rows_by_adapter

# The same functions as under these names in transformers' ACT2FN.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
NOT_MERGEABLE = (
    "a bottleneck adapter is not linear, so it cannot be merged into the base weights; keep it as an "
    "adapter, or take it off with `unload()`"
)


class BottleneckLinear(nn.Module, BaseTunerLayer):
    """A linear layer (`nn.Linear`, `Conv1D`, quantised) with any number of bottleneck adapters.

    Args:
        base_layer: The layer that is adapted; its weight is never read nor changed.
    """

    adapter_layer_names = (
        "bottleneck_down",
        "bottleneck_down_bias",
        "bottleneck_up",
        "bottleneck_up_bias",
    )
    other_param_names = ("bottleneck_dropout", "r", "bottleneck_alpha", "scaling", "config")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None and out_features is not None  # noqa: PT018 - the model checked the type
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.bottleneck_down = nn.ParameterDict()  # (r, d_out) serial, (r, d_in) parallel
        self.bottleneck_down_bias = nn.ParameterDict()  # (r,); absent: zeros
        self.bottleneck_up = nn.ParameterDict()  # (d_out, r)
        self.bottleneck_up_bias = nn.ParameterDict()  # (d_out,); absent: zeros
        self.bottleneck_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.bottleneck_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.config: dict[str, BottleneckConfig] = {}
        self.merged_adapters = []

    # -- making an adapter -----------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, r: int, alpha: float, config: BottleneckConfig) -> None:
        """Add the adapter `adapter_name` of width `r` to this layer.

        Args:
            adapter_name: A new name, or an old one, which is replaced.
            r: Width of the bottleneck in this layer.
            alpha: The scale is alpha / r.
            config: The adapter's settings.
        """
        self.r[adapter_name] = r
        self.bottleneck_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / r
        self.config[adapter_name] = config
        dropout = config.bottleneck_dropout
        self.bottleneck_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self._add_parameters(adapter_name, r, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_parameters(self, adapter_name: str, r: int, config: BottleneckConfig) -> None:
        """Down as LoRA's A (Kaiming uniform: its product does not depend on the width), all else zero.

        With `init_weights=False` nothing is zero, for tests. On meta inside PEFT's `low_cpu_mem_usage`.
        """
        device, dtype = self._place()
        read = self.out_features if config.mode == "serial" else self.in_features
        down = torch.empty(r, read, dtype=dtype, device=device)
        up = torch.zeros(self.out_features, r, dtype=dtype, device=device)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        biases = (down.new_zeros(r), up.new_zeros(self.out_features))
        if not config.init_weights:
            nn.init.normal_(up, std=r**-0.5)
            for bias in biases:
                nn.init.normal_(bias, std=0.1)
        self.bottleneck_down[adapter_name] = nn.Parameter(down)
        self.bottleneck_up[adapter_name] = nn.Parameter(up)
        for tensors, bias in zip((self.bottleneck_down_bias, self.bottleneck_up_bias), biases, strict=True):
            if config.bottleneck_bias:
                tensors[adapter_name] = nn.Parameter(bias)
            elif adapter_name in tensors:
                del tensors[adapter_name]

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of a new adapter: the base's; the default dtype on quantised weights."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        whole = dtype is not None and dtype.is_floating_point and dtype.itemsize > 1
        return device, dtype if whole else torch.get_default_dtype()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move, but keep the dtypes: PEFT's version would round loaded float32 values to a bfloat16 base."""
        target = device if device is not None else self._place()[0]
        for tensors in (getattr(self, name) for name in self.adapter_layer_names):
            if adapter_name in tensors and tensors[adapter_name].device.type != "meta":
                tensors[adapter_name] = tensors[adapter_name].to(target)

    # -- use -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., d_in) -> (..., d_out), in the base layer's dtype.

        Adapters that are active together all read the same; what they add is summed.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        result = frozen = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            return self._mixed_forward(x, frozen, adapter_names)
        for adapter_name in self.active_adapters:
            if adapter_name in self.bottleneck_down:
                added = self.adapter_output(adapter_name, frozen if self._is_serial(adapter_name) else x)
                result = result + added.to(result.dtype)
        return result

    def _mixed_forward(self, x: Tensor, frozen: Tensor, adapter_names: list[str]) -> Tensor:
        """Each row of the batch through the adapter that is named for it; `"__base__"` means none."""
        result = frozen
        for adapter_name, rows in rows_by_adapter(x, adapter_names, self.bottleneck_down):
            read = (frozen if self._is_serial(adapter_name) else x)[rows]
            result = result.index_add(0, rows, self.adapter_output(adapter_name, read).to(result.dtype))
        return result

    def adapter_output(self, adapter_name: str, x: Tensor) -> Tensor:
        """What the adapter adds, s up(act(down(x))): (..., d) -> (..., d_out).

        In the dtype of x (under autocast, of autocast).

        Args:
            adapter_name: Which adapter.
            x: What it reads: the frozen layer's output if serial (d = d_out), else the layer's input.
        """
        activation = ACTIVATIONS[self.config[adapter_name].activation]
        z = linear(x, self.bottleneck_down[adapter_name], self.bottleneck_down_bias.get(adapter_name))
        h = self.bottleneck_dropout[adapter_name](activation(z))  # (..., r)
        added = linear(h, self.bottleneck_up[adapter_name], self.bottleneck_up_bias.get(adapter_name))
        scaling = self.scaling[adapter_name]
        return added if scaling == 1 else added * scaling

    @property
    def reads_output(self) -> bool:
        """Whether the (first) active adapter reads the frozen layer's output, not the layer's input."""
        return any(self._is_serial(name) for name in self.active_adapters[:1] if name in self.config)

    def _is_serial(self, adapter_name: str) -> bool:
        return self.config[adapter_name].mode == "serial"

    # -- what it cannot do -----------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible.

        Raises:
            UserError: Always.
        """
        raise UserError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Not possible, and never needed.

        Raises:
            UserError: Always.
        """
        raise UserError(NOT_MERGEABLE)

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()
