"""Which features of which layers belong to heads and neurons; and what is refused."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

from leantune import LamdaConfig, UserError
from leantune.anatomy import Attribute, Cut, find_groups, find_head
from tests.anatomy.more_models import build
from tests.tiny_models import CAUSAL, FAMILIES, MLM, S2S, SEQ

MORE = {"t5-gated": (S2S,), "phi3": (CAUSAL, SEQ), "gpt-neox": (CAUSAL, SEQ), "mpnet": (MLM, SEQ)}
COVERED = {**{f: t for f, t in FAMILIES.items() if f != "mixtral"}, **MORE}

# family → first heads group, its output projection, first neurons group, its output projection
NAMES = {
    "llama": ("layers.0.self_attn", "o_proj", "layers.0.mlp", "down_proj"),
    "phi": ("layers.0.self_attn", "dense", "layers.0.mlp", "fc2"),
    "phi3": ("layers.0.self_attn", "o_proj", "layers.0.mlp", "down_proj"),
    "gpt2": ("h.0.attn", "c_proj", "h.0.mlp", "c_proj"),
    "gpt-neox": ("layers.0.attention", "dense", "layers.0.mlp", "dense_4h_to_h"),
    "opt": ("decoder.layers.0.self_attn", "out_proj", "decoder.layers.0.fc1", "fc2"),
    "bert": ("encoder.layer.0.attention.self", "dense", "encoder.layer.0.intermediate", "dense"),
    "distilbert": ("transformer.layer.0.attention", "out_lin", "transformer.layer.0.ffn", "lin2"),
    "modernbert": ("layers.0.attn", "Wo", "layers.0.mlp", "Wo"),
    "bart": ("encoder.layers.0.self_attn", "out_proj", "encoder.layers.0.fc1", "fc2"),
    "t5": ("encoder.block.0.layer.0.SelfAttention", "o", "encoder.block.0.layer.1.DenseReluDense", "wo"),
    "mpnet": ("encoder.layer.0.attention.attn", "o", "encoder.layer.0.intermediate", "dense"),
    "vit": ("layers.0.attention", "o_proj", "layers.0.mlp", "fc2"),
}


@pytest.mark.parametrize("family", NAMES)
def test_names(family: str) -> None:
    groups = find_groups(build(family, COVERED[family][0]))
    heads, neurons = groups[0], next(g for g in groups if g.kind == "neurons")
    found = (heads.name, heads.outputs[0].module, neurons.name, neurons.outputs[0].module)
    assert tuple(name.rpartition(".")[2] if i % 2 else name for i, name in enumerate(found)) == NAMES[family]
    assert len({group.name for group in groups}) == len(groups)


@pytest.mark.parametrize("family", COVERED)
def test_every_layer_has_its_groups(family: str) -> None:
    """Four query heads of 8 features and 64 neurons (GPT-2: 128) in each of three layers (on each side)."""
    groups = find_groups(build(family, COVERED[family][0]))
    grouped = family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
    for group in groups:
        heads = group.kind == "heads"
        assert group.count == ((2 if grouped else 4) if heads else 128 if family == "gpt2" else 64)
        size = (16 if grouped else 8) if heads else 1
        assert all(cut.blocks == ((0, size),) and cut.axis == "in" for cut in group.outputs)
        assert set(group.outputs) <= set(group.cuts)
    tied = {"mpnet": 1, "t5": 5, "t5-gated": 5}  # T5: one for each side's self-attention, three cross
    layers = 6 if family in ("bart", "t5", "t5-gated") else 3
    kinds = Counter(group.kind for group in groups)
    assert kinds == {"neurons": layers, "heads": tied.get(family, 9 if family == "bart" else 3)}
    order = [(group.layer, group.kind) for group in groups]
    assert order == sorted(order)
    assert {group.layer for group in groups if group.kind == "neurons"} == set(range(layers))


@pytest.mark.parametrize("family", COVERED)
def test_cuts_cover_their_layers_exactly(family: str) -> None:
    """All units together own every feature of the axis that is cut, each once."""
    model = build(family, COVERED[family][0])
    seen = set()
    for group in find_groups(model):
        for cut in group.cuts:
            features = cut.features(torch.arange(group.count))
            width = cut.in_features if cut.axis == "in" else cut.out_features
            assert sorted(features.tolist()) == list(range(width))
            assert (cut.module, cut.axis) not in seen
            seen.add((cut.module, cut.axis))
            weight = model.get_submodule(cut.module).weight
            assert {cut.in_features, cut.out_features} == set(weight.shape)


def test_features_of_fused_and_grouped_projections() -> None:
    """Written out by hand, for the second of two KV groups (heads 2 and 3 of four, 8 features each)."""
    cuts = {c.module.rpartition(".")[2]: c for c in find_groups(build("llama", CAUSAL))[0].cuts}
    unit = torch.tensor([1])
    assert cuts["q_proj"].features(unit).tolist() == list(range(16, 32))
    assert cuts["k_proj"].features(unit).tolist() == list(range(8, 16))
    assert cuts["v_proj"].features(unit).tolist() == list(range(8, 16))
    assert cuts["o_proj"].features(unit).tolist() == list(range(16, 32))
    qkv = find_groups(build("phi3", CAUSAL))[0].cuts[0]
    assert qkv.features(unit).tolist() == [*range(16, 32), *range(40, 48), *range(56, 64)]
    gate_up = find_groups(build("phi3", CAUSAL))[1].cuts[0]
    assert gate_up.features(torch.tensor([3, 5])).tolist() == [3, 5, 67, 69]
    qkv = find_groups(build("gpt2", CAUSAL))[0].cuts[0]
    assert qkv.features(unit).tolist() == [*range(8, 16), *range(40, 48), *range(72, 80)]
    qkv = find_groups(build("gpt-neox", CAUSAL))[0].cuts[0]
    assert qkv.features(unit).tolist() == list(range(24, 48))


def test_features_keep_the_order_given() -> None:
    cut = Cut("x", "out", ((0, 2), (10, 1)), 4, 13)
    assert cut.features(torch.tensor([3, 0])).tolist() == [6, 7, 0, 1, 13, 10]


def without_prefix(model: Any) -> Any:
    groups, prefix = find_groups(model), f"{model.base_model_prefix}."
    return [
        (
            g.name,
            g.kind,
            g.layer,
            g.count,
            [(c.module.removeprefix(prefix), c.axis, c.blocks) for c in g.cuts],
        )
        for g in groups
    ]


@pytest.mark.parametrize("family", COVERED)
def test_the_same_for_every_head_under_peft_and_on_meta(family: str) -> None:
    first, *others = (*COVERED[family], "base")
    model = build(family, first)
    groups = find_groups(model)
    for task in others:
        assert without_prefix(build(family, task)) == without_prefix(model)
    assert find_groups(copy.deepcopy(model).to("meta")) == groups
    lora = peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    for config in (lora, LamdaConfig(r=2, target_modules="all-linear")):
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        assert find_groups(wrapped) == groups
        head = find_head(wrapped)
        assert all(head.get_submodule(c.module) is not None for g in groups for c in g.cuts)


def test_attributes_that_must_follow() -> None:
    def of(family: str, task: str, number: int = 0) -> set[tuple[str, int, int]]:
        return {(a.name, a.per_unit, a.base) for a in find_groups(build(family, task))[number].attributes}

    assert of("llama", CAUSAL) == set()  # head_dim and num_key_value_groups stay
    assert of("gpt2", CAUSAL) == {("num_heads", 1, 0), ("split_size", 8, 0)}
    assert of("phi3", CAUSAL) == {("num_key_value_heads", 1, 0), ("config.num_attention_heads", 2, 0)}
    assert of("deberta-v2", MLM) == {("num_attention_heads", 1, 0)}
    assert of("opt", CAUSAL) == {("num_heads", 1, 0)}
    assert of("mpnet", MLM) == {("num_attention_heads", 1, 0), ("all_head_size", 8, 0)}
    groups = {g.name: g for g in find_groups(build("t5", S2S))}
    cross = groups["decoder.block.1.layer.1.EncDecAttention"]
    # T5 hands zeros of the first layer's head count to every cross-attention: one head of zeros fits all
    assert cross.attributes == (Attribute("decoder.block.1.layer.1.EncDecAttention", "n_heads", 0, 1),)


@pytest.mark.parametrize(("family", "task", "stacks"), [("t5", S2S, 2), ("mpnet", MLM, 1)])
def test_layers_that_share_a_position_bias_share_their_heads(family: str, task: str, stacks: int) -> None:
    tied = [g for g in find_groups(build(family, task)) if len(g.outputs) > 1]
    assert len(tied) == stacks
    for group in tied:
        assert len(group.outputs) == 3 and len(group.cuts) == 13
        table = next(cut for cut in group.cuts if "relative_attention_bias" in cut.module)
        assert (table.axis, table.blocks, table.out_features) == ("out", ((0, 1),), 4)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "task", "message"),
    [
        ("mixtral", CAUSAL, r"model\.layers\.0\.mlp.*a mixture of experts"),
        ("olmo2", CAUSAL, r"model\.layers\.0\.self_attn\.q_norm\.weight .*not per head feature"),
        ("bitnet", CAUSAL, r"model\.layers\.0\.self_attn\.attn_sub_norm\.weight .*not per head feature"),
        ("trocr", CAUSAL, r"self_attn \(TrOCRAttention\) cannot be pruned: its code reshapes"),
        ("bigbird", MLM, r"attention\.self \(BigBird\w+\) cannot be pruned: it is rebuilt"),
        ("albert", MLM, r"albert_layers\.0\.ffn \(Linear\): leantune does not know"),
        ("bloom", CAUSAL, r"h\.0\.self_attention\.query_key_value \(Linear\): leantune does not know"),
    ],
)
def test_what_would_be_wrong_is_refused(family: str, task: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_groups(build(family, task))


def refused(change: Any, message: str, family: str = "llama", task: str = CAUSAL) -> None:
    model = build(family, task)
    change(model.model.layers[0] if family == "llama" else model.h[0] if family == "gpt2" else model)
    with pytest.raises(UserError, match=message):
        find_groups(model)


def test_changed_layers_are_refused() -> None:
    def sinks(layer: Any) -> None:
        layer.self_attn.sinks = nn.Parameter(torch.zeros(4))

    def slopes(layer: Any) -> None:
        layer.self_attn.register_buffer("slopes", torch.zeros(4))

    def gate(layer: Any) -> None:
        layer.mlp.router = nn.Linear(32, 4)

    def norm(layer: Any) -> None:
        layer.mlp.ffn_layernorm = nn.LayerNorm(64)

    def wide(layer: Any) -> None:
        layer.self_attn.q_proj = nn.Linear(32, 64)

    def half_a_head(layer: Any) -> None:
        layer.self_attn.k_proj, layer.self_attn.v_proj = nn.Linear(32, 12), nn.Linear(32, 12)

    def wide_up(layer: Any) -> None:
        layer.mlp.up_proj = nn.Linear(32, 65)

    def no_attention(layer: Any) -> None:
        layer.self_attn = nn.Identity()

    def no_mlp(layer: Any) -> None:
        layer.mlp = nn.Identity()

    def renamed(layer: Any) -> None:
        layer.self_attn.wq = layer.self_attn.q_proj
        del layer.self_attn.q_proj

    def no_sizes(layer: Any) -> None:
        del layer.self_attn.head_dim

    refused(sinks, r"self_attn\.sinks .*not per head feature")
    refused(slopes, r"self_attn\.slopes: .*buffer")
    refused(gate, r"mlp\.router \(Linear\): leantune does not know this projection")
    refused(norm, r"mlp\.ffn_layernorm\.weight \(LayerNorm, 64\): .*parameter of the feed-forward block")
    refused(wide, r"layers\.0\.self_attn: sizes do not add up .*q_proj 32→64")
    refused(half_a_head, r"layers\.0\.self_attn: sizes do not add up .*k_proj 32→12")
    refused(wide_up, r"layers\.0\.mlp.*sizes do not add up .*up_proj 32→65")
    refused(no_attention, r"layers\.0 \(LlamaDecoderLayer\): no attention")
    refused(no_mlp, r"layers\.0 \(LlamaDecoderLayer\): no feed-forward block")
    refused(renamed, r"layers\.0\.self_attn\.\w+ \(Linear\): leantune does not know this projection")
    refused(no_sizes, r"self_attn \(LlamaAttention\) says neither")


def test_shared_weights_are_refused() -> None:
    model = build("llama", CAUSAL)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj: its weight is shared"):
        find_groups(model)


def test_a_bias_of_unknown_source_is_refused() -> None:
    model = build("mpnet", MLM)
    model.mpnet.encoder.distances = model.mpnet.encoder.relative_attention_bias
    del model.mpnet.encoder.relative_attention_bias
    with pytest.raises(UserError, match="handed a bias per head; leantune finds no"):
        find_groups(model)


class Counting(nn.Module):
    """An attention whose code reads a count by a name of its own."""

    def __init__(self, inner: Any):
        super().__init__()
        self.q_proj, self.k_proj = inner.q_proj, inner.k_proj
        self.v_proj, self.o_proj = inner.v_proj, inner.o_proj
        self.head_dim, self.how_many, self.unused = 8, 4, 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x).view(*x.shape[:2], self.how_many, -1)


def test_attributes_of_unknown_meaning_are_refused() -> None:
    def change(layer: Any) -> None:
        layer.self_attn = Counting(layer.self_attn)

    refused(change, r"self_attn \(Counting\): its code reads how_many=4")


def test_a_gpt2_that_attends_to_an_encoder() -> None:
    config = GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=99, add_cross_attention=True)
    groups = {g.name: g for g in find_groups(GPT2LMHeadModel(config))}
    assert [c.blocks for c in groups["h.1.crossattention"].cuts] == [((0, 8),), ((0, 8), (32, 8)), ((0, 8),)]


def test_vision_towers_too() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "image_size": 16, "patch_size": 4}
    config = CLIPVisionConfig(num_hidden_layers=2, num_attention_heads=4, **sizes)
    assert len(find_groups(CLIPVisionModel(config))) == 4
