"""Tiny random models of every family that leantune promises to work on, and batches for them.

    model = tiny("llama", "causal-lm")                  # float64, eval mode, weights drawn with seed 0
    batch = batch_for(model, "causal-lm", padding="left")
    loss = model(**batch).loss

Every model has three layers, a hidden size of 32 and a vocabulary of 99, so a forward and backward pass
costs milliseconds. Dropout is 0 unless asked for; the KV cache is off. transformers casts to float32 in
places (norms, softmax, losses) even where weights are float64, which costs precision and turns fully masked
rows of eager attention into NaN: wrap comparisons to 1e-9 in `with all_in_float64(): ...`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

VOCAB, HIDDEN, LABELS = 99, 32, 3
PAD, BOS, EOS = 0, 1, 2

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "num_labels": LABELS,
    "classifier_dropout": 0.0,
}
_COMMON: dict[str, Any] = {
    **_TEXT,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DECODER: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "attention_dropout": 0.0, "use_cache": False}
_ENCODER: dict[str, Any] = {**_COMMON, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GEMMA: dict[str, Any] = {**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
_GEMMA["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]

# family -> (class stem, config class, settings, tasks)
CAUSAL, SEQ, TOK, MLM, QA, S2S, IMAGE = (
    "causal-lm",
    "classification",
    "tokens",
    "masked-lm",
    "qa",
    "seq2seq",
    "image",
)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("Llama", "LlamaConfig", _DECODER, (CAUSAL, SEQ, TOK, QA)),
    "mistral": ("Mistral", "MistralConfig", {**_DECODER, "sliding_window": 4}, (CAUSAL, SEQ, TOK, QA)),
    "mixtral": (
        "Mixtral",
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        (CAUSAL, SEQ, TOK, QA),
    ),
    "qwen2": ("Qwen2", "Qwen2Config", _DECODER, (CAUSAL, SEQ, TOK, QA)),
    "qwen3": ("Qwen3", "Qwen3Config", {**_DECODER, "head_dim": 8}, (CAUSAL, SEQ, TOK, QA)),
    "gemma2": ("Gemma2", "Gemma2Config", _GEMMA, (CAUSAL, SEQ, TOK)),
    "gemma3": ("Gemma3", "Gemma3TextConfig", _GEMMA, (CAUSAL, SEQ)),
    "phi": (
        "Phi",
        "PhiConfig",
        {**_DECODER, "num_key_value_heads": 4, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        (CAUSAL, SEQ, TOK),
    ),
    "gpt2": (
        "GPT2",
        "GPT2Config",
        {
            **_TEXT,
            "n_embd": HIDDEN,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "use_cache": False,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        },
        (CAUSAL, SEQ, TOK, QA),
    ),
    "opt": (
        "OPT",
        "OPTConfig",
        {**_COMMON, "ffn_dim": 64, "dropout": 0.0, "word_embed_proj_dim": HIDDEN, "use_cache": False},
        (CAUSAL, SEQ, QA),
    ),
    "bert": ("Bert", "BertConfig", _ENCODER, (MLM, SEQ, TOK, QA)),
    "roberta": (
        "Roberta",
        "RobertaConfig",
        {**_ENCODER, "max_position_embeddings": 70},
        (MLM, SEQ, TOK, QA),
    ),
    "electra": ("Electra", "ElectraConfig", {**_ENCODER, "embedding_size": 16}, (MLM, SEQ, TOK, QA)),
    "distilbert": (
        "DistilBert",
        "DistilBertConfig",
        {
            **_TEXT,
            "dim": HIDDEN,
            "hidden_dim": 64,
            "n_layers": 3,
            "n_heads": 4,
            "max_position_embeddings": 64,
            **dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"), 0.0),
        },
        (MLM, SEQ, TOK, QA),
    ),
    "modernbert": (
        "ModernBert",
        "ModernBertConfig",
        {
            **_COMMON,
            "local_attention": 6,
            "global_attn_every_n_layers": 2,
            "cls_token_id": BOS,
            "sep_token_id": EOS,
        },
        (MLM, SEQ, TOK, QA),
    ),
    "deberta-v2": (
        "DebertaV2",
        "DebertaV2Config",
        {
            **_ENCODER,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,
            "position_buckets": 8,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "pooler_hidden_size": HIDDEN,
            "pooler_dropout": 0.0,
        },
        (MLM, SEQ, TOK, QA),
    ),
    "bart": (
        "Bart",
        "BartConfig",
        {
            **_TEXT,
            "d_model": HIDDEN,
            "decoder_start_token_id": EOS,
            "forced_eos_token_id": None,
            "max_position_embeddings": 64,
            "use_cache": False,
            **dict.fromkeys(("encoder_layers", "decoder_layers"), 3),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
            **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
        },
        (S2S, SEQ),
    ),
    "t5": (
        "T5",
        "T5Config",
        {
            **_TEXT,
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 3,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "decoder_start_token_id": PAD,
            "use_cache": False,
        },
        (S2S,),
    ),
    "vit": (
        "ViT",
        "ViTConfig",
        {
            **{k: v for k, v in _ENCODER.items() if k not in _TEXT and k != "max_position_embeddings"},
            "num_labels": LABELS,
            "image_size": 16,
            "patch_size": 4,
        },
        (IMAGE,),
    ),
}
# deberta-v3 is the v2 code with the settings of the released v3 models
_FAMILIES["deberta-v3"] = _FAMILIES["deberta-v2"]
_FAMILIES["deberta-v2"] = (
    *_FAMILIES["deberta-v2"][:2],
    {
        **_FAMILIES["deberta-v2"][2],
        "share_att_key": False,
        "position_buckets": -1,
        "max_relative_positions": 64,
    },
    _FAMILIES["deberta-v2"][3],
)

FAMILIES: dict[str, tuple[str, ...]] = {name: row[3] for name, row in _FAMILIES.items()}

_SUFFIX = {
    CAUSAL: "ForCausalLM",
    SEQ: "ForSequenceClassification",
    TOK: "ForTokenClassification",
    MLM: "ForMaskedLM",
    QA: "ForQuestionAnswering",
    S2S: "ForConditionalGeneration",
    IMAGE: "ForImageClassification",
    "base": "Model",
}
_ODD_NAMES = {
    "GPT2ForCausalLM": "GPT2LMHeadModel",
    "Gemma3ForSequenceClassification": "Gemma3TextForSequenceClassification",
    "Gemma3Model": "Gemma3TextModel",
}


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Casts of float64 tensors to float32 do nothing inside this context (backward and replays included)."""
    places: list[tuple[Any, str]] = [(Tensor, "float"), (Tensor, "to"), (Tensor, "softmax"), (F, "softmax")]
    places += [(F, "log_softmax"), (torch, "softmax"), (torch, "log_softmax")]
    originals = [getattr(owner, name) for owner, name in places]

    def stays(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.dtype != torch.float64:
                return original(x, *args, **kwargs)
            if name == "float":
                return x
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            return original(x, *args, **kwargs)

        return call

    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, stays(original, name))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def tiny(
    family: str,
    task: str = CAUSAL,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attn_implementation: str = "eager",
    **config_overrides: Any,
) -> transformers.PreTrainedModel:
    """A tiny random model, in eval mode.

    Args:
        family: A key of `FAMILIES`.
        task: One of `FAMILIES[family]`, or `base` for the model without a head.
        dtype: Of all weights.
        seed: Of the weights; the global random state is left as it was.
        attn_implementation: `eager` or `sdpa` (DeBERTa knows eager only, and takes no notice; Gemma 2
            refuses sdpa).
        **config_overrides: Fields of the model's config.
    """
    stem, config_class, settings, tasks = _FAMILIES[family]
    if task not in (*tasks, "base"):
        raise ValueError(f"{family} has no task {task!r}; known: {', '.join(tasks)}")
    if task == QA:
        settings = {**settings, "num_labels": 2}
    config = getattr(transformers, config_class)(**{**settings, **config_overrides})
    config._experts_implementation = "eager"  # the grouped kernel knows no float64
    config._attn_implementation = "eager" if stem == "DebertaV2" else attn_implementation
    name = stem + _SUFFIX[task]
    cls = getattr(transformers, _ODD_NAMES.get(name, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
        for parameter in model.parameters():  # larger than the usual 0.02, and no zeros: every path matters
            torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1:
                parameter.data += 0.5
    return model.to(dtype).eval()


def batch_for(
    model: str | transformers.PreTrainedModel,
    task: str = CAUSAL,
    batch: int = 3,
    length: int = 12,
    padding: str | None = None,
    labels: bool = True,
    masked: float = 0.3,
    seed: int = 1,
) -> dict[str, Tensor]:
    """Keyword arguments of one training forward.

    Args:
        model: A model or a family's name.
        task: As in `tiny`.
        batch: Rows.
        length: Tokens per row, padding included (decoder side: three fewer).
        padding: `None` (all rows full, and no attention mask), `right` or `left` (rows of different lengths).
        labels: Whether to add labels (QA: start and end positions).
        masked: Share of token labels set to -100; a padded position's label is always -100.
        seed: Of the draw; the global random state is left as it was.
    """
    family = model if isinstance(model, str) else model.config.model_type
    draw = torch.Generator().manual_seed(seed)
    if task == IMAGE:
        images = torch.randn(batch, 3, 16, 16, generator=draw, dtype=torch.float64)
        if not isinstance(model, str):
            images = images.to(model.dtype)
        return {"pixel_values": images, **({"labels": torch.arange(batch) % LABELS} if labels else {})}
    ids = torch.randint(5, VOCAB, (batch, length), generator=draw)  # (batch, length)
    if padding is None:
        real = torch.ones(batch, length, dtype=torch.bool)
    else:
        sizes = torch.tensor([length - (2 * row) % (length // 2) for row in range(batch)])
        real = torch.arange(length) < sizes[:, None]
        real = real.flip(1) if padding == "left" else real
    if family == "bart" and task == SEQ:  # it pools the one </s> of a row
        last = (real.long() * torch.arange(1, length + 1)).argmax(1)
        ids[torch.arange(batch), last] = EOS
    out = {"input_ids": ids.masked_fill(~real, PAD)}
    if padding is not None:
        out["attention_mask"] = real.long()
    if labels:
        out |= _labels(task, ids, real, draw, masked)
    return out


def _labels(task: str, ids: Tensor, real: Tensor, draw: torch.Generator, masked: float) -> dict[str, Tensor]:
    batch, length = ids.shape
    if task == SEQ:
        return {"labels": torch.arange(batch) % LABELS}
    if task == QA:
        order = real.long() * torch.arange(1, length + 1)
        return {"start_positions": real.long().argmax(1), "end_positions": order.argmax(1)}
    if task == S2S:
        labels = torch.randint(5, VOCAB, (batch, length - 3), generator=draw)
        real = real[:, :1] | (
            torch.arange(length - 3) < torch.arange(length - 3, length - 3 - batch, -1)[:, None]
        )
    else:
        labels = torch.randint(0, LABELS, ids.shape, generator=draw) if task == TOK else ids.clone()
    hidden = torch.rand(labels.shape, generator=draw) < masked
    return {"labels": labels.masked_fill(hidden | ~real, -100)}
