"""Starts from data: what A (and B0) span is read off the layer's inputs, or off the gradient of its weight.

A never moves, so what it spans bounds what can be learned. A few batches of the task, before training, say
more about that than the weight does. Beyond the paper; see README.md for what it brings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leantune.errors import UserError
from leantune.lamda.config import DATA_INITS, LamdaConfig
from leantune.lamda.init import Factors, arranged, seeded
from leantune.lamda.layer import LamdaLinear
from leantune.lamda.model import lamda_layers
from leantune.lamda.progress import with_progress
from leantune.lamda.sketch import GradientSketch, InputSketch, Sketch


def prepare_lamda(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    steps: int = 8,
    seed: int | None = None,
) -> None:
    """Give a LaMDA adapter with `init="activation"` or `init="gradient"` its start, from task data.

        model = get_peft_model(base, LamdaConfig(init="gradient", target_modules="all-linear"))
        leantune.prepare_lamda(model, train_dataloader)

    "activation": A takes the leading eigenvectors of the uncentred covariance of the layer's inputs, padding
    left out (`attention_mask`). "gradient": A takes the leading right singular vectors of dL/dW, summed over
    the batches, and B0 the left ones if `init_b="vectors"`. Weights are neither read nor changed, so they may
    be frozen and quantised. The adapter stays exactly zero. Loading a saved adapter needs none of this.

    Each batch is gone through twice. "activation" runs forward, in evaluation mode, and keeps nothing.
    "gradient" runs forward and backward, in training mode as the training will (gradient checkpointing, token
    selection), and keeps the inputs of the adapted layers, as full fine-tuning would. Several processes add
    up what they see of their own batches (as many in each) and get the same adapter.

    Args:
        model: A `PeftModel`, or a transformers model with the adapter; not trained yet.
        batches: Keyword arguments of `model`; with labels for "gradient". A data loader will do.
        adapter_name: Which adapter.
        steps: How many of the batches are used, at most.
        seed: Of the randomised range finder and of dropout. Default: the config's `svd_seed`.

    Raises:
        UserError: There is no such adapter, its start does not come from data, it has been trained, there is
            no batch or no loss, or a layer sees nothing of the batches (the message names it).
    """
    layers = {n: layer for n, layer in lamda_layers(model).items() if adapter_name in layer.r}
    config = _checked(getattr(model, "peft_config", {}).get(adapter_name), layers, adapter_name)
    device = next(model.parameters()).device
    used = [_on(device, batch) for batch in islice(batches, steps)]
    if not used:
        raise UserError("prepare_lamda: there is no batch to prepare the adapter with")
    seed = config.svd_seed if seed is None else seed
    make, run = _KINDS[config.init]
    generator = torch.Generator().manual_seed(seed)
    sketches: dict[LamdaLinear, Any] = {
        layer: make(layer, layer.r[adapter_name], generator) for layer in layers.values()
    }
    with _undisturbed(model, layers.values(), adapter_name), seeded(seed, device):
        for number, batch in enumerate(with_progress([*used, *used], f"LaMDA: start from {config.init}s"), 1):
            run(model, batch, sketches)
            if number % len(used) == 0:
                _end_pass(layers, sketches, config.init)
    for layer in layers.values():
        layer.set_factors(adapter_name, _factors(sketches[layer], config))
        layer.unprepared.pop(adapter_name, None)


def unprepared_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that wait for `prepare_lamda`."""
    layers = lamda_layers(model).values()
    names = [name for layer in layers for name in list(layer.unprepared) if layer.is_unprepared(name)]
    return list(dict.fromkeys(names))


def _checked(config: Any, layers: Mapping[str, LamdaLinear], adapter_name: str) -> LamdaConfig:
    if not isinstance(config, LamdaConfig) or not layers:
        raise UserError(f"adapter_name={adapter_name!r}: the model has no LaMDA adapter of that name")
    if config.init not in DATA_INITS:
        raise UserError(
            f"init={config.init!r}: the start of adapter {adapter_name!r} does not come from data; "
            f"prepare_lamda is for init={' or '.join(map(repr, DATA_INITS))}"
        )
    for name, layer in layers.items():
        if layer.lamda_S[adapter_name].any() or layer.joined_columns(adapter_name).any():
            raise UserError(
                f"adapter_name={adapter_name!r}: it has been trained (layer {name!r}); another start now "
                f"would change what it has learned"
            )
    return config


