"""TokenTune on every architecture that the installed transformers can build small: exact, or refused by name.

    OMP_NUM_THREADS=1 python benchmarks/tokentune_sweep.py [--only llama] [--task causal-lm]

Each architecture is built at random from a shrunk config, in float64, in a process of its own. Where
TokenTune attaches, its loss and all gradients are compared with the brute-force reference of the tests (half
of the tokens chosen, rows padded) and with ordinary training (all tokens chosen) on a batch that attaching
has not seen. Outcomes: `exact`, `refused` (with the reason), `wrong` (attached, but not equal: must not
happen), `not built` (no small model, or it does not train by itself). Writes
benchmarks/results/tokentune_sweep.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.auto import modeling_auto as auto  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

from leantune.errors import UserError  # noqa: E402
from leantune.tokentune import TokenTuneConfig, token_tune  # noqa: E402
from tests.tiny_models import all_in_float64  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "tokentune_sweep.json"
TABLES = {
    "causal-lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
TOLERANCE = 1e-7
WIDTH, HEADS, HEAD, VOCAB, LAYERS = 32, 4, 8, 99, 3
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "n_embed", "embed_dim", "emb_dim"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size", "attention_hidden_size", "d_embed"), WIDTH),
    **dict.fromkeys(("hidden_size_per_layer_input", "pooler_hidden_size", "classifier_proj_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "d_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "mlp_hidden_size", "dense_ffn"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim"), HEAD),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "global_head_dim", "swa_head_dim", "kv_channels"), HEAD),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k", "top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "local_attention", "window_size"), 4),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "rotary_dim": 4,
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "query_pre_attn_scalar": HEAD,
    "num_labels": 3,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def shrunk(config: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """A config's plain data with every known size made small, sub-configs too."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("config"):
            value = shrunk(value, small)
        elif name in IDS:
            value = IDS[name]
        elif name.endswith("token_id") and isinstance(value, int):
            value = 3
        elif name in small and value is not None and not isinstance(value, (list, tuple)):
            value = small[name]
        elif _is_dropout(name) and value:
            value = 0.0
        elif name == "layer_types" and isinstance(value, (list, tuple)):
            value = _kinds(value)
        elif isinstance(value, (list, tuple)) and len(value) > LAYERS and "layer" in name:
            value = list(value[:LAYERS])
        out[name] = value
    return out


def _kinds(types: list[str]) -> list[str]:
    """Three layer types that show every kind that the default has, as far as three can."""
    kinds = list(dict.fromkeys(types))
    return (kinds * LAYERS)[:LAYERS] if len(kinds) < LAYERS else kinds[:LAYERS]


CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": HEADS},
    {"hidden_size": 64, "head_dim": 16},
    {"qk_rope_head_dim": 4, "head_dim": 4},
    {"patch_size": 4},
    {"num_key_value_heads": HEADS, "qk_rope_head_dim": 16, "head_dim": 16},
)


def configs(cls: Any, model_type: str) -> Any:
    """Small configs to try, in order: from the class's own arguments, then by editing its plain data."""
    for change in CHANGES:
        small = SMALL | change
        for config_class in dict.fromkeys((cls.config_class, CONFIG_MAPPING[model_type])):
            default = config_class().to_dict()
            known = {
                k: v
                for k, v in small.items()
                if k in default and not isinstance(default[k], (list, tuple, dict))
            }
            off = {k: 0.0 for k, v in default.items() if _is_dropout(k) and isinstance(v, float)}
            yield lambda c=config_class, k=known, o=off: c(**k, **o, **IDS, num_labels=3)
            yield lambda c=config_class, d=default, s=small: c.from_dict(shrunk(d, s))


def _is_dropout(name: str) -> bool:
    return any(part in name for part in ("dropout", "pdrop", "drop_path", "drop_rate", "jitter_noise"))


