"""Cutting heads and neurons out: the function of the model without them, exactly."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from leantune import LamdaConfig, UserError
from leantune.anatomy import Cut, Group, find_groups
from leantune.lightpeft.surgery import is_pruned, module_cuts, parameter_cuts, prune_base, slice_parameter
from tests.anatomy.more_models import build
from tests.anatomy.test_blocks import COVERED
from tests.tiny_models import CAUSAL, IMAGE, MLM, S2S, SEQ, all_in_float64, batch_for

# Known by heart: family → (output projections of attention, features of a unit, output projections of FFNs)
OUTPUTS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"),
        (r"self_attn\.o_proj", 16, r"mlp\.down_proj"),
    ),
    **dict.fromkeys(
        ("bert", "roberta", "electra", "deberta-v2", "deberta-v3"),
        (r"attention\.output\.dense", 8, r"layer\.\d\.output\.dense"),
    ),
    **dict.fromkeys(("t5", "t5-gated"), (r"Attention\.o", 8, r"DenseReluDense\.wo")),
    "phi": (r"self_attn\.dense", 8, r"mlp\.fc2"),
    "gpt2": (r"attn\.c_proj", 8, r"mlp\.c_proj"),
    "gpt-neox": (r"attention\.dense", 8, r"mlp\.dense_4h_to_h"),
    "opt": (r"self_attn\.out_proj", 8, r"fc2"),
    "bart": (r"attn\.out_proj", 8, r"fc2"),
    "distilbert": (r"attention\.out_lin", 8, r"ffn\.lin2"),
    "modernbert": (r"attn\.Wo", 8, r"mlp\.Wo"),
    "mpnet": (r"attn\.o", 8, r"layer\.\d\.output\.dense"),
    "vit": (r"attention\.o_proj", 8, r"mlp\.fc2"),
}
KERNELS = {
    f: ("eager",) if f in ("gemma2", "deberta-v2", "deberta-v3", "mpnet") else ("eager", "sdpa")
    for f in COVERED
}
MATRIX = [(f, t, k) for f, tasks in COVERED.items() for t in tasks for k in KERNELS[f]]
FAST = [(f, COVERED[f][0], KERNELS[f][-1]) for f in COVERED]
DECODERS = [f for f in COVERED if COVERED[f][0] in (CAUSAL, S2S)]


def plan_for(groups: tuple[Group, ...], seed: int = 0) -> dict[str, list[int]]:
    """Units that stay: of every group some, a different number in every layer, not the first ones."""
    draw = torch.Generator().manual_seed(seed)
    kept = {}
    for number, group in enumerate(groups):
        stay = max(1, group.count * (3, 2, 1)[number % 3] // 4)
        kept[group.name] = sorted(torch.randperm(group.count, generator=draw)[:stay].tolist())
    return kept


def masks_for(groups: tuple[Group, ...], kept: dict[str, list[int]], folded: bool) -> dict[str, Tensor]:
    """Zero where a unit goes; ones elsewhere, or random values to fold, some of them negative."""
    draw = torch.Generator().manual_seed(9)
    masks = {}
    for group in groups:
        stays = torch.zeros(group.count)
        stays[kept.get(group.name, range(group.count))] = 1
        masks[group.name] = stays * (torch.randn(group.count, generator=draw) + 1) if folded else stays
    return masks


@contextmanager
def masked(model: Any, family: str, groups: tuple[Group, ...], masks: dict[str, Tensor]) -> Iterator[None]:
    """The model with every unit's output multiplied by its mask, where the table of this file says it is."""
    attention, size, forward = OUTPUTS[family]
    by_output = {cut.module: masks[group.name] for group in groups for cut in group.outputs}
    handles = []
    for name, module in model.named_modules():
        head = re.search(rf"(^|\.|\w){attention}$", name)
        if not head and not re.search(rf"(^|\.){forward}$", name):
            continue
        factors = by_output.pop(name).double().repeat_interleave(size if head else 1)
        assert factors.shape == (module.weight.shape[0 if family == "gpt2" else 1],)
        hook = lambda _, args, f=factors: (args[0] * f, *args[1:])  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook))
    assert not by_output, f"find_groups names outputs that the table does not: {list(by_output)}"
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    return torch.cat([out.start_logits, out.end_logits]) if "start_logits" in out else out.logits


