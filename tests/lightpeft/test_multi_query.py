"""One KV head for all query heads (Gemma 3 270M has it so): query heads go one by one, the KV head stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leantune.anatomy import find_groups
from leantune.lightpeft.surgery import prune_base
from tests.tiny_models import all_in_float64, batch_for, tiny


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pruned_is_masked(family: str, attention: str) -> None:
    def model() -> Any:
        return tiny(family, "causal-lm", attn_implementation=attention, num_key_value_heads=1)

    masked, pruned = model(), model()
    heads = [group for group in find_groups(masked) if group.kind == "heads"]
    assert [group.count for group in heads] == [4, 4, 4]
    kept = {heads[0].name: [1, 3], heads[1].name: [0], heads[2].name: [0, 1, 2]}
    for group in heads:
        (output,) = group.outputs
        scale = torch.zeros(4, dtype=torch.float64)
        scale[kept[group.name]] = 1
        scale = scale.repeat_interleave(output.in_features // 4)
        masked.get_submodule(output.module).register_forward_pre_hook(
            lambda _, args, scale=scale: (args[0] * scale,)
        )
    prune_base(pruned, find_groups(pruned), kept)
    layer = pruned.model.layers[1].self_attn
    assert layer.q_proj.out_features == layer.o_proj.in_features == layer.head_dim
    assert layer.k_proj.out_features == layer.v_proj.out_features == layer.head_dim
    with torch.no_grad(), all_in_float64():
        for padding in (None, "left", "right"):
            batch = batch_for(family, "causal-lm", padding=padding, labels=False)
            assert torch.allclose(pruned(**batch).logits, masked(**batch).logits, rtol=0, atol=1e-10)
        ids = batch_for(family, "causal-lm", labels=False)["input_ids"]
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
        assert torch.equal(pruned.generate(ids, **options), masked.generate(ids, **options))
