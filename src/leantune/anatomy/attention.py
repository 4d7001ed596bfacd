"""Where a model's attention can be intercepted, whatever its architecture.

transformers' models look their kernel up at every attention call,

    interface = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)
    output, weights = interface(module, query, key, value, mask, dropout=..., scaling=...)

so one wrapper around that look-up sees every call of every model that takes part, with the kernel that the
user configured still in hand. Three things lie outside and get a small hook each: T5's relative position bias
(computed from lengths), and DeBERTa's disentangled attention (no interface at all; see `deberta.py`).
Nothing is installed while no handler is active, and a handler is active in its own thread and context only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Kernel = Callable[..., tuple[Tensor, Tensor | None]]


class Handler(Protocol):
    """What takes the place of a kernel: it is given the kernel and the call's arguments."""

    def __call__(
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
        """Query (batch, heads, q, d), key and value (batch, kv heads, n, d) → as the kernel returns."""


_handler: ContextVar[Handler | None] = ContextVar("leantune_attention_handler", default=None)
_lock = threading.Lock()
_active = 0


def current_handler() -> Handler | None:
    """The handler of this context, or None."""
    return _handler.get()


@contextmanager
def attention_handled_by(handler: Handler) -> Iterator[None]:
    """Inside this context, `handler` is called in place of every attention kernel looked up."""
    token = _handler.set(handler)
    _install()
    try:
        yield
    finally:
        _uninstall()
        _handler.reset(token)


def is_sdpa(kernel: Kernel) -> bool:
    """Whether the kernel is transformers' own `sdpa` (whose conventions for masks are known)."""
    return kernel is sdpa_attention_forward


def _install() -> None:
    global _active
    with _lock:
        _active += 1
        if _active == 1:
            ALL_ATTENTION_FUNCTIONS.__dict__["get_interface"] = _get_interface


def _uninstall() -> None:
    global _active
    with _lock:
        _active -= 1
        if _active == 0:
            ALL_ATTENTION_FUNCTIONS.__dict__.pop("get_interface", None)


def _get_interface(implementation: str, default: Kernel) -> Kernel:
    kernel = type(ALL_ATTENTION_FUNCTIONS).get_interface(ALL_ATTENTION_FUNCTIONS, implementation, default)
    handler = _handler.get()
    if handler is None:
        return kernel

    def handled(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        return handler(kernel, module, query, key, value, attention_mask, **kwargs)

    return handled
