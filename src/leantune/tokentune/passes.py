"""The two passes over one stack of layers.

    pass 1 (`Recording`), no gradient, all n tokens             pass 2 (`Training`), gradient, the k chosen

    h ──► layer ──► layer ── … ── last layer (K, V, stop)        h ─ gather ─► layer ──► layer ── … ──► head, loss
            │ K, V    │ K, V        │ K, V                                       │         │
            ▼         ▼             ▼                       K_G, V_G written into the recorded K, V;
        recorded, full length (batch, heads, n, d) ───────► k queries look at n keys, through their mask rows

Pass 1 is the ordinary forward. In pass 2 each attention call takes the recorded keys and values of all tokens
and overwrites the rows of the chosen ones with its own, which carry gradient: K = [sg K_Ḡ ; K_G] (METHODS §3).
Both passes run the model's own code with the model's own kernel; these classes act at three points, before a
layer, at an attention call and after a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from leantune.anatomy import Kernel, Side, attention_handled_by, disentangled_forward, is_sdpa
from leantune.tokentune.plan import Plan, hidden_of, replace_hidden
from leantune.tokentune.rows import Keep, Rows

_current: ContextVar[Pass | None] = ContextVar("leantune_tokentune_pass", default=None)


@dataclass
class Call:
    """What pass 1 saw at one attention call.

    Attributes:
        key, value: (batch, kv heads, n, d), owned by the recording alone; None once they were let go.
        mask: (batch or 1, heads or 1, n or 1, n), bool or additive; None where there is none.
        causal: Whether the kernel was left to apply the causal rule itself.
        keys_from: Which sequence the keys belong to.
        rows: Other arguments whose rows belong to queries, by name.
    """

    key: Tensor | None
    value: Tensor | None
    mask: Tensor | None
    causal: bool
    keys_from: Side
    rows: dict[str, Tensor] = field(default_factory=dict)


class Stop(BaseException):
    """Leaves the last layer of pass 1 once its keys and values are known."""


class Pass:
    """Where a forward stands: which invocation of a layer, which attention call inside it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.invocations = 0  # layers begun so far
        self.inside: int | None = None  # number of the invocation that runs now
        self.calls_made = 0  # attention calls in it

    @contextmanager
    def active(self) -> Iterator[None]:
        """Layers and attention calls report to this pass."""
        token = _current.set(self)
        try:
            with ExitStack() as stack:
                stack.enter_context(attention_handled_by(self.attend))
                for module in self.plan.disentangled:
                    shadow(stack, module, "forward", MethodType(disentangled_forward, module))
                self.prepare(stack)
                yield
        finally:
            _current.reset(token)

    def prepare(self, stack: ExitStack) -> None:
        """Put further things in place for the duration of the pass."""

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Called before a layer; returns its arguments."""
        self.inside, self.calls_made = self.invocations, 0
        self.invocations += 1
        return args, kwargs

    def leave(self, layer: nn.Module, output: Any) -> Any:
        """Called after a layer; returns its output."""
        self.inside = None
        return output

    def hand_over(self, output: Any) -> Any:
        """Called with the base model's output, before the head reads it; returns it."""
        return output

    def side(self) -> Side:
        """The sequence that the running layer works on."""
        assert self.inside is not None
        return self.plan.sides[self.inside]

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
        """An attention call."""
        raise NotImplementedError


