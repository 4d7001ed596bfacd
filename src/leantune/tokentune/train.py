"""Pass 2: the chosen rows, with gradient, attending to the recorded keys and values of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from leantune.anatomy import Kernel, Side, is_sdpa
from leantune.tokentune.grouped import folded, folded_mask
from leantune.tokentune.passes import Call, Pass, current_pass, shadow, with_first
from leantune.tokentune.plan import Plan, hidden_of, replace_hidden
from leantune.tokentune.record import Recording
from leantune.tokentune.rows import Keep, Rows


class Training(Pass):
    """Pass 2: the chosen rows, with gradient, attending to all recorded keys.

    Args:
        plan: What is known about the model.
        recording: Of pass 1.
        rows: The choice, per side.
        merge: Give the head the full sequence (unchosen rows from pass 1, without gradient).
    """

    def __init__(self, plan: Plan, recording: Recording, rows: dict[Side, Rows], merge: bool = False) -> None:
        super().__init__(plan)
        self.recording, self.calls, self.sizes, self.rows = recording, recording.calls, recording.sizes, rows
        self.merged = recording.leaving if merge else None
        self._gathered: dict[Any, tuple[Tensor, Tensor]] = {}
        self._masks: dict[Any, Tensor] = {}

    def prepare(self, stack: ExitStack) -> None:
        """Relative biases of the chosen rows only; checkpointed code finds this pass again."""
        for module in self.plan.biased:
            shadow(stack, module, "compute_bias", self._bias_rows(module.compute_bias))
        for module in self.plan.checkpointers():
            original = module._gradient_checkpointing_func
            shadow(stack, module, "_gradient_checkpointing_func", self._replayable(original))

    def _bias_rows(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """T5's relative bias of the chosen rows: (batch, heads, k, n) out of (1, heads, n, n)."""

        def chosen(query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
            rows, n = self.rows[self.side()], self.sizes[self.side()][1]
            return rows.gather(compute(n, n, *args, **kwargs), 2)

        return chosen

    def _replayable(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Checkpointed code runs again in the backward pass, when this pass is long over: bring it back."""

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            place, live = (self.invocations, self.inside, self.calls_made), [True]

            def again(*inner: Any, **more: Any) -> Any:
                if live and current_pass.get() is self:
                    live.clear()
                    return function(*inner, **more)
                kept = (self.invocations, self.inside, self.calls_made)
                self.invocations, self.inside, self.calls_made = place
                try:
                    with self.active():
                        return function(*inner, **more)
                finally:
                    self._let_go(place[0] - 1)
                    self.invocations, self.inside, self.calls_made = kept

            return checkpoint(again, *args, **kwargs)

        return run

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Gather the chosen rows: hidden states before the first layer, other arguments before each."""
        super().enter(layer, args, kwargs)
        number, side, names = self.invocations - 1, self.side(), self.plan.names[self.invocations - 1]
        rows, (batch, n) = self.rows[side], self.sizes[side]
        hidden = hidden_of(args, kwargs, names)
        if self.plan.is_first(number):
            hidden = rows.gather(hidden, 1)
        if getattr(layer, "gradient_checkpointing", False):
            hidden = Keep.apply(hidden, *self._held_for(number))
        args, kwargs = self.plan.map_positions(
            self.invocations - 1, args, kwargs, batch, n, lambda x, axis: self._gather_shared(x, axis, side)
        )
        return replace_hidden(args, kwargs, names, hidden)

    def leave(self, layer: nn.Module, output: Any) -> Any:
        """After the last layer, the full sequence for heads that want it."""
        number, side = self.invocations - 1, self.side()
        self.inside = None
        self._let_go(number)
        if number != len(self.plan.sides) - 1 or (self.merged is None and not self.plan.full_tail):
            return output
        hidden = output if isinstance(output, Tensor) else output[0]
        return with_first(
            output, self.rows[side].merge(hidden, None if self.merged is None else self.merged[side])
        )

    def _held_for(self, number: int) -> list[Tensor]:
        """What this pass keeps for the replay of a layer: its K and V, or what they can be made from."""
        if not self.recording.rerunnable:
            calls = [call for (i, _), call in self.calls.items() if i == number]
            return [t for call in calls for t in (call.key, call.value) if t is not None]
        return [self.recording.starts[number][0]] if number in self.recording.starts else []

    def _let_go(self, number: int) -> None:
        if self.recording.rerunnable:
            for (i, _), call in self.calls.items():
                if i == number:
                    call.key = call.value = None

    def _recorded(self) -> Call:
        number = (self.inside or 0, self.calls_made)
        if self.calls[number].key is None:
            self.recording.rerun(self.plan.stretch(number[0]))
        return self.calls[number]

    def hand_over(self, output: Any) -> Any:
        """Give the head what it expects: chosen rows if it is tokenwise, else the full sequence.

        A head that looks its pooled position up reads nothing but chosen rows, so the others may be 0.
        """
        tokenwise = self.plan.pooling is None
        if self.plan.full_tail and tokenwise:
            return with_first(output, self.rows["decoder"].gather(output[0], 1))
        if self.plan.looks_up and not self.plan.full_tail:
            return with_first(output, self.rows["decoder"].merge(output[0]))
        return output

    def _gather_shared(self, x: Tensor, axis: int, side: Side) -> Tensor:
        """Rows of a tensor that many layers are given: gathered once, kept once."""
        if x.requires_grad:
            return self.rows[side].gather(x, axis)
        key = (_identity(x), axis, side)
        if key not in self._gathered:  # the source is kept, too, so that no other tensor takes its place
            self._gathered[key] = (x, self.rows[side].gather(x, axis))
        return self._gathered[key][1]

    def attend(
        self,
        kernel: Kernel,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        /,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Write the chosen rows' K and V into the recorded ones and attend to all of them."""
        if self.inside is None:
            return kernel(module, query, key, value, mask, **kwargs)
        call = self._recorded()
        assert call.key is not None and call.value is not None
        self.calls_made += 1
        rows, keys = self.rows[self.side()], self.rows[call.keys_from]
        full_key = keys.write(key, call.key)  # (batch, kv heads, n, d)
        full_value = keys.write(value, call.value)
        for name, recorded in call.rows.items():
            kwargs[name] = self._argument_rows(name, kwargs.get(name), recorded, rows, full_key.size(2))
        if "is_causal" in kwargs or call.causal:
            kwargs["is_causal"] = False  # the mask's rows say it
        groups = getattr(module, "num_key_value_groups", 1)
        fold = groups if is_sdpa(kernel) and not call.rows and query.size(1) == groups * key.size(1) else 1
        mask = self._mask_rows(call, rows, full_key, query.dtype if is_sdpa(kernel) else None, fold)
        if fold > 1:
            return folded(kernel, module, query, full_key, full_value, mask, fold, kwargs)
        return kernel(module, query, full_key, full_value, mask, **kwargs)

    def _argument_rows(self, name: str, given: Tensor | None, recorded: Tensor, rows: Rows, n: int) -> Tensor:
        """Rows of a bias or of relative positions; a bias that already has them (and a gradient) stays."""
        if name == "position_bias" and given is not None and given.shape[-2:] == (len(rows), n):
            return given
        return rows.gather(recorded, recorded.dim() - 2)

    def _mask_rows(
        self, call: Call, rows: Rows, key: Tensor, dtype: torch.dtype | None, fold: int
    ) -> Tensor | None:
        """The mask's rows for the chosen queries; made once and shared by all layers that share the mask.

        Args:
            call: With the mask (batch or 1, heads or 1, n or 1, n).
            rows: The queries.
            key: (batch, kv heads, n, d).
            dtype: Make a bool mask additive, in this dtype (SDPA would do so at every call, and keep each).
            fold: Query heads per key head, for `_folded`.

        Returns:
            (batch, heads or 1, fold · k, n), or None.
        """
        if call.mask is None and not call.causal:
            return None
        cached = (_identity(call.mask), key.size(2), fold)
        if cached not in self._masks:
            if call.mask is None:
                mask = (rows.index[:, :, None] >= torch.arange(key.size(2), device=key.device))[:, None]
            else:
                mask = call.mask if call.mask.size(-2) == 1 else rows.gather(call.mask, call.mask.dim() - 2)
            if dtype is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
            if fold > 1:
                mask = folded_mask(mask, fold)
            self._masks[cached] = mask
        return self._masks[cached]


def _identity(x: Tensor | None) -> Any:
    """What two views of the same numbers have in common, as long as their storage lives."""
    return None if x is None else (x.data_ptr(), x.shape, x.stride(), x.dtype)
