"""Bytes that autograd keeps between forward and backward: the same number on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class _Held:
    """What autograd holds in place of one saved tensor. It lives exactly as long as the graph needs it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_storages(forward: Callable[[], Any], exclude: Collection[int] = frozenset()) -> dict[int, int]:
    """Storages that autograd still holds when `forward` has returned.

    Args:
        forward: Runs one forward pass and returns whatever keeps its graph alive (a loss, an output).
        exclude: Addresses (`untyped_storage().data_ptr()`) that do not count.

    Returns:
        Address of each unique storage held → its size in bytes. A tensor that is saved and let go before
        the end (by a part of the graph that died) does not count; a storage saved twice counts once.
    """
    held: list[weakref.ref[_Held]] = []

    def pack(tensor: Tensor) -> _Held:
        # without its grad_fn: a node that saves its own output would keep itself alive, past every collector
        handle = _Held(tensor.detach())
        held.append(weakref.ref(handle))
        return handle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
        result = forward()
    alive = [handle.tensor for reference in held if (handle := reference()) is not None]
    storages: dict[int, int] = {}
    for tensor in (*alive, *_kept_by_functions(result)):
        for storage in storages_of(tensor):
            if storage.nbytes() and storage.data_ptr() not in exclude:
                storages[storage.data_ptr()] = storage.nbytes()
    del result
    return storages


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Give a tensor's storage; those of its parts where it is made of several (torchao's weights are)."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from storages_of(getattr(tensor, name))


def _kept_by_functions(result: Any) -> Iterator[Tensor]:
    """Tensors that autograd functions keep as plain attributes (bitsandbytes does), past every hook."""
    outputs = result.values() if isinstance(result, Mapping) else _listed(result)
    todo = [tensor.grad_fn for tensor in outputs if isinstance(tensor, Tensor)]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)
        kept = vars(node).values() if hasattr(node, "__dict__") else ()
        tensors = (one for value in kept for one in _listed(value) if isinstance(one, Tensor))
        yield from (one for one in tensors if one.is_floating_point())  # no random states


def _listed(value: Any) -> Collection[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def saved_activation_bytes(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Bytes that autograd holds after the forward pass of one training step.

    The sum of unique storages saved for backward, parameters and buffers left out. Deterministic: it does
    not depend on the allocator, on other processes or on the machine. The model's mode and random state are
    as before afterwards, and no gradient is computed.

    Args:
        model: A model that returns its loss when `batch` carries labels (or any output that needs grad).
        batch: Keyword arguments of the forward call, on the model's device.

    Returns:
        Size in bytes.
    """
    own = {s.data_ptr() for t in (*model.parameters(), *model.buffers()) for s in storages_of(t)}
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        with torch.random.fork_rng(devices=_devices(model)), torch.enable_grad():
            return sum(saved_storages(lambda: model(**batch), exclude=own).values())
    finally:
        for module, mode in modes.items():
            module.training = mode


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
