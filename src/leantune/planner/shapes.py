"""What a layer keeps for the backward pass, read off its modules: the numbers behind the closed form.

Per token (h hidden size, q width of all heads together, f width of the feed-forward block, n length):

    attention       4 q        queries, keys and values (expanded to all heads), result
    padding         n          the mask's row, which fused attention turns into numbers in every layer
    norms           h each     their input, in float32 inside an RMS norm; once more if its weight is trained
    dropout         h each     what it multiplies by: numbers on a CPU, single bytes on a GPU
    activation      f          its input; of a gated block gate, activated gate and the other branch: 3 f
    linear layers   h, h, f    what q/k/v, the block and its last layer read: if they are trained or carry
                               an adapter that needs it (LoRA, in its own dtype; not LaMDA, which keeps r)
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from leantune.anatomy import Group, find_head, find_stacks, is_disentangled
from leantune.lamda.layer import LamdaLinear
from leantune.planner.quantized import QuantizedStandIn
from leantune.planner.resident import units_of, weight_bytes
from leantune.planner.setting import Setting
from leantune.planner.sharing import Units

_FLOAT = 4  # bytes of float32
# Activations written out in Python keep their steps.
_STEPS = {"gelu_new": 4, "gelu_fast": 4}


@dataclass(frozen=True)
class Layer:
    """Bytes a token that one layer keeps."""

    kept: int = 0
    keys: int = 0  # of a token without gradient: keys and values as attention has them
    cache: int = 0  # keys and values as a generating model caches them
    wide: int = 0  # the widest thing in it
    heads: int = 0  # how many (no bytes)
    attention: int = 0  # width of all heads together (no bytes)

    def __add__(self, other: Layer) -> Layer:
        return Layer(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Totals:
    """Sums over a model or a part of it.

    Attributes:
        weights: Bytes of parameters and buffers, quantised ones as they are stored.
        scales: Bytes of quantised weights' scales.
        trained_bytes: Of trained parameters.
        parameters, trained: Numbers of them.
        products: Weights of linear maps: multiply-adds a token.
    """

    weights: int
    scales: int
    trained_bytes: int
    parameters: int
    trained: int
    products: int

    def and_more(self, part: Totals, times: float) -> Totals:
        """With a part so many times more."""
        names = [f.name for f in fields(self)]
        return Totals(*(round(getattr(self, n) + times * getattr(part, n)) for n in names))


@dataclass(frozen=True)
class Shapes:
    """What the formulas need to know of a model with its methods.

    Attributes:
        whole: Sums over the model; `products` of the layers alone.
        inside: Sums over the layers.
        dequantised: Bytes of the largest quantised weight when it is used.
        units: What processes exchange, if they share the model.
        hidden: Bytes a token of what one layer hands to the next.
        outside: Bytes a token that is kept outside the layers: embeddings' norm and dropout.
        layers: In order.
        scores: Matrices of scores that attention keeps; 0 where it is fused.
        passing_scores: That it has at a time in evaluation, where nothing is dropped out.
        vocabulary: Of a head over all tokens, else 0.
        head_products: Multiply-adds a token of the output head.
    """

    whole: Totals
    inside: Totals
    dequantised: int
    units: Units
    hidden: int
    outside: int
    layers: tuple[Layer, ...]
    scores: float
    passing_scores: float
    vocabulary: int
    head_products: int

    @property
    def all(self) -> Layer:
        """All layers together."""
        return sum(self.layers, Layer())

    def grown(self, count: int) -> Shapes:
        """Of the same model with so many layers like these."""
        times = count / len(self.layers) - 1
        trained = self.units.trained + round(times * self.inside.trained_bytes)
        return replace(
            self,
            whole=self.whole.and_more(self.inside, times),
            inside=self.inside.and_more(self.inside, times),
            units=replace(self.units, trained=trained),
            layers=tuple(self.layers[number % len(self.layers)] for number in range(count)),
        )


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
    read = [_plain(layer, hidden, setting, projections) for layer in layers]
    for group in groups:
        read[group.layer] += _of_group(head, group, setting)
    quantised = [m for m in model.modules() if isinstance(m, QuantizedStandIn)]
    vocabulary = text.vocab_size if setting.recipe.model.task == "causal-lm" else 0
    return Shapes(
        whole=_totals([model], layers),
        inside=_totals(layers, layers),
        dequantised=max((m.in_features * m.out_features * size for m in quantised), default=0),
        units=units_of(model),
        hidden=hidden * size,
        outside=_outside(head, hidden, setting),
        layers=tuple(read),
        scores=_scores(head, setting),
        passing_scores=_passing_scores(head),
        vocabulary=vocabulary,
        head_products=vocabulary * hidden,
    )


def _totals(parts: list[nn.Module], layers: list[nn.Module]) -> Totals:
    parameters = [p for part in parts for p in part.parameters()]
    buffers = [b for part in parts for b in part.buffers()]
    trained = [p for p in parameters if p.requires_grad]
    named = [pair for part in parts for pair in part.named_buffers()]
    scales = weight_bytes(b for name, b in named if ".scale_" in name)
    return Totals(
        weights=weight_bytes((*parameters, *buffers)) - scales,
        scales=scales,
        trained_bytes=weight_bytes(trained),
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        products=sum(_products(layer) for layer in layers),
    )


def _products(layer: nn.Module) -> int:
    """Multiply-adds a token."""
    quantised = [m for m in layer.modules() if isinstance(m, QuantizedStandIn)]
    packed = {id(m.weight) for m in quantised}
    plain = sum(p.numel() for p in layer.parameters() if p.dim() == 2 and id(p) not in packed)
    return plain + sum(m.in_features * m.out_features for m in quantised)


def _scores(head: nn.Module, setting: Setting) -> float:
    """Matrices of scores that attention keeps: softmaxed, dropped out, with the dropout's own mask."""
    if any(is_disentangled(m) for m in head.modules()):
        return (
            3.25 if setting.recipe.lean.tokens is None else 5.25
        )  # ours, for chosen queries, keeps two more
    return 0 if _is_fused(head, setting) else 3


