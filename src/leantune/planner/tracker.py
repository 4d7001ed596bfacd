"""The book of a training step's memory: which storages exist when, with no weight ever allocated.

Whatever depends on weights runs on fake tensors (shapes, dtypes, no numbers). Whatever does not (token ids,
masks, positions, the choice of tokens) is small and runs for real, so that code that looks at it takes the
branches that it takes in a real run. Both kinds are entered in the book when they appear and struck off when
their storage dies.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from leantune.planner.flops import attention_flops

# Results with more elements than this are fake even where nothing fake goes in: (n, n) masks of long rows.
LARGEST_REAL = 1 << 24

aten = torch.ops.aten
# What code asks a number for. Of a fake number it is only answered while methods are being attached.
_QUESTIONS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
_CONTIGUOUS = {aten._log_softmax.default, aten._softmax.default}
_ROW_MAJOR = {"memory_format": torch.contiguous_format}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class UnanswerableError(RuntimeError):
    """The model's code looks at a number that only real weights would give."""


@dataclass(frozen=True)
class Event:
    """A storage appears (bytes > 0) or dies (bytes < 0)."""

    key: int
    bytes: int
    phase: str


class Tracker(TorchDispatchMode):
    """Notes every storage that appears or dies while it is active.

    Attributes:
        fake: The mode in which parameters and what depends on them live.
        events: In order of time.
        phase: What is going on, as set by `during`; each event carries it.
        flops: Phase → floating-point operations of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.events: list[Event] = []
        self.phase = "before"
        self.flops: dict[str, int] = defaultdict(int)
        self._lenient = False
        self._keys: dict[int, int] = {}  # address of a living storage → its key
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._count = 0

    def enter(self, phase: str) -> None:
        """Name what happens from now on."""
        self.phase = phase

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name what happens inside."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def lenient(self) -> Iterator[None]:
        """Answer questions about fake numbers: comparisons agree, differences are 0.

        For code that verifies something on a tiny batch, whose answer cannot be known without weights.
        """
        self._lenient = True
        try:
            yield
        finally:
            self._lenient = False

    def key(self, tensor: Tensor) -> int:
        """The number under which the tensor's storage is in the book; entered now if it is not."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._keys:
            self._note(storage, address)
        return self._keys[address]

    def _note(self, storage: Any, address: int) -> None:
        key, size = self._count, storage.nbytes()
        self._count += 1
        self._keys[address] = key
        self.events.append(Event(key, size, self.phase))

        def died(_: Any) -> None:
            self._keys.pop(address, None)
            self._watched.pop(key, None)
            self.events.append(Event(key, -size, self.phase))

        self._watched[key] = weakref.ref(storage, died)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, fake or real, and enter what it returns."""
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        workspace = self._workspace(func, args)
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func in _QUESTIONS:
                return self._answer(func, tensors)
            result = self._fake(func, args, kwargs)
        elif _is_large(tensors, leaves, args):
            result = self._fake(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        self._count_flops(func, args, kwargs, result)
        for out in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(out, Tensor):
                self.key(out)
        del workspace
        return result

    def _workspace(self, func: Any, args: Any) -> Tensor | None:
        """The copy that a kernel makes for itself of what it cannot read as it lies in memory."""
        if func not in _CONTIGUOUS or args[0].is_contiguous():
            return None
        copied: Tensor = self.__torch_dispatch__(aten.clone.default, (), (args[0],), _ROW_MAJOR)
        return copied

    def _fake(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _INDEXING:
            args = (args[0], _numbered(args[1]), *args[2:])
        with self.fake:
            return func(*args, **kwargs)

    def _answer(self, func: Any, tensors: list[Tensor]) -> Any:
        if not self._lenient:
            raise UnanswerableError("the model's code looks at numbers that only real weights give")
        if func is aten._local_scalar_dense.default:
            return True if tensors[0].dtype == torch.bool else 0.0
        return True

    def _count_flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry:
            self.flops[self.phase] += flop_registry[packet](*args, **kwargs, out_val=result)
        else:
            self.flops[self.phase] += attention_flops(packet, args)

    def peak(
        self, start: int, stop: int | None = None, share: Callable[[int], float] | None = None
    ) -> tuple[int, list[int]]:
        """The largest sum of living storages between two events, and the keys alive then.

        Args:
            start: Number of the first event that counts.
            stop: Of the first that no longer does; None: to the end.
            share: Key → the part of the storage that this process holds.
        """
        held = share or (lambda key: 1.0)
        total = sum(event.bytes * held(event.key) for event in self.events[:start])
        best, at = total, start - 1
        for number, event in enumerate(self.events[start:stop], start):
            total += event.bytes * held(event.key)
            if total > best:
                best, at = total, number
        alive: dict[int, None] = {}
        born: set[int] = set()
        for event in self.events[: at + 1]:
            if event.key not in born:
                born.add(event.key)
                alive[event.key] = None
            else:
                alive.pop(event.key)
        return round(best), list(alive)


def _numbered(indices: Any) -> list[Tensor | None]:
    """Indices in which real masks are written as the positions that they select: those have a known count."""
    result: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        result += index.nonzero().unbind(1) if is_mask else [index]
    return result


def _is_large(tensors: list[Tensor], leaves: Iterable[Any], args: Any) -> bool:
    """Whether the result of an operation on real tensors would have too many elements."""
    for arg in args:
        is_shape = isinstance(arg, (list, tuple)) and arg and all(type(size) is int for size in arg)
        if is_shape and math.prod(abs(size) for size in arg) > LARGEST_REAL:
            return True
    if not tensors:
        return False
    try:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:  # no elementwise operation
        return max(tensor.numel() for tensor in tensors) > LARGEST_REAL
    return math.prod(shape) > LARGEST_REAL
