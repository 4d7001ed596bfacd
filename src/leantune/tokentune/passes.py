"""The two passes over one stack of layers.

    pass 1 (`Recording`), no gradient, all n tokens             pass 2 (`Training`), gradient, the k chosen

    h ──► layer ──► layer ── … ── last layer (K, V, stop)        h ─ gather ─► layer ──► layer ── … ──► head,
    loss
            │ K, V    │ K, V        │ K, V                                       │         │
            ▼         ▼             ▼                       K_G, V_G written into the recorded K, V;
        recorded, full length (batch, heads, n, d) ───────► k queries look at n keys, through their mask rows

Pass 1 is the ordinary forward. In pass 2 each attention call takes the recorded keys and values of all tokens
and overwrites the rows of the chosen ones with its own, which carry gradient: K = [sg K_Ḡ ; K_G] (METHODS
§3). Both passes run the model's own code with the model's own kernel; these classes act at three points,
before a layer, at an attention call and after a layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from leantune.anatomy import Kernel, Side, attention_handled_by, disentangled_forward
from leantune.errors import UserError
from leantune.tokentune.plan import Plan

current_pass: ContextVar[Pass | None] = ContextVar("leantune_tokentune_pass", default=None)


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


class Pass(ABC):
    """Where a forward stands: which invocation of a layer, which attention call inside it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.invocations = 0  # layers begun so far
        self.inside: int | None = None  # number of the invocation that runs now
        self.calls_made = 0  # attention calls in it

    @contextmanager
    def active(self) -> Iterator[None]:
        """Layers and attention calls report to this pass."""
        token = current_pass.set(self)
        try:
            with ExitStack() as stack:
                stack.enter_context(attention_handled_by(self.attend))
                for module in self.plan.disentangled:
                    shadow(stack, module, "forward", MethodType(disentangled_forward, module))
                self.prepare(stack)
                yield
        finally:
            current_pass.reset(token)

    def prepare(self, stack: ExitStack) -> None:  # noqa: B027 - not every pass has something to prepare
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

    @abstractmethod
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
    """Forward pre-hook of every layer; does nothing outside the two passes.

    Raises:
        UserError: A layer trains outside them, on all tokens: the head's forward was replaced or passed by.
    """
    current = current_pass.get()
    if current is None and layer.training and torch.is_grad_enabled():
        raise UserError(
            "TokenTune is attached, but the layers are trained on all tokens: something replaced the "
            "model's forward since (TRL's SFTTrainer does), or calls the model below its head. "
            "Call token_tune after it"
        )
    return None if current is None else current.enter(layer, args, kwargs)


def after_layer(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of every layer; does nothing outside the two passes."""
    current = current_pass.get()
    return None if current is None else current.leave(layer, output)


def after_base(base: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the model below the head; does nothing outside the two passes."""
    current = current_pass.get()
    return None if current is None else current.hand_over(output)


def with_first(output: Any, first: Tensor) -> Any:
    """A layer's or a model's output with another first entry."""
    if isinstance(output, Tensor):
        return first
    if isinstance(output, tuple):
        return (first, *output[1:])
    output[next(iter(output))] = first
    return output
