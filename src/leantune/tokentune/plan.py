"""What the two passes need to know about a model, found once when TokenTune is attached."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from leantune.anatomy import Pooling, Side, Stack, Task, position_axis

_CHECKPOINT = "_gradient_checkpointing_func"


@dataclass(eq=False)
class Plan:
    """The model's shape, as one ordinary forward showed it.

    Attributes:
        head: The model with its task head.
        task: What the head does.
        stacks: Encoder first.
        layers: The layer of each invocation, in order (a shared layer stands there several times).
        sides: Side of each invocation.
        calls: Attention calls in each invocation.
        arity: Length of the tuple that a layer returns; None if it returns a tensor.
        names: Positional parameter names of each invocation's forward.
        pooling: What feeds the head; None for tokenwise heads.
        disentangled: DeBERTa attention modules.
        biased: Modules with a learned relative bias (T5).
        parameters: Names of the head's forward parameters.
        has_special: Whether a row's first real token is special ([CLS]) and always chosen.
        truncates: Whether pass 1 may leave out what follows the last chosen position (causal models).
        full_tail: Whether what follows the last layer insists on the full length (GPT-2's `view`): it then
            gets it, with 0 on unchosen rows, and the rows are taken again before the head.
        shifts: Whether a causal LM's loss compares token t with label t + 1 (nearly all; some do not shift).
        reruns: Whether stretches of layers can be run again from their inputs alone.
    """

    head: PreTrainedModel
    task: Task
    stacks: tuple[Stack, ...]
    layers: tuple[nn.Module, ...]
    sides: tuple[Side, ...]
    calls: tuple[int, ...]
    arity: int | None
    names: tuple[list[str], ...]
    pooling: Pooling | None
    disentangled: tuple[nn.Module, ...]
    biased: tuple[Any, ...]
    parameters: frozenset[str]
    has_special: bool = False
    truncates: bool = False
    full_tail: bool = False
    shifts: bool = True
    reruns: bool = False

    @property
    def looks_up(self) -> bool:
        """Whether the head looks one position up in the full sequence (any but the first)."""
        return self.pooling is not None and self.pooling.name in ("last", "final", "eos")

    @property
    def last_call(self) -> tuple[int, int]:
        """Invocation and number of the last attention call of a forward."""
        return len(self.calls) - 1, self.calls[-1] - 1

    def is_first(self, number: int) -> bool:
        """Whether a sequence enters its stack at this invocation."""
        return self.sides.index(self.sides[number]) == number

    def is_last(self, number: int) -> bool:
        """Whether a sequence leaves its stack after this invocation."""
        return number == len(self.sides) - 1 or self.sides[number + 1] != self.sides[number]

    def is_cross(self, number: int, call: int) -> bool:
        """Whether this attention call's keys come from the encoder."""
        return len(set(self.sides)) > 1 and self.sides[number] == "decoder" and call > 0

    def stretch(self, number: int) -> range:
        """The stretch of layers around an invocation, about √(2L) of a side's L, that is run again as one.

        Each costs its input while it waits (n · hidden), and its layers' K and V while it is used.
        """
        side = [i for i, s in enumerate(self.sides) if s == self.sides[number]]
        size = math.ceil(math.sqrt(2 * len(side)))
        start = side[0] + (number - side[0]) // size * size
        return range(start, min(start + size, side[-1] + 1))

    def checkpointers(self) -> list[Any]:
        """Modules that run code through gradient checkpointing now."""
        modules = self.head.modules()
        return [
            m for m in modules if getattr(m, "gradient_checkpointing", False) and _CHECKPOINT in m.__dict__
        ]

    def map_positions(
        self,
        number: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch: int,
        length: int,
        take: Callable[[Tensor, int], Tensor],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Apply `take(tensor, axis)` to all per-position arguments of an invocation but its hidden states."""

        def mapped(name: str, value: Any) -> Any:
            return _mapped(name, value, batch, length, take)

        names = self.names[number]
        new = [a if i == 0 else mapped(names[i] if i < len(names) else "", a) for i, a in enumerate(args)]
        skip = names[0] if not args else None
        return tuple(new), {k: v if k == skip else mapped(k, v) for k, v in kwargs.items()}


# Not a closure that calls itself: that would be a ring through `take`, and all that a pass has recorded would
# stay in memory until Python's collector comes by.
def _mapped(name: str, value: Any, batch: int, length: int, take: Callable[[Tensor, int], Tensor]) -> Any:
    if isinstance(value, Tensor):
        axis = position_axis(name, value, batch, length)
        return value if axis is None else take(value, axis)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_mapped(name, v, batch, length, take) for v in value)
    if type(value) is dict:
        return {key: _mapped(name, v, batch, length, take) for key, v in value.items()}
    return value


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> Tensor:
    """A layer's hidden states (batch, n, d) among its arguments."""
    return args[0] if args else kwargs[names[0]]


def replace_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, names[0]: hidden}