def compare(family: str, task: str, kernel: str, folded: bool) -> None:
    model = build(family, task, kernel)
    padding = None if task == IMAGE else "right" if task in (SEQ, MLM, S2S) else "left"
    batch = batch_for(model if task == IMAGE else family, task, padding=padding, labels=task == S2S)
    groups = find_groups(model)
    kept = plan_for(groups)
    masks = masks_for(groups, kept, folded)
    with all_in_float64(), torch.no_grad():
        whole = output_of(model, batch)
        with masked(model, family, groups, masks):
            expected = output_of(model, batch)
        prune_base(model, groups, kept, masks if folded else None)
        found = output_of(model, batch)
    real = torch.isfinite(whole)
    assert (expected - whole)[real].abs().max() > 1e-4
    assert torch.allclose(found, expected, rtol=0, atol=1e-10, equal_nan=True)
    check_sizes(model, groups, kept)


def check_sizes(model: Any, groups: tuple[Group, ...], kept: dict[str, list[int]]) -> None:
    """Layers really are smaller, by exactly the units that went, and say so themselves."""
    for group in groups:
        share = len(kept[group.name]) / group.count
        for cut in group.cuts:
            module = model.get_submodule(cut.module)
            before = cut.in_features if cut.axis == "in" else cut.out_features
            names = {"in": ("in_features", "nx"), "out": ("out_features", "nf", "embedding_dim")}[cut.axis]
            [now] = [vars(module)[name] for name in names if name in vars(module)]
            assert now == before * share
            assert now in module.weight.shape
            bias = getattr(module, "bias", None)
            assert bias is None or len(bias) == (now if cut.axis == "out" else cut.out_features)


@pytest.mark.parametrize(("family", "task", "kernel"), FAST)
def test_pruned_is_masked(family: str, task: str, kernel: str) -> None:
    compare(family, task, kernel, folded=False)
    compare(family, task, kernel, folded=True)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "task", "kernel"), MATRIX)
def test_pruned_is_masked_everywhere(family: str, task: str, kernel: str) -> None:
    compare(family, task, kernel, folded=False)
    compare(family, task, kernel, folded=True)