def build(model_type: str, class_name: str, task: str) -> Any:
    """A small random float64 model that trains on the batch, and the batch; or why there is none."""
    cls, reason = getattr(transformers, class_name), ""
    for make in configs(cls, model_type):
        try:
            config = make()
            for part in (config, config.get_text_config()):
                part.use_cache, part._experts_implementation, part.num_labels = False, "eager", 3
                for name, value in IDS.items():
                    if getattr(part, name, None) is None or getattr(part, name) == -1:
                        setattr(part, name, value)
            config._attn_implementation = "eager"
            torch.manual_seed(0)
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > 30e6:
                reason = reason or f"{size / 1e6:.0f} M parameters when shrunk"
                continue
            model = cls(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.1)
                if parameter.dim() == 1:
                    parameter.data += 0.5
            model = model.double().eval()
            batch = batch_of(model, task)
            with all_in_float64():
                loss = model.train()(**batch).loss
                loss.backward()
            if bool(torch.isfinite(loss)):
                model.zero_grad()
                return model, batch
            reason = reason or "its own loss is not finite on the batch"
        except BaseException as error:  # noqa: BLE001
            reason = reason or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
    return reason


def batch_of(model: Any, task: str) -> dict[str, torch.Tensor]:
    """Three rows of 11 tokens (two of them padded at the end), or three images, with labels."""
    draw = torch.Generator().manual_seed(5)
    if task == "image":
        from leantune.anatomy import example

        one = example(model, "classification")["pixel_values"]
        pixels = torch.randn(3, *one.shape[1:], generator=draw).double()
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2])}
    ids = torch.randint(5, VOCAB, (3, 11), generator=draw)
    real = torch.arange(11) < torch.tensor([11, 9, 7])[:, None]
    ids[torch.arange(3), real.sum(1) - 1] = 2
    ids = ids.masked_fill(~real, 0)
    batch = {"input_ids": ids, "attention_mask": real.long()}
    if task == "classification":
        return {**batch, "labels": torch.tensor([0, 1, 2])}
    labels = ids if task == "causal-lm" else torch.randint(5, VOCAB, (3, 8), generator=draw)
    hidden = torch.rand(labels.shape, generator=draw) < 0.2
    return {**batch, "labels": labels.masked_fill(hidden | ~real[:, : labels.size(1)], -100)}


def outcome(model_type: str, class_name: str, task: str) -> tuple[str, str]:
    """What became of one architecture: the outcome and its detail."""
    from tests.tokentune.test_exact import compare, ordinary

    built = build(model_type, class_name, task)
    if isinstance(built, str):
        return "not built", built
    model, batch = built
    try:
        with all_in_float64():
            token_tune(model, TokenTuneConfig(0.5))
            token_tune(model, None)
    except UserError as error:
        return "refused", str(error)
    try:
        errors = (compare(model, task, batch, 0.5), ordinary(model, batch))
    except BaseException as error:  # noqa: BLE001
        return "wrong", f"{type(error).__name__}: {str(error)[:160]}"
    detail = "brute force {:.1e}, all tokens {:.1e}".format(*errors)
    return ("exact" if max(errors) < TOLERANCE else "wrong"), detail


def _child(connection: Any, *case: str) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        connection.send(outcome(*case))
    except BaseException as error:  # noqa: BLE001
        connection.send(("not built", f"{type(error).__name__}: {str(error)[:120]}"))


def isolated(*case: str, seconds: int = 60) -> tuple[str, str]:
    """`outcome` in a process of its own, so that no architecture can take the sweep down."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(theirs, *case))
    process.start()
    try:
        return ours.recv() if ours.poll(seconds) else ("not built", f"took more than {seconds} s")
    except EOFError:
        return "not built", "its process died"
    finally:
        process.kill()
        process.join()


def main() -> None:
    """Sweep and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only")
    parser.add_argument("--task", choices=TABLES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: dict[str, dict[str, list[str]]] = {}
    for task, table in TABLES.items():
        if arguments.task not in (None, task):
            continue
        rows[task], seen = {}, set()
        for model_type, names in table.items():
            class_name = names if isinstance(names, str) else names[0]
            if (arguments.only and arguments.only not in model_type) or class_name in seen:
                continue
            if model_type not in CONFIG_MAPPING or not hasattr(transformers, class_name):
                continue
            seen.add(class_name)
            rows[task][class_name] = list(isolated(model_type, class_name, task))
            print(task, class_name, *rows[task][class_name], flush=True)
        print(task, dict(Counter(what for what, _ in rows[task].values())), flush=True)
    counts = {task: dict(Counter(what for what, _ in r.values())) for task, r in rows.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(
        json.dumps({"versions": versions, "counts": counts, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