def shadow(stack: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """Set an instance attribute until the stack unwinds."""
    absent = object()
    before = module.__dict__.get(name, absent)
    module.__dict__[name] = value

    def restore() -> None:
        if before is absent:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = before

    stack.callback(restore)


def before_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of every layer; does nothing outside the two passes."""
    current = _current.get()
    return None if current is None else current.enter(layer, args, kwargs)


def after_layer(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of every layer; does nothing outside the two passes."""
    current = _current.get()
    return None if current is None else current.leave(layer, output)


def after_base(base: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the model below the head; does nothing outside the two passes."""
    current = _current.get()
    return None if current is None else current.hand_over(output)


class Recording(Pass):
    """Pass 1: the ordinary forward, without gradient, keeping K and V.

    Args:
        plan: What is known about the model.
        on_enter: Called with the side and the size (batch, n) when a sequence enters its first layer; may
            return how many leading positions are needed at all (causal models), else None.
        stop_early: Skip the last layer beyond its K and V.
        shrink: Hand the head one position, so that its work costs nothing (heads that do not pool).
        watch: Called at every attention call (for strategies that score tokens).
        rerunnable: Note what is needed to run stretches of layers again (`rerun`), so that K and V need not be
            kept until the backward pass; for gradient checkpointing.
    """

    def __init__(
        self,
        plan: Plan,
        on_enter: Callable[[Side, int, int, torch.device], int | None],
        stop_early: bool = True,
        shrink: bool = True,
        watch: Callable[[Recording, Kernel, nn.Module, Tensor, Call, dict[str, Any]], None] | None = None,
        rerunnable: bool = False,
    ) -> None:
        super().__init__(plan)
        self.on_enter, self.stop_early, self.shrink, self.watch = on_enter, stop_early, shrink, watch
        self.calls: dict[tuple[int, int], Call] = {}
        self.sizes: dict[Side, tuple[int, int]] = {}
        self.needed: dict[Side, int | None] = {}
        self.entering: dict[Side, Tensor] = {}  # hidden states before the side's last layer
        self.leaving: dict[Side, Tensor] = {}  # and after it
        self.rerunnable, self.rerunning = rerunnable, False
        self.starts: dict[
            int, tuple[Tensor, list[Tensor]]
        ] = {}  # stretch begins: hidden states, random state
        self.arguments: dict[
            int, tuple[tuple[Any, ...], dict[str, Any]]
        ] = {}  # of every layer, but its hidden states

    def prepare(self, stack: ExitStack) -> None:
        stack.enter_context(torch.no_grad())
        # autocast would keep the cast weights for pass 2, without their gradient
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        stack.callback(torch.set_autocast_cache_enabled, cached)
        for module in self.plan.biased:  # a rerun happens inside pass 2, which has its own
            shadow(stack, module, "compute_bias", MethodType(type(module).compute_bias, module))
        for module in self.plan.checkpointers():
            shadow(
                stack,
                module,
                "_gradient_checkpointing_func",
                lambda run, *args, **kwargs: run(*args, **kwargs),
            )
        if self.stop_early:
            last = self.plan.layers[-1]
            shadow(stack, last, "forward", self._stopping(last, last.forward))

    def _stopping(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except Stop:
                hidden = hidden_of(args, kwargs, self.plan.names[id(layer)])
                return hidden if self.plan.arity is None else (hidden, *[None] * (self.plan.arity - 1))

        return run

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        super().enter(layer, args, kwargs)
        if self.rerunning:
            return args, kwargs
        side, names = self.side(), self.plan.names[id(layer)]
        hidden = hidden_of(args, kwargs, names)
        first = side not in self.sizes
        if first:
            self.sizes[side] = (hidden.size(0), hidden.size(1))
            self.needed[side] = self.on_enter(side, hidden.size(0), hidden.size(1), hidden.device)
        needed = self.needed[side]
        if needed is not None:  # nothing after the last chosen position matters
            batch, n = self.sizes[side]
            args, kwargs = self.plan.map_positions(
                layer, args, kwargs, batch, n, lambda x, axis: x.narrow(axis, 0, needed)
            )
            if first:
                args, kwargs = replace_hidden(args, kwargs, names, hidden[:, :needed])
        if self.plan.is_last(self.invocations - 1):
            self.entering[side] = hidden_of(args, kwargs, names)
        if self.rerunnable:
            self._note(self.invocations - 1, args, kwargs, names)
        return args, kwargs

    def _note(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> None:
        hidden = hidden_of(args, kwargs, names)
        if self.plan.stretch(number).start == number:
            self.starts[number] = (hidden, _random_state(hidden.device))
        self.arguments[number] = replace_hidden(args, kwargs, names, hidden.new_empty(0))

    def rerun(self, stretch: range) -> None:
        """Run a stretch of layers again and record their K and V as the first time (dropout included)."""
        hidden, random_state = self.starts[stretch.start]
        devices = [hidden.device] if hidden.device.type == "cuda" else []
        self.invocations, self.rerunning = stretch.start, True
        try:
            with torch.random.fork_rng(devices=devices), self.active():
                _set_random_state(random_state, hidden.device)
                for number in stretch:
                    layer = self.plan.layers[number]
                    args, kwargs = replace_hidden(*self.arguments[number], self.plan.names[id(layer)], hidden)
                    output = layer(*args, **kwargs)
                    hidden = output if isinstance(output, Tensor) else output[0]
        finally:
            self.rerunning = False

    def leave(self, layer: nn.Module, output: Any) -> Any:
        number = self.invocations - 1
        side = self.side()
        self.inside = None
        if self.rerunning or not self.plan.is_last(number):
            return output
        hidden = output if isinstance(output, Tensor) else output[0]
        self.leaving[side] = hidden
        if self.shrink and not self.plan.full_tail and number == len(self.plan.sides) - 1:
            return _with_first(output, hidden[:, :1])
        return output

    def hand_over(self, output: Any) -> Any:
        """One position for the head, where that was not possible before."""
        return _with_first(output, output[0][:, :1]) if self.shrink and self.plan.full_tail else output

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
        if self.inside is None:
            return kernel(module, query, key, value, mask, **kwargs)
        number, self.calls_made = (self.inside, self.calls_made), self.calls_made + 1
        cross = self.plan.is_cross(*number)
        mask, kwargs = self._narrowed(mask, kwargs, cross)
        call = Call(
            key=_owned(key),
            value=_owned(value),
            mask=mask,
            causal=mask is None and is_sdpa(kernel) and _is_causal(module, kwargs) and query.size(2) > 1,
            keys_from="encoder" if cross else self.side(),
            rows={
                name: kwargs[name] for name in ("position_bias", "query_rows") if kwargs.get(name) is not None
            },
        )
        self.calls[number] = call
        if self.watch is not None and not self.rerunning:
            self.watch(self, kernel, module, query, call, kwargs)
        if self.stop_early and number == self.plan.last_call:
            raise Stop
        return kernel(module, query, call.key, call.value, mask, **kwargs)

    def _narrowed(
        self, mask: Tensor | None, kwargs: dict[str, Any], cross: bool
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The mask's part for the leading positions, where only those are computed."""
        needed = self.needed[self.side()]
        if needed is None or mask is None:
            return mask, kwargs
        n = self.sizes[self.side()][1]
        rows = slice(needed) if mask.size(-2) == n else slice(None)
        return mask[..., rows, : mask.size(-1) if cross else needed], kwargs


def _with_first(output: Any, first: Tensor) -> Any:
    """A layer's or a model's output with another first entry."""
    if isinstance(output, Tensor):
        return first
    if isinstance(output, tuple):
        return (first, *output[1:])
    output[next(iter(output))] = first
    return output


def _identity(x: Tensor | None) -> Any:
    """What two views of the same numbers have in common, as long as their storage lives."""
    return None if x is None else (x.data_ptr(), x.shape, x.stride(), x.dtype)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _owned(x: Tensor) -> Tensor:
    """`x`, copied if it is a view of something larger (fused QKV) or of something repeated (expanded heads)."""
    fits = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x.detach() if fits else x.detach().contiguous().clone()


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


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
                if live and _current.get() is self:
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
        super().enter(layer, args, kwargs)
        number, side, names = self.invocations - 1, self.side(), self.plan.names[id(layer)]
        rows, (batch, n) = self.rows[side], self.sizes[side]
        hidden = hidden_of(args, kwargs, names)
        if self.plan.is_first(number):
            hidden = rows.gather(hidden, 1)
        if getattr(layer, "gradient_checkpointing", False):
            hidden = Keep.apply(hidden, *self._held_for(number))
        args, kwargs = self.plan.map_positions(
            layer, args, kwargs, batch, n, lambda x, axis: self._gather_shared(x, axis, side)
        )
        return replace_hidden(args, kwargs, names, hidden)

    def leave(self, layer: nn.Module, output: Any) -> Any:
        number, side = self.invocations - 1, self.side()
        self.inside = None
        self._let_go(number)
        if number != len(self.plan.sides) - 1 or (self.merged is None and not self.plan.full_tail):
            return output
        hidden = output if isinstance(output, Tensor) else output[0]
        return _with_first(output, self.rows[side].merge(hidden, self.merged and self.merged[side]))

    def _held_for(self, number: int) -> list[Tensor]:
        """What this pass keeps for the replay of a layer: its K and V, or what they can be made from again."""
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
            return _with_first(output, self.rows["decoder"].gather(output[0], 1))
        if self.plan.looks_up and not self.plan.full_tail:
            return _with_first(output, self.rows["decoder"].merge(output[0]))
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
            return _folded(kernel, module, query, full_key, full_value, mask, fold, kwargs)
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
                mask = _fold_mask(mask, fold)
            self._masks[cached] = mask
        return self._masks[cached]


def _fold_mask(mask: Tensor, fold: int) -> Tensor:
    if mask.size(-2) == 1:
        return mask
    if mask.size(1) == 1:
        return mask.repeat(1, 1, fold, 1)
    return mask.unflatten(1, (-1, fold)).flatten(2, 3)


class _OneGroup:
    """The attention module as a kernel sees it when query heads are folded into rows."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.num_key_value_groups = 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _folded(
    kernel: Kernel,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    fold: int,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Grouped-query attention with the heads of a group as further rows of one head.

    The usual way expands K and V to the number of query heads, and SDPA keeps the expanded ones for its backward
    pass. Attention does not care which head a row came from, so nothing need be expanded.
    """
    batch, heads, k, d = query.shape
    query = query.reshape(batch, heads // fold, fold * k, d)
    output, _ = kernel(_OneGroup(module), query, key, value, mask, **kwargs)  # (batch, fold · k, kv heads, d)
    output = output.unflatten(1, (fold, k)).permute(0, 2, 3, 1, 4)  # (batch, k, kv heads, fold, d)
    return output.reshape(batch, k, heads, output.size(-1)), None