@pytest.mark.parametrize(
    "family", ["llama", "phi3", "gpt2", "gpt-neox", "modernbert", "deberta-v2", "t5", "bert"]
)
def test_the_comparison_sees_every_cut(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer cut one unit beside the others of its group, and outputs are off: each cut in turn."""
    task = COVERED[family][0]
    model, batch = build(family, task), batch_for(family, task, labels=task == S2S)
    groups = find_groups(model)
    kept = {g.name: list(range(g.count - 1)) for g in groups if g.layer == 0}
    with all_in_float64(), torch.no_grad():
        right = copy.deepcopy(model)
        prune_base(right, groups, kept)
        expected = output_of(right, batch)
        for broken in (cut for g in groups if g.layer == 0 for cut in g.cuts):
            features = Cut.features

            def shifted(self: Cut, units: Tensor, broken: Cut = broken, features: Any = features) -> Tensor:
                return features(self, units + 1 if self == broken else units)

            wrong = copy.deepcopy(model)
            with monkeypatch.context() as patch:
                patch.setattr(Cut, "features", shifted)
                prune_base(wrong, groups, kept)
            difference = (output_of(wrong, batch) - expected).abs().max()
            # a key's bias is the same for every query, so softmax does not see it; all else shows
            assert difference > 1e-7, broken.module


def test_rows_and_columns_by_hand() -> None:
    """Llama: weights of the kept KV group, sliced here by reshaping."""
    model = build("llama", CAUSAL)
    old = copy.deepcopy(model.model.layers[1])
    neurons = list(range(1, 64, 3))
    prune_base(model, find_groups(model), {"layers.1.self_attn": [1], "layers.1.mlp": neurons})
    new, whole = model.model.layers[1], model.model.layers[0]
    assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight.view(2, 16, 32)[1])
    assert torch.equal(new.self_attn.k_proj.weight, old.self_attn.k_proj.weight.view(2, 8, 32)[1])
    assert torch.equal(new.self_attn.v_proj.weight, old.self_attn.v_proj.weight.view(2, 8, 32)[1])
    assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight.view(32, 2, 16)[:, 1])
    assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[neurons])
    assert torch.equal(new.mlp.up_proj.weight, old.mlp.up_proj.weight[neurons])
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, neurons])
    assert whole.self_attn.q_proj.weight.shape == (32, 32) and whole.mlp.up_proj.weight.shape == (64, 32)


def test_zeroed_rows_and_columns_are_a_removed_unit() -> None:
    """Brute force on the whole model's own weights: what a unit reads, makes and writes set to zero."""
    model, batch = build("qwen2", CAUSAL), batch_for("qwen2", CAUSAL, labels=False)
    zeroed = copy.deepcopy(model)
    with all_in_float64(), torch.no_grad():
        for layer in zeroed.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear, size in ((attention.q_proj, 16), (attention.k_proj, 8), (attention.v_proj, 8)):
                linear.weight.view(2, size, 32)[0] = 0
                linear.bias.view(2, size)[0] = 0
            attention.o_proj.weight.view(32, 2, 16)[:, 0] = 0
            mlp.up_proj.weight[::2] = mlp.gate_proj.weight[::2] = 0
            mlp.down_proj.weight[:, ::2] = 0
        expected = zeroed(**batch).logits
        groups = find_groups(model)
        kept = {g.name: [1] if g.kind == "heads" else list(range(1, 64, 2)) for g in groups}
        prune_base(model, groups, kept)
        assert torch.allclose(model(**batch).logits, expected, rtol=0, atol=1e-10)


# -- the pruned model is a model like any other --------------------------------------------------------------


def pruned(family: str, task: str, kernel: str = "eager", **overrides: Any) -> Any:
    model = build(family, task, kernel, **overrides)
    groups = find_groups(model)
    kept = plan_for(groups)
    prune_base(model, groups, kept, masks_for(groups, kept, folded=True))
    return model


@pytest.mark.parametrize("family", DECODERS)
def test_generate_with_cache(family: str) -> None:
    kernel = KERNELS[family][-1]
    model = build(family, COVERED[family][0], kernel)
    groups = find_groups(model)
    kept = plan_for(groups)
    masks = masks_for(groups, kept, folded=True)
    batch = batch_for(family, CAUSAL, labels=False, padding="left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1}
    with all_in_float64(), torch.no_grad():
        with masked(model, family, groups, masks):
            expected = model.generate(**batch, **options, use_cache=True)
        prune_base(model, groups, kept, masks)
        for settings in ({"use_cache": True}, {"use_cache": False}, {"use_cache": True, "num_beams": 2}):
            found = model.generate(**batch, **{**options, **settings})
            assert settings.get("num_beams") or torch.equal(found, expected), settings


@pytest.mark.parametrize(("family", "task"), [(f, COVERED[f][0]) for f in COVERED])
def test_backward_and_checkpointing(family: str, task: str) -> None:
    model = pruned(family, task).train()
    batch = batch_for(model if task == IMAGE else family, task)
    with all_in_float64():
        model(**batch).loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        if not model.supports_gradient_checkpointing:
            return
        model.zero_grad()
        model.activation_checkpointing_enable({"use_reentrant": False})
        model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (grads[name] is None) == (parameter.grad is None)
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, grads[name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize(("family", "task"), [(f, COVERED[f][0]) for f in COVERED])
def test_copies_and_adapters(family: str, task: str) -> None:
    model = pruned(family, task)
    batch = batch_for(model if task == IMAGE else family, task, labels=task == S2S)
    with all_in_float64(), torch.no_grad():
        expected = output_of(model, batch)
        assert torch.equal(output_of(copy.deepcopy(model), batch), expected)
        assert torch.equal(output_of(pickle.loads(pickle.dumps(model)), batch), expected)
        lora = peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=family == "gpt2")
        for config in (lora, LamdaConfig(r=2, target_modules="all-linear")):
            wrapped = peft.get_peft_model(copy.deepcopy(model), config)
            assert torch.allclose(output_of(wrapped, batch), expected, rtol=0, atol=1e-10)
            wrapped.add_adapter("second", config)


def test_a_pruned_model_is_read_as_such() -> None:
    model = pruned("bert", SEQ)
    assert is_pruned(model) and not is_pruned(build("bert", SEQ))
    counts = [group.count for group in find_groups(model)]
    kept = plan_for(find_groups(build("bert", SEQ)))
    assert counts == [len(units) for units in kept.values()]


def test_phi3_still_follows_its_shared_config() -> None:
    """Its attention counts heads by the config: each layer gets its own view, nothing more."""
    model = pruned("phi3", CAUSAL)
    assert model.config.num_attention_heads == 4
    assert [layer.self_attn.config.num_attention_heads for layer in model.model.layers] == [2, 2, 2]
    model.set_attn_implementation("sdpa")
    assert model.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    with pytest.raises(AttributeError):
        _ = model.model.layers[0].self_attn.config.nothing
    assert copy.deepcopy(model).model.layers[1].self_attn.config.shared is not model.config


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.filterwarnings("ignore")
def test_compile(family: str) -> None:
    model = pruned(family, CAUSAL, "sdpa").float()
    batch = batch_for(family, CAUSAL)
    expected = model(**batch).loss
    torch._dynamo.reset()
    loss = torch.compile(model)(**batch).loss
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-4)


# -- tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_device_and_requires_grad_stay(dtype: torch.dtype) -> None:
    model = build("bert", SEQ).to(dtype)
    model.bert.encoder.layer[0].output.dense.weight.requires_grad = False
    before = copy.deepcopy(model)
    groups = find_groups(model)
    kept = plan_for(groups)
    prune_base(model, groups, kept, masks_for(groups, kept, folded=True))
    assert {p.dtype for p in model.parameters()} == {dtype}
    wanted = [p.requires_grad for p in before.parameters()]
    assert [p.requires_grad for p in model.parameters()] == wanted
    # folded in float32, rounded once
    group, linear = groups[1], before.bert.encoder.layer[0].output.dense
    units = kept[group.name]
    factors = masks_for(groups, kept, folded=True)[group.name][units]
    exact = (linear.weight[:, units].float() * factors).to(dtype)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, exact)
    assert torch.equal(model.bert.encoder.layer[0].output.dense.bias, linear.bias)


