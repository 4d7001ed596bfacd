"""What a layer keeps for the backward pass, read off its modules: the numbers behind the closed form.

Per token (h hidden size, q width of all heads together, f width of the feed-forward block):

    attention       4 q        queries, keys and values (expanded to all heads), result
    norms           h each     their input, in float32 inside an RMS norm; once more if its weight is trained
    activation      f          its input; of a gated block gate, activated gate and the other branch: 3 f
    linear layers   h, h, f    what q/k/v, the block and its last layer read: if they are trained or carry
                               an adapter that needs it (LoRA, in its own dtype; not LaMDA, which keeps r)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from leantune.anatomy import Group, find_head, find_stacks, is_disentangled
from leantune.lamda.layer import LamdaLinear
from leantune.planner.setting import Setting

_FLOAT = 4  # bytes of float32
# Activations written out in Python keep their steps; ReLU keeps its result, which the next layer reads.
_STEPS = {"gelu_new": 4, "gelu_fast": 4, "relu": 0}


@dataclass(frozen=True)
class Layer:
    """Bytes a token that one layer keeps."""

    kept: int = 0
    keys: int = 0  # keys and values as attention has them
    wide: int = 0  # the widest thing in it
    heads: int = 0  # how many (no bytes)

    def __add__(self, other: Layer) -> Layer:
        return Layer(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Shapes:
    """What the formulas need to know of a model with its methods.

    Attributes:
        weights: Bytes of parameters and buffers.
        trained_bytes: Of trained parameters.
        parameters, trained: Numbers of them.
        hidden: Bytes a token of what one layer hands to the next.
        layers: In order.
        fused: Whether attention never has all its scores in memory.
        vocabulary: Of a head over all tokens, else 0.
        products: Weights of the layers' linear maps: multiply-adds a token.
        head_products: Of the output head.
    """

    weights: int
    trained_bytes: int
    parameters: int
    trained: int
    hidden: int
    layers: tuple[Layer, ...]
    fused: bool
    vocabulary: int
    products: int
    head_products: int

    @property
    def all(self) -> Layer:
        """All layers together."""
        return sum(self.layers, Layer())


def read_shapes(model: nn.Module, groups: tuple[Group, ...], setting: Setting) -> Shapes:
    """Read the shapes of a model with its methods.

    Args:
        model: On any device; only shapes are looked at.
        groups: Of its base, before anything was attached.
        setting: What it was made for.
    """
    head, text = find_head(model), setting.config.get_text_config()
    layers = [layer for stack in find_stacks(head) for layer in stack.layers]
    size, hidden = setting.dtype.itemsize, text.hidden_size
    projections = {id(_base(head.get_submodule(cut.module))) for group in groups for cut in group.outputs}
    read = [_plain(layer, hidden, size, projections) for layer in layers]
    for group in groups:
        read[group.layer] += _of_group(head, group, setting)
    trained = [p for p in model.parameters() if p.requires_grad]
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    linear = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2)
    vocabulary = text.vocab_size if setting.recipe.model.task == "causal-lm" else 0
    return Shapes(
        weights=sum(t.numel() * t.element_size() for t in held),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in trained),
        hidden=hidden * size,
        layers=tuple(read),
        fused=_is_fused(head, setting),
        vocabulary=vocabulary,
        products=linear,
        head_products=vocabulary * hidden,
    )


def _is_fused(head: nn.Module, setting: Setting) -> bool:
    """Whether attention's kernel keeps no scores; the CPU's cannot drop any of them out."""
    config: Any = head.config
    names = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
    drops = any(getattr(config.get_text_config(), name, 0) for name in names)
    eager = config._attn_implementation == "eager" or any(is_disentangled(m) for m in head.modules())
    return not eager and (setting.device == "cuda" or not drops)


def _plain(layer: nn.Module, hidden: int, size: int, projections: set[int]) -> Layer:
    """Norms, dropout, and what linear layers other than the output projections read."""
    kept, seen = 0, set()
    inside: tuple[str, ...] = ()
    for name, module in layer.named_modules():
        if name.startswith(inside or ("\0",)):
            continue  # part of an adapted layer
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        kind = type(module).__name__
        if "Norm" in kind:
            kept += hidden * _FLOAT + hidden * size * _is_trained(module) if "RMS" in kind else hidden * size
        elif isinstance(module, nn.Dropout) and module.p and ".self." not in name and "attn_drop" not in name:
            kept += hidden
        elif _is_linear(module):
            kept += _rank_bytes(module, size)
            need = _input_bytes(module, size)
            place = (name.rpartition(".")[0], _width(module), need)
            if id(_base(module)) not in projections and (need > size or place not in seen):
                kept += need * _width(module)
            seen.add(place)
    return Layer(kept=kept, wide=hidden * size)


def _of_group(head: nn.Module, group: Group, setting: Setting) -> Layer:
    """What heads or neurons keep, and what their output projection reads."""
    size, kept, keys = setting.dtype.itemsize, 0, 0
    module = head.get_submodule(group.outputs[0].module)
    width, need = _width(module), _input_bytes(module, size)
    if group.kind == "heads":
        kept = 4 * width * size + (need * width if need > size else 0)  # uncast, it is the result itself
        keys = 2 * width * size
    else:
        config: Any = setting.config.get_text_config()
        names = ("hidden_act", "activation_function", "activation")
        activation = next((getattr(config, n) for n in names if getattr(config, n, None)), "")
        gated = sum(len(cut.blocks) for cut in group.cuts if cut.axis == "out") > 1
        kept = (3 if gated else _STEPS.get(activation, 1)) * width * size + need * width
    if setting.stage == "estimate":
        kept += width * size  # before and after the mask
    return Layer(kept=kept, keys=keys, wide=width * size, heads=group.count * (group.kind == "heads"))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | BaseTunerLayer)


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _width(module: nn.Module) -> int:
    base: Any = _base(module)
    return int(base.nx if isinstance(base, Conv1D) else base.in_features)


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _input_bytes(module: nn.Module, size: int) -> int:
    """Bytes of each number of its input that the layer keeps."""
    if isinstance(module, LamdaLinear):
        return 0
    if isinstance(module, BaseTunerLayer):
        reads = getattr(module, "reads_output", False)  # a serial bottleneck reads what comes out
        adapters = [
            p for name, p in module.named_parameters() if p.requires_grad and "base_layer" not in name
        ]
        return 0 if reads or not adapters else max(p.element_size() for p in adapters)
    return size if _is_trained(module) else 0


def _rank_bytes(module: nn.Module, size: int) -> int:
    """Bytes of the adapter's inside."""
    ranks = getattr(module, "r", None)
    if not isinstance(module, BaseTunerLayer) or not isinstance(ranks, dict):
        return 0
    return sum(ranks.values()) * (size if isinstance(module, LamdaLinear) else _FLOAT)
