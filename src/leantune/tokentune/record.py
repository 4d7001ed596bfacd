"""Pass 1: the ordinary forward without gradient, from which keys and values are recorded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from leantune.anatomy import Kernel, Side, is_sdpa
from leantune.tokentune.passes import Call, Pass, shadow, with_first
from leantune.tokentune.plan import Plan, hidden_of, replace_hidden


class Stop(BaseException):
    """Leaves the last layer of pass 1 once its keys and values are known."""


class Recording(Pass):
    """Pass 1: the ordinary forward, without gradient, keeping K and V.

    Args:
        plan: What is known about the model.
        on_enter: Called with the side and the size (batch, n) when a sequence enters its first layer; may
            return how many leading positions are needed at all (causal models), else None.
        stop_early: Skip the last layer beyond its K and V.
        shrink: Hand the head one position, so that its work costs nothing (heads that do not pool).
        watch: Called at every attention call (for strategies that score tokens).
        rerunnable: Note what is needed to run stretches of layers again (`rerun`), so that K and V need not
            be kept until the backward pass; for gradient checkpointing.
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
        """No gradient, no checkpointing, no autocast cache; the last layer stops early."""
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
                hidden = hidden_of(args, kwargs, self.plan.names[-1])
                return hidden if self.plan.arity is None else (hidden, *[None] * (self.plan.arity - 1))

        return run

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Note the sequence's size, and leave out what follows the last chosen position."""
        super().enter(layer, args, kwargs)
        if self.rerunning:
            return args, kwargs
        side, names = self.side(), self.plan.names[self.invocations - 1]
        hidden = hidden_of(args, kwargs, names)
        first = side not in self.sizes
        if first:
            self.sizes[side] = (hidden.size(0), hidden.size(1))
            self.needed[side] = self.on_enter(side, hidden.size(0), hidden.size(1), hidden.device)
        needed = self.needed[side]
        if needed is not None:  # nothing after the last chosen position matters
            batch, n = self.sizes[side]
            args, kwargs = self.plan.map_positions(
                self.invocations - 1, args, kwargs, batch, n, lambda x, axis: x.narrow(axis, 0, needed)
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
                    args, kwargs = replace_hidden(*self.arguments[number], self.plan.names[number], hidden)
                    output = layer(*args, **kwargs)
                    hidden = output if isinstance(output, Tensor) else output[0]
        finally:
            self.rerunning = False

    def leave(self, layer: nn.Module, output: Any) -> Any:
        """Note what leaves the last layer, and hand one position on where that is enough."""
        number = self.invocations - 1
        side = self.side()
        self.inside = None
        if self.rerunning or not self.plan.is_last(number):
            return output
        hidden = output if isinstance(output, Tensor) else output[0]
        self.leaving[side] = hidden
        if self.shrink and not self.plan.full_tail and number == len(self.plan.sides) - 1:
            return with_first(output, hidden[:, :1])
        return output

    def hand_over(self, output: Any) -> Any:
        """One position for the head, where that was not possible before."""
        return with_first(output, output[0][:, :1]) if self.shrink and self.plan.full_tail else output

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
        """Record K, V and mask, then attend as usual."""
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


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _owned(x: Tensor) -> Tensor:
    """`x`, copied if it is a view of something larger (fused QKV) or repeated (expanded heads)."""
    fits = x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x.detach() if fits else x.detach().contiguous().clone()


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)