def test_tensors_have_memory_of_their_own() -> None:
    model = pruned("llama", CAUSAL)
    for parameter in model.parameters():
        assert parameter.is_contiguous() and parameter.is_leaf
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


@pytest.mark.parametrize("family", COVERED)
def test_on_meta_the_same_shapes(family: str) -> None:
    task = COVERED[family][0]
    model = build(family, task)
    meta = copy.deepcopy(model).to("meta")
    groups = find_groups(model)
    kept = plan_for(groups)
    prune_base(model, groups, kept)
    prune_base(meta, groups, kept)
    meta.tie_weights()
    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert all(p.is_meta for p in meta.parameters())
    meta.load_state_dict(model.state_dict(), assign=True)
    meta.tie_weights()
    with all_in_float64(), torch.no_grad():
        batch = batch_for(model if task == IMAGE else family, task, labels=task == S2S)
        for whole, name in ((model, n) for n, _ in model.named_buffers()):
            owner, _, key = name.rpartition(".")
            setattr(meta.get_submodule(owner), key, whole.get_buffer(name))
        assert torch.equal(output_of(meta, batch), output_of(model, batch))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("rows", [7, 512])
def test_reading_slices_of_a_file(
    family: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leantune.lightpeft.slices._ROWS", rows)
    model = build(family, COVERED[family][0])
    groups = find_groups(model)
    kept = plan_for(groups)
    masks = masks_for(groups, kept, folded=True)
    cuts = parameter_cuts(copy.deepcopy(model).to("meta"), module_cuts(groups, kept, masks))
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, tmp_path / "x.safetensors")
    prune_base(model, groups, kept, masks)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        for name, parameter in model.named_parameters():
            if name in cuts:
                assert cuts[name].new_shape == parameter.shape
                assert torch.equal(slice_parameter(file.get_slice(name), cuts[name]), parameter)
                assert torch.equal(slice_parameter(file.get_tensor(name), cuts[name]), parameter)
            else:
                assert torch.equal(file.get_tensor(name), parameter)
        wrong = replace(next(iter(cuts.values())), shape=(3, 3))
        with pytest.raises(UserError, match=r"the plan is for \(3, 3\)"):
            slice_parameter(file.get_slice(next(iter(cuts))), wrong)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers.0.mlp": []}, r"layers\.0\.mlp: no unit is kept; at least one of 64"),
        ({"layers.9.mlp": [0]}, r"no group of heads or neurons is called 'layers\.9\.mlp'"),
        ({"layers.0.mlp": [64]}, r"ascending numbers in 0…63, each once"),
        ({"layers.0.mlp": [-1]}, r"ascending numbers in 0…63, each once"),
        ({"layers.0.mlp": [3, 3]}, r"ascending numbers in 0…63, each once"),
        ({"layers.0.mlp": [3, 2]}, r"ascending numbers in 0…63, each once"),
    ],
)
def test_plans_that_do_not_fit_are_refused(kept: dict[str, list[int]], message: str) -> None:
    model = build("llama", CAUSAL)
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(UserError, match=message):
        prune_base(model, find_groups(model), {"layers.1.mlp": [0], **kept})
    assert [p.shape for p in model.parameters()] == shapes and not is_pruned(model)


