"""Bytes that autograd keeps between forward and backward: the same number on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


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
        handle = _Held(tensor)
        held.append(weakref.ref(handle))
        return handle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
        result = forward()
    storages: dict[int, int] = {}
    for reference in held:
        handle = reference()
        if handle is None:
            continue
        storage = handle.tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in exclude:
            storages[storage.data_ptr()] = storage.nbytes()
    del result
    return storages


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
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
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
