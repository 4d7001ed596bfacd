"""Quantised bases: how a recipe's `lean.quantize` is loaded, made trainable, and taken back.

Quantised are the linear layers inside the model's stack of layers. Embeddings, norms, poolers and heads stay
as they are: nothing is cast to float32, and products are computed in the model's dtype.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from leantune.anatomy import find_stacks
from leantune.errors import UserError
from leantune.measure.saved import storages_of
from leantune.peft_methods.quantised import dequantised_weight, logical_numel, make_trainable, packing


@dataclass(frozen=True)
class Kind:
    """A way to quantise.

    Attributes:
        package: Which has to be installed.
        options: Of its config in transformers.
        rounds_inputs: Whether evaluation rounds a layer's inputs as well: then outputs are not those of the
            dequantised weight.
    """

    package: str
    options: dict[str, Any]
    rounds_inputs: bool = False


_FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
KINDS: dict[str, Kind] = {
    "nf4": Kind("bitsandbytes", {**_FOUR_BITS, "bnb_4bit_quant_type": "nf4"}),
    "fp4": Kind("bitsandbytes", {**_FOUR_BITS, "bnb_4bit_quant_type": "fp4"}),
    "int8": Kind("bitsandbytes", {"load_in_8bit": True}, rounds_inputs=True),
    "int8-torchao": Kind("torchao", {}),
}


def check_installed(kind: str) -> None:
    """See that the library is there.

    Raises:
        UserError: It is not.
    """
    package = KINDS[kind].package
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"lean.quantize = {kind!r}: {package} is not installed; pip install 'leantune[quant]'"
        )


def loading_options(kind: str, auto_class: Any, config: PretrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` needs to quantise while it loads.

    Args:
        kind: A key of `KINDS`.
        auto_class: Of the model with its head.
        config: Of the model.

    Raises:
        UserError: The library is missing, the base is quantised on disk, or the model has no stack of layers.
    """
    check_installed(kind)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"lean.quantize = {kind!r}: the base is quantised already; start from a whole one")
    with torch.device("meta"):
        model = auto_class.from_config(config)
    return {"quantization_config": quantization_config(kind, _outside(model))}


def quantization_config(kind: str, skip: list[str]) -> Any:
    """transformers' config for a kind; `skip` are regular expressions of names that stay as they are."""
    options = KINDS[kind].options
    if KINDS[kind].package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip)
    from transformers import BitsAndBytesConfig

    # it says at every forward pass in evaluation what our card says: 8-bit layers round their inputs
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=skip)


class Code(NamedTuple):
    """Lines of Python: imports, before the base is loaded (they make `quantization`), and after."""

    imports: str
    before: str
    after: str = ""


def quantization_code(model: Any) -> Code:
    """How the same base is loaded without leantune."""
    config = model.hf_quantizer.quantization_config
    if config.quant_method == "torchao":
        imports = (
            "from torchao.quantization import Int8WeightOnlyConfig\nfrom transformers import TorchAoConfig"
        )
        skip = f"modules_to_not_convert={config.modules_to_not_convert!r}"
        return Code(imports, f"quantization = TorchAoConfig(Int8WeightOnlyConfig(), {skip})\n")
    kind = next(kind for kind in KINDS.values() if _same(kind, config))
    options = ", ".join(f"{key}={value!r}" for key, value in kind.options.items())
    options += f", bnb_4bit_compute_dtype={model.dtype}" if config.load_in_4bit else ""
    skip = f"llm_int8_skip_modules={config.llm_int8_skip_modules!r}"
    after = (
        "for module in base.modules():   # some CPUs would compute in another precision, and not train\n"
        '    if hasattr(module, "support_avx512bf16_for_cpu"):\n'
        "        module.support_avx512bf16_for_cpu = False\n"
    )
    return Code(
        "import torch\nfrom transformers import BitsAndBytesConfig",
        f"quantization = BitsAndBytesConfig({options}, {skip})\n",
        after if config.load_in_4bit else "",
    )


def _same(kind: Kind, config: Any) -> bool:
    return bool(kind.options) and all(getattr(config, key) == value for key, value in kind.options.items())


def _outside(model: nn.Module) -> list[str]:
    """Linear layers outside the stack: output head, classifier, pooler, projections of embeddings."""
    inside = tuple(f"{name}." for stack in find_stacks(model) for name in stack.names)  # type: ignore[arg-type]
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return [f"^{re.escape(name)}" for name in linear if not name.startswith(inside)]


def make_ready(model: nn.Module, kind: str) -> None:
    """What training needs of a base that was loaded with `loading_options`.

    Raises:
        UserError: Nothing in it was quantised.
    """
    layers = quantised_layers(model)
    if not layers:
        raise UserError(f"lean.quantize = {kind!r}: the model's layers hold no linear layer to quantise")
    for name, layer in layers.items():
        make_trainable(layer, name)
        if packing(layer) == "bnb 4bit":
            layer.compute_dtype, layer.compute_type_is_set = layer.weight.quant_state.dtype, True
        elif packing(layer) == "bnb 8bit":
            layer.compute_dtype = model.dtype  # where PEFT looks for the dtype of an adapter


def make_shareable(model: Any) -> None:
    """Show packed 4-bit weights as numbers of the model's dtype: FSDP2 shares out nothing but floats.

    The bits stay as they are; bitsandbytes unpacks them from any dtype (its `bnb_4bit_quant_storage`).
    """
    for layer in quantised_layers(model).values():
        weight = layer.weight
        weight.data = weight.data.flatten().view(model.dtype)[:, None]  # as (bytes / size of the dtype, 1)
        weight.quant_storage = model.dtype


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    """The quantised layers of a model, adapted or not, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        # PEFT's layers show the weight of the layer inside as their own
        if not isinstance(module, BaseTunerLayer) and packing(module) is not None
    }


def quantised_weights(model: nn.Module) -> int:
    """How many weights are held quantised."""
    return sum(logical_numel(layer.weight) for layer in quantised_layers(model).values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's weights take, scales and tables of quantised ones included."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for layer in quantised_layers(model).values():
        states = [getattr(layer.weight, "quant_state", None), getattr(layer, "state", None)]
        states.append(getattr(states[0], "state2", None))  # the scales' own scales
        tensors += [value for state in states if state is not None for value in vars(state).values()]
    storages = (one for tensor in tensors if isinstance(tensor, torch.Tensor) for one in storages_of(tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def dequantise(model: Any) -> None:
    """Put plain layers with the dequantised weights, in the model's dtype, in place of the quantised ones.

    Args:
        model: A base from `load_base`, without an adapter.
    """
    for name, layer in quantised_layers(model).items():
        model.set_submodule(name, _plain(layer, model.dtype))
    model.hf_quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(mark, None)


def _plain(layer: Any, dtype: torch.dtype) -> nn.Module:
    W = dequantised_weight(layer).to(dtype)  # (d_out, d_in)
    with torch.device("meta"):
        if getattr(layer, "source_cls", nn.Linear) is Conv1D:
            plain: nn.Module = Conv1D(*W.shape)
            W = W.T.contiguous()
        else:
            plain = nn.Linear(W.shape[1], W.shape[0], bias=layer.bias is not None)
    plain.weight = nn.Parameter(W, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    return plain