def _end_pass(layers: Mapping[str, LamdaLinear], sketches: Mapping[Any, Sketch], init: str) -> None:
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    for name, layer in layers.items():
        if shared:  # the sum over all processes' batches, and the same A everywhere
            dist.all_reduce(sketches[layer].total)
        if not sketches[layer].seen:
            what = "input" if init == "activation" else "gradient"
            raise UserError(
                f"init={init!r}: layer {name!r} got no {what} (or no finite one) from these batches; "
                f"leave it out with `exclude_modules`, or give more batches"
            )
        sketches[layer].end_pass()


def _factors(sketch: Any, config: LamdaConfig) -> Factors:
    U, sigma, V = sketch.triplets()
    return arranged(V[:0] if U is None else U, sigma, V, config)


def _on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@contextmanager
def _undisturbed(model: nn.Module, layers: Iterable[LamdaLinear], adapter_name: str) -> Iterator[None]:
    """Modes as they were afterwards; in here the adapter may be used although it has no A yet."""
    modes = [(module, module.training) for module in model.modules()]
    layers = list(layers)
    for layer in layers:
        layer.unprepared.pop(adapter_name, None)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for layer in layers:
            layer.unprepared[adapter_name] = True


# -- inputs --------------------------------------------------------------------------------------------------


def _like(layer: LamdaLinear) -> Tensor:
    """Work in float32 (float64 for a float64 model), where the layer is."""
    A = next(iter(layer.lamda_A.values()))
    return A.new_empty(0, dtype=torch.promote_types(A.dtype, torch.float32))


def _input_sketch(layer: LamdaLinear, r: int, generator: torch.Generator) -> InputSketch:
    return InputSketch(r, layer.in_features, generator, _like(layer))


@torch.no_grad()
def _run_forward(
    model: nn.Module, batch: dict[str, Any], sketches: Mapping[LamdaLinear, InputSketch]
) -> None:
    """Hand the inputs of every layer to its sketch, without padding."""
    mask = batch.get("attention_mask")

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        sketches[cast(LamdaLinear, layer)].add(_without_padding(args[0], mask))

    model.eval()
    with ExitStack() as hooks:
        for layer in sketches:
            hooks.callback(layer.register_forward_pre_hook(hook).remove)
        model(**batch)


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """(..., d) -> (n, d): real tokens, where the mask (batch, tokens) is of these rows; else all."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or mask.dim() != 2:
        return rows
    # Some models flatten (batch, tokens); others pool, or look at another sequence: no padding in there.
    fits = x.shape[:-1] == mask.shape or (x.dim() == 2 and len(x) == mask.numel())
    return rows[mask.reshape(-1).bool()] if fits else rows


# -- gradients -----------------------------------------------------------------------------------------------


class _Tap(torch.autograd.Function):
    """The identity on y = W x; in backward, hands x and dL/dy to a sketch.

    x is saved as autograd saves it, so that gradient checkpointing computes it again instead of keeping it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, sketch: GradientSketch) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sketch, ctx.anchor = sketch, anchor
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.sketch.add(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))
        return grad, None, torch.zeros_like(ctx.anchor), None


def _gradient_sketch(layer: LamdaLinear, r: int, generator: torch.Generator) -> GradientSketch:
    return GradientSketch(r, layer.in_features, layer.out_features, generator, _like(layer))


def _run_backward(
    model: nn.Module, batch: dict[str, Any], sketches: Mapping[LamdaLinear, GradientSketch]
) -> None:
    """Hand inputs and gradients of every layer to its sketch. No `.grad` is touched."""
    # Something that asks for a gradient at every layer: all weights are frozen.
    anchor = torch.zeros((), device=next(model.parameters()).device, requires_grad=True)

    def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _Tap.apply(output, args[0], anchor, sketches[cast(LamdaLinear, layer)])

    model.train()
    with ExitStack() as hooks, torch.enable_grad():
        for layer in sketches:
            hooks.callback(layer.register_forward_hook(hook).remove)
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise UserError("init='gradient': the model returns no loss; give batches with labels")
        torch.autograd.grad(loss, [anchor])


_KINDS: dict[str, tuple[Callable[..., Sketch], Callable[..., None]]] = {
    "activation": (_input_sketch, _run_forward),
    "gradient": (_gradient_sketch, _run_backward),
}
