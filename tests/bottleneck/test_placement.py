"""Which layers are adapted where the config names none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from leantune.bottleneck import BottleneckConfig
from leantune.bottleneck.model import bottleneck_layers
from leantune.errors import UserError
from tests.bottleneck.conftest import base
from tests.tiny_models import tiny

# family -> layer -> (attention's output projections, the feed-forward network's)
EXPECTED = {
    "llama": ("model.layers.{}", ["self_attn.o_proj"], ["mlp.down_proj"]),
    "gpt2": ("transformer.h.{}", ["attn.c_proj"], ["mlp.c_proj"]),
    "bert": ("bert.encoder.layer.{}", ["attention.output.dense"], ["output.dense"]),
}


def names(family: str, placement: str, layers: range) -> set[str]:
    if family == "t5":
        encoder = [["layer.0.SelfAttention.o"], ["layer.1.DenseReluDense.wo"]]
        decoder = [["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"], ["layer.2.DenseReluDense.wo"]]
        blocks = [(f"{side}.block.{n}", *both) for side, both in (("encoder", encoder), ("decoder", decoder))
                  for n in range(3)]  # fmt: skip
    else:
        pattern, attention, feed_forward = EXPECTED[family]
        blocks = [(pattern.format(n), attention, feed_forward) for n in range(3)]
    return {
        f"{blocks[n][0]}.{name}"
        for n in layers
        for name in (blocks[n][1] if placement == "houlsby" else []) + blocks[n][2]
    }


def adapted(model: torch.nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in bottleneck_layers(model)}


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_placement(family: str, placement: str, tmp_path: Path, logits: Any) -> None:
    model = get_peft_model(base(family), BottleneckConfig(r=4, placement=placement, init_weights=False))
    assert adapted(model) == names(family, placement, range(6 if family == "t5" else 3))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base(family), str(tmp_path))
    assert adapted(loaded) == adapted(model)
    assert torch.equal(logits(loaded, family), logits(model, family))
    model.add_adapter("second", BottleneckConfig(r=3, placement="pfeiffer"))
    second = {name for name, layer in bottleneck_layers(model).items() if "second" in layer.r}
    assert len(second) == len(names(family, "pfeiffer", range(6 if family == "t5" else 3)))


@pytest.mark.parametrize("wanted", [1, [0, 2], [5]])
def test_layers_are_counted_over_the_whole_model(
    family: str, wanted: int | list[int], tmp_path: Path
) -> None:
    chosen = [wanted] if isinstance(wanted, int) else wanted
    config = BottleneckConfig(r=4, layers_to_transform=wanted)
    if family != "t5" and wanted == [5]:
        with pytest.raises(UserError, match=r"layers_to_transform=\[5\]: no such layers; there are 0 to 2"):
            get_peft_model(base(family), config)
        return
    model = get_peft_model(base(family), config)
    assert adapted(model) == names(family, "houlsby", chosen)
    model.save_pretrained(str(tmp_path))
    assert adapted(PeftModel.from_pretrained(base(family), str(tmp_path))) == adapted(model)


def test_layers_survive_peft_shortening_a_long_list_of_names(tmp_path: Path) -> None:
    """PEFT would look for layers 8 to 15 in the decoder's own count when it reads the shortened names."""
    settings = {"num_layers": 8, "dtype": torch.float32}
    config = BottleneckConfig(r=2, layers_to_transform=list(range(8, 16)))
    model = get_peft_model(tiny("t5", "seq2seq", **settings), config)
    assert len(adapted(model)) == 24 and all(".decoder" in f".{name}" for name in adapted(model))
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny("t5", "seq2seq", **settings), str(tmp_path))
    assert adapted(loaded) == adapted(model)


def test_exclude_modules_and_transformers_own_way() -> None:
    config = BottleneckConfig(r=4, exclude_modules=["layers.1.mlp.down_proj"])
    expected = names("llama", "houlsby", range(3)) - {"model.layers.1.mlp.down_proj"}
    assert adapted(get_peft_model(base("llama"), config)) == expected
    plain = base("llama")
    plain.add_adapter(BottleneckConfig(r=4, placement="pfeiffer"))
    assert adapted(plain) == names("llama", "pfeiffer", range(3))


def test_a_model_inside_another() -> None:
    outer = torch.nn.ModuleDict({"inner": base("llama")})
    model = get_peft_model(outer, BottleneckConfig(r=4))
    assert adapted(model) == {f"inner.{name}" for name in names("llama", "houlsby", range(3))}