def test_masks_that_do_not_fit_are_refused() -> None:
    model = build("llama", CAUSAL)
    with pytest.raises(UserError, match=r"shape \(3,\), not \(64,\)"):
        prune_base(model, find_groups(model), {}, {"layers.0.mlp": torch.ones(3)})
    with pytest.raises(UserError, match="is called 'x'"):
        prune_base(model, find_groups(model), {}, {"x": torch.ones(3)})


def test_models_that_cannot_be_pruned_are_refused() -> None:
    model = build("llama", CAUSAL)
    groups = find_groups(model)
    other = build("llama", CAUSAL, intermediate_size=72)
    with pytest.raises(
        UserError, match=r"gate_proj: its weight has shape \(72, 32\), the plan is for \(64, 32\)"
    ):
        prune_base(other, groups, {"layers.0.mlp": [0]})
    wrapped = peft.get_peft_model(build("llama", CAUSAL), peft.LoraConfig(r=2))
    for adapted in (wrapped, wrapped.get_base_model()):
        with pytest.raises(UserError, match="carries an adapter: prune the base first"):
            prune_base(adapted, find_groups(adapted), {"layers.0.mlp": [0]})
    prune_base(model, groups, {"layers.0.mlp": [0]})
    with pytest.raises(UserError, match="was pruned before"):
        prune_base(model, groups, {"layers.0.mlp": [0]})


def test_quantised_layers_are_refused() -> None:
    class Linear8bit(nn.Linear):
        """As bitsandbytes': a weight of packed integers."""

    model = build("llama", CAUSAL)
    quantised = Linear8bit(64, 32, bias=False)
    quantised.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.down_proj = quantised
    with pytest.raises(UserError, match=r"down_proj \(Linear8bit\) is quantised, or no plain"):
        prune_base(model, find_groups(model), {"layers.0.mlp": [0]})


def test_torchao_weights_are_refused() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = build("llama", CAUSAL).float()
    torchao.quantize_(model.model.layers[0].mlp, torchao.Int8WeightOnlyConfig())
    with pytest.raises(UserError, match=r"mlp\.gate_proj \(Linear\) is quantised"):
        prune_base(model, find_groups(model), {"layers.0.mlp": [0]})