def _passing_scores(head: nn.Module) -> float:
    config: Any = head.config
    if any(is_disentangled(m) for m in head.modules()):
        return 5
    return 2 if config._attn_implementation == "eager" else 0


def _is_fused(head: nn.Module, setting: Setting) -> bool:
    """Whether attention's kernel keeps no scores; the CPU's cannot drop any of them out."""
    config: Any = head.config
    names = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
    drops = any(getattr(config.get_text_config(), name, 0) for name in names)
    return config._attn_implementation != "eager" and (setting.device == "cuda" or not drops)


def _outside(head: Any, hidden: int, setting: Setting) -> int:
    """Norms and dropout between tokens and layers, and after those."""
    stacks = [name for stack in find_stacks(head) for name in stack.names]
    base = f"{head.base_model_prefix}."
    return sum(
        _norm_bytes(module, hidden, setting)
        for name, module in head.named_modules()
        if not name.startswith(tuple(f"{stack}." for stack in stacks)) and name not in stacks
        if name.startswith(base) and "pooler" not in name
    )


def _norm_bytes(module: nn.Module, hidden: int, setting: Setting) -> int:
    """What a norm or dropout keeps; 0 of all others."""
    size, kind = setting.dtype.itemsize, type(module).__name__
    if "Norm" in kind:
        return hidden * _FLOAT + hidden * size * _is_trained(module) if "RMS" in kind else hidden * size
    if isinstance(module, nn.Dropout) and module.p:
        return _dropout_bytes(hidden, setting)
    return 0


def _dropout_bytes(hidden: int, setting: Setting) -> int:
    return hidden * (setting.dtype.itemsize if setting.device == "cpu" else 1)


