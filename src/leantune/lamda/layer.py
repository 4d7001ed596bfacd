"""One linear layer with its LaMDA adapters.

    x (n, d_in) ──────────────── W ─────────────────────────────────┐
         │                                                          +── y (n, d_out)
         └── A ──► z ── dropout ──┬── dS ─────────► h ── B0 ──┐     │
           (r × d_in, fixed)      └── S0 + dS ────► v ── dB ──┴─ s ─┘
                                     (r × r)           (d_out × r)

    y = W x + s [ B0 dS + dB (S0 + dS) ] A x            A, S0, B0 fixed; dS = 0 and dB = 0 at the start

A, S0 and B0 are buffers, so nothing that PEFT does can make them trainable. dS (`lamda_S`) is trained to the
end. dB is split by columns: the first f are a buffer (`lamda_B_frozen`), the rest a parameter (`lamda_B`),
and gradual freezing moves columns from the one to the other. Files hold dB in one piece.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from leantune.errors import UserError
from leantune.lamda.config import DATA_INITS, LamdaConfig
from leantune.lamda.function import LowRank
from leantune.lamda.init import Factors, Spectrum, initial_factors
from leantune.lamda.merging import Merging
from leantune.peft_methods import rows_by_adapter


class FrozenColumns(BufferDict):
    """Buffers that are part of the state dict only while they hold something.

    A new adapter's state dict then has exactly the keys of a saved adapter file.
    """

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=buffer.shape[1] > 0)


class LamdaLinear(nn.Module, Merging):
    """A linear layer (`nn.Linear`, `Conv1D`, quantised) with any number of LaMDA adapters.

    Args:
        base_layer: The layer that is adapted; it is never changed, except by `merge`.
        quantization_backend: PEFT's access to the weight of a quantised layer, or None.
    """

    adapter_layer_names = ("lamda_S", "lamda_B")
    other_param_names = (
        "lamda_A",
        "lamda_S0",
        "lamda_B0",
        "lamda_B_frozen",
        "lamda_dropout",
        "r",
        "lamda_alpha",
        "scaling",
        "config",
        "held",
        "pending",
        "scheduled",
        "unprepared",
    )

    def __init__(self, base_layer: nn.Module, quantization_backend: Any = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None and out_features is not None  # noqa: PT018 - the model checked the type
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.lamda_A = BufferDict(persistent=True)  # (r, d_in), in the dtype of the base
        self.lamda_S0 = BufferDict(persistent=True)  # (r,); absent: ones
        self.lamda_B0 = BufferDict(persistent=True)  # (d_out, r); absent: zeros
        self.lamda_B_frozen = FrozenColumns()  # (d_out, f)
        self.lamda_S = nn.ParameterDict()  # (r, r)
        self.lamda_B = nn.ParameterDict()  # (d_out, r - f)
        self.lamda_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lamda_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.config: dict[str, LamdaConfig] = {}
        # Frozen columns that stay inside `lamda_B` because several processes share it; see freezing.py.
        self.held: dict[str, int] = {}
        # Adapters whose factors are expected from a file and are still NaN; see `materialize`.
        self.pending: dict[str, bool] = {}
        # Adapters whose A comes from data and is still zero; see `prepare_lamda`.
        self.unprepared: dict[str, bool] = {}
        # Adapters that a freezing schedule looks after.
        self.scheduled: dict[str, bool] = {}
        self.frozen_peft_weight_names = {}
        self.merged_adapters = []

    # -- making an adapter -----------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        alpha: float,
        config: LamdaConfig,
        name: str,
        spectrum: Spectrum | None = None,
    ) -> None:
        """Add the adapter `adapter_name` of rank `r` to this layer.

        Args:
            adapter_name: A new name, or an old one, which is replaced.
            r: Rank of this layer.
            alpha: The scale is alpha / r.
            config: The adapter's settings.
            name: The layer's name in the model, for messages.
            spectrum: Of the base weight, if it is known already.

        Raises:
            UserError: The rank is larger than the layer.
        """
        largest = min(self.in_features, self.out_features)
        # Of a file's adapter nothing is computed, and that of a pruned layer may be wider than the layer.
        if r > largest and not config.from_file:
            raise UserError(
                f"r={r} is above the size of layer {name!r} ({self.in_features} -> {self.out_features}): at "
                f"most {largest} there; lower `r`, give the layer its own rank in `rank_pattern`, or leave "
                f"it out with `exclude_modules`"
            )
        self.r[adapter_name] = r
        self.lamda_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / r
        self.config[adapter_name] = config
        self.held[adapter_name] = 0
        dropout = config.lamda_dropout
        self.lamda_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self._add_trained(adapter_name, r, config)
        self._add_fixed(adapter_name, r, config, spectrum)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_trained(self, adapter_name: str, r: int, config: LamdaConfig) -> None:
        """`lamda_S` and `lamda_B`: zeros, or random for tests. On meta inside PEFT's `low_cpu_mem_usage`."""
        device, dtype = self._place()
        S = torch.zeros(r, r, dtype=dtype, device=device)
        B = torch.zeros(self.out_features, r, dtype=dtype, device=device)
        if not config.init_weights:
            nn.init.normal_(S, std=r**-0.5)
            nn.init.normal_(B, std=self.out_features**-0.5)
        self.lamda_S[adapter_name] = nn.Parameter(S)
        self.lamda_B[adapter_name] = nn.Parameter(B)
        self.lamda_B_frozen[adapter_name] = B.new_empty(self.out_features, 0)

    def _add_fixed(self, adapter_name: str, r: int, config: LamdaConfig, spectrum: Spectrum | None) -> None:
        device, dtype = self._place()
        shapes: dict[str, tuple[int, ...]] = {"lamda_A": (r, self.in_features)}
        if config.init_scale != "identity":
            shapes["lamda_S0"] = (r,)
        if config.init_b == "vectors":
            shapes["lamda_B0"] = (self.out_features, r)
        from_data = config.init in DATA_INITS
        for attribute, shape in shapes.items():
            value = torch.full(shape, 0.0 if from_data else torch.nan, dtype=dtype, device=device)
            getattr(self, attribute)[adapter_name] = value
        if device.type == "meta":
            return  # nothing to compute from; whoever fills the base fills these
        if from_data:
            self.unprepared[adapter_name] = True
            return
        self.pending[adapter_name] = True
        expects_file = config.from_file or self.lamda_S[adapter_name].device.type == "meta"
        if not expects_file:
            self.materialize(adapter_name, spectrum)

    def materialize(self, adapter_name: str, spectrum: Spectrum | None = None) -> None:
        """Fill A, S0 and B0 of an adapter that was made in the expectation of a file and did not get one.

        An adapter whose config comes from a file starts with factors of NaN instead of a costly SVD that the
        file's factors would replace. Loading fills them; where nothing was loaded, this does, on first use.
        """
        if not self.pending.pop(adapter_name, False) or not self.lamda_A[adapter_name].isnan().any():
            return
        factors = initial_factors(
            self.base_matrix(), self.r[adapter_name], self.config[adapter_name], spectrum
        )
        self.set_factors(adapter_name, factors)

    def set_factors(self, adapter_name: str, factors: Factors) -> None:
        """Write those of A, S0 and B0 that the adapter has, in their own dtypes."""
        for attribute, value in (("lamda_A", factors.A), ("lamda_S0", factors.S0), ("lamda_B0", factors.B0)):
            buffers = getattr(self, attribute)
            if adapter_name in buffers:
                buffers[adapter_name] = value.to(buffers[adapter_name])

    def set_product(self, adapter_name: str, left: Tensor, A: Tensor) -> None:
        """Make a new adapter of scale 1 without S0 and B0 compute left A x: dS = 0, so B A x with S = 1.

        Args:
            adapter_name: Whose factors are not filled in yet.
            left: (d_out, r).
            A: (r, d_in).
        """
        self.pending.pop(adapter_name, None)
        self.lamda_A[adapter_name].copy_(A)
        self.lamda_S[adapter_name].zero_()
        self.lamda_B[adapter_name].copy_(left)

    def is_unprepared(self, adapter_name: str) -> bool:
        """Whether A should have come from data and did not, neither by `prepare_lamda` nor from a file."""
        if self.unprepared.get(adapter_name, False) and self.lamda_A[adapter_name].any():
            self.unprepared.pop(adapter_name)
        return self.unprepared.get(adapter_name, False)

    def _refuse_training_unprepared(self, adapter_name: str) -> None:
        trained = self.training and torch.is_grad_enabled() and self.lamda_S[adapter_name].requires_grad
        if trained and self.is_unprepared(adapter_name):
            raise UserError(
                f"init={self.config[adapter_name].init!r}: adapter {adapter_name!r} has seen no data yet and "
                f"could learn nothing; call leantune.prepare_lamda(model, batches) before the training"
            )

    def base_matrix(self) -> Tensor:
        """The base weight as (d_out, d_in)."""
        W = self.get_base_weight()
        return W.T if isinstance(self.get_base_layer(), Conv1D) else W

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of a new adapter: the base's; the default dtype on integer (quantised) weights."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return device, dtype if dtype is not None and dtype.is_floating_point else torch.get_default_dtype()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move, but keep the dtypes: PEFT's version would round loaded float32 values to a bfloat16 base."""
        target = device if device is not None else self._place()[0]
        names = (*self.adapter_layer_names, "lamda_A", "lamda_S0", "lamda_B0", "lamda_B_frozen")
        for tensors in (getattr(self, name) for name in names):
            if adapter_name in tensors and tensors[adapter_name].device.type != "meta":
                tensors[adapter_name] = tensors[adapter_name].to(target)

    def keep_projection_dtype(self, adapter_name: str) -> None:
        """Store A in the dtype of the base again, after PEFT cast the whole adapter to float32.

        A came from the base's dtype, so nothing is lost; and a product with a float32 A would need, and keep,
        a float32 copy of every input.
        """
        if adapter_name in self.lamda_A:
            self.lamda_A[adapter_name] = self.lamda_A[adapter_name].to(self._place()[1])

    # -- freezing --------------------------------------------------------------------------------------------

    def frozen_columns(self, adapter_name: str) -> int:
        """How many columns of B are frozen (held ones included)."""
        return self.lamda_B_frozen[adapter_name].shape[1] + self.held[adapter_name]

    @torch.no_grad()
    def split_columns(self, adapter_name: str, count: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Make the first `count` columns of B a buffer and the rest a new parameter; values stay as they are.

        Returns:
            The old and the new parameter `lamda_B`, (d_out, r - count). An optimizer has to be told.
        """
        old = self.lamda_B[adapter_name]
        B = self.joined_columns(adapter_name)
        new = nn.Parameter(B[:, count:].clone(memory_format=torch.contiguous_format))
        self.lamda_B_frozen[adapter_name] = B[:, :count].clone(memory_format=torch.contiguous_format)
        self.lamda_B[adapter_name] = new
        if count == self.r[adapter_name]:
            self.frozen_peft_weight_names[adapter_name] = ("lamda_B",)  # `set_adapter` leaves it frozen
        else:
            self.frozen_peft_weight_names.pop(adapter_name, None)
        new.requires_grad_(count < self.r[adapter_name] and self.lamda_S[adapter_name].requires_grad)
        return old, new

    def joined_columns(self, adapter_name: str) -> Tensor:
        """The whole of dB, (d_out, r)."""
        return torch.cat([self.lamda_B_frozen[adapter_name], self.lamda_B[adapter_name].detach()], dim=1)

    # -- use -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., d_in) -> (..., d_out), in the base layer's dtype."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_forward(x, *args, adapter_names=adapter_names, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        for adapter_name in self.active_adapters:
            if adapter_name in self.lamda_S:
                result = result + self.adapter_output(adapter_name, x).to(result.dtype)
        return result

    def _mixed_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Each row of the batch through the adapter that is named for it; `"__base__"` means none."""
        rows_of = rows_by_adapter(x, adapter_names, self.lamda_S, self.merged)
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name, rows in rows_of:
            result = result.index_add(0, rows, self.adapter_output(adapter_name, x[rows]).to(result.dtype))
        return result

    def adapter_output(self, adapter_name: str, x: Tensor) -> Tensor:
        """What the adapter adds, s [ B0 dS + dB (S0 + dS) ] A x: (..., d_in) -> (..., d_out).

        In the dtype of x (under autocast, of autocast).
        """
        if self.pending:
            self.materialize(adapter_name)
        if self.unprepared:
            self._refuse_training_unprepared(adapter_name)
        # Cast A, not x: a cast copy of x would be kept for every layer.
        z = F.linear(x, self.lamda_A[adapter_name].to(x.dtype))  # (..., r)
        return LowRank.apply(
            self.lamda_dropout[adapter_name](z),
            self.lamda_S[adapter_name],
            self.lamda_B[adapter_name],
            self._fixed("lamda_S0", adapter_name),
            self._fixed("lamda_B0", adapter_name),
            self.lamda_B_frozen[adapter_name],
            self.scaling[adapter_name],
            self.held[adapter_name],
        )

    def _fixed(self, attribute: str, adapter_name: str) -> Tensor | None:
        return dict(getattr(self, attribute).items()).get(adapter_name)

    def __repr__(self) -> str:
        return "lamda." + super().__repr__()