def _plain(layer: nn.Module, hidden: int, setting: Setting, projections: set[int]) -> Layer:
    """Norms, dropout, and what linear layers other than the output projections read."""
    size = setting.dtype.itemsize
    rate = getattr(layer, "dropout", None)
    # dropout that is no module: after attention and after the feed-forward block
    kept = 2 * _dropout_bytes(hidden, setting) if isinstance(rate, float) and rate else 0
    seen = set()
    inside: tuple[str, ...] = ()
    for name, module in layer.named_modules():
        if name.startswith(inside or ("\0",)):
            continue  # part of an adapted layer
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        if ".self." not in f".{name}" and "attn_drop" not in name:  # of attention's scores
            kept += _norm_bytes(module, hidden, setting)
        if _is_linear(module):
            kept += _rank_bytes(module, size)
            need = _input_bytes(module, size)
            place = (name.rpartition(".")[0], _width(module), need)
            if id(_base(module)) not in projections and (need > size or place not in seen):
                kept += need * _width(module)
            seen.add(place)
    return Layer(kept=kept, wide=hidden * size)


def _of_group(head: nn.Module, group: Group, setting: Setting) -> Layer:
    """What heads or neurons keep, and what their output projection reads."""
    size, kept, keys, cache, heads = setting.dtype.itemsize, 0, 0, 0, 0
    module = head.get_submodule(group.outputs[0].module)
    width, need = _width(module), _input_bytes(module, size)
    if group.kind == "heads":
        kept = 4 * width * size + (need * width if need > size else 0)  # uncast, it is the result itself
        keys = 2 * width * size
        each = group.outputs[0].blocks[0][1] // _queries_each(group, setting)  # a head's width
        cache = 2 * (width // each // _queries_each(group, setting)) * each * size
        heads = width // each
        places = _places(head, group, heads, size)
        copies = width * size if places else 0  # of queries, keys and values, head by head
        kept, keys = kept + 2 * places + 3 * copies, keys + places + copies
    else:
        config: Any = setting.config.get_text_config()
        names = ("hidden_act", "activation_function", "activation")
        activation = next((getattr(config, n) for n in names if getattr(config, n, None)), "")
        gated = sum(len(cut.blocks) for cut in group.cuts if cut.axis == "out") > 1
        kept = (3 if gated else _STEPS.get(activation, 1)) * width * size + need * width
        if activation == "relu" and need == size:  # it keeps its result, which is what the next layer reads
            kept -= width * size
    if setting.stage == "estimate":
        kept += width * size  # before and after the mask
    return Layer(kept, keys, cache, width * size, heads, width if heads else 0)


def _queries_each(group: Group, setting: Setting) -> int:
    """Query heads of a unit."""
    text: Any = setting.config.get_text_config()
    return max(1, int(text.num_attention_heads) // group.count)


def _places(head: nn.Module, group: Group, heads: int, size: int) -> int:
    """Bytes a token of one table of disentangled attention: its scores against every relative position."""
    owner: Any = head.get_submodule(group.cuts[0].module.rpartition(".")[0])
    if not is_disentangled(owner):
        return 0
    return 2 * owner.pos_ebd_size * heads * size


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | QuantizedStandIn | BaseTunerLayer)


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _width(module: nn.Module) -> int:
    base: Any = _base(module)
    return int(base.nx if isinstance(base, Conv1D) else base.in_features)


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _input_bytes(module: nn.Module, size: int) -> int:
    """Bytes of each number of its input that the layer keeps."""
    base = _base(module)
    by_base = size if isinstance(base, QuantizedStandIn) and base.keeps_input else 0
    adapted = _adapter_input_bytes(module, size)
    return adapted if adapted == by_base else adapted + by_base


def _adapter_input_bytes(module: nn.Module, size: int) -> int:
    if isinstance(module, LamdaLinear | QuantizedStandIn):
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
