"""What anatomy reads off models: stacks, heads, per-position arguments, pooled tokens, attention."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from leantune import UserError
from leantune.anatomy import (
    attention_handled_by,
    decoder_inputs,
    example,
    find_head,
    find_stacks,
    find_task,
    is_disentangled,
    position_axis,
)
from leantune.anatomy.deberta import disentangled_kernel
from leantune.tokentune import TokenTuneConfig, token_tune
from leantune.tokentune.attach import tuner_of
from tests.tiny_models import FAMILIES, batch_for, tiny

TASKS = {
    "causal-lm": "causal-lm",
    "classification": "classification",
    "tokens": "token-classification",
    "masked-lm": "masked-lm",
    "qa": "question-answering",
    "seq2seq": "seq2seq",
    "image": "classification",
}


def test_private_names_that_we_rely_on() -> None:
    """A release of transformers or torch that moves one of these must fail here, loudly."""
    assert callable(type(ALL_ATTENTION_FUNCTIONS).get_interface)
    assert GradientCheckpointingLayer.gradient_checkpointing is False
    model = tiny("llama", dtype=torch.float32)
    assert callable(model.loss_function)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert all("_gradient_checkpointing_func" in layer.__dict__ for layer in model.model.layers)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert callable(torch.set_autocast_cache_enabled)


@pytest.mark.parametrize(("family", "task"), [(f, t) for f, tasks in FAMILIES.items() for t in tasks])
def test_tasks_and_stacks(family: str, task: str) -> None:
    model = tiny(family, task, dtype=torch.float32)
    assert find_task(model) == TASKS[task]
    stacks = find_stacks(model)
    assert [stack.side for stack in stacks] == (["encoder"] if family in ("bart", "t5") else []) + ["decoder"]
    assert all(len(stack.layers) == 3 for stack in stacks)


def test_the_head_inside_a_wrapper() -> None:
    model = tiny("llama", dtype=torch.float32)
    assert find_head(model) is model
    assert find_head(peft.get_peft_model(model, peft.LoraConfig(r=2))) is model
    with pytest.raises(UserError, match="no transformers model"):
        find_head(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("position_embeddings", (1, 13, 8), 1),
        ("position_ids", (2, 13), 1),
        ("per_layer_input", (2, 13, 32), 1),
        ("cos", (1, 1, 13, 8), 2),
        ("rope", (13, 8), 0),
        ("attention_mask", (2, 1, 13, 13), None),
        ("attention_mask", (2, 13), None),
        ("position_bias", (1, 4, 13, 13), None),
        ("encoder_hidden_states", (2, 13, 32), None),
        ("other", (2, 7, 32), None),
    ],
)
def test_arguments_whose_rows_belong_to_tokens(name: str, shape: tuple[int, ...], axis: int | None) -> None:
    assert position_axis(name, torch.zeros(shape), 2, 13) == axis


@pytest.mark.parametrize(
    ("family", "task", "rule"),
    [
        ("bert", "classification", "first"),
        ("distilbert", "classification", "first"),
        ("vit", "image", "first"),
        ("llama", "classification", "last"),
        ("gpt2", "classification", "last"),
        ("bart", "classification", "eos"),
        ("bert", "qa", "sequence"),
    ],
)
def test_pooled_position_is_measured(family: str, task: str, rule: str) -> None:
    model = tiny(family, task, dtype=torch.float32)
    token_tune(model, TokenTuneConfig(0.5))
    assert tuner_of(model).plan.pooling.name == rule


def test_mean_pooling_is_seen_as_such() -> None:
    model = tiny("modernbert", "classification", dtype=torch.float32, classifier_pooling="mean")
    token_tune(model, TokenTuneConfig(0.5))
    assert tuner_of(model).plan.pooling.name == "sequence"


def test_every_attention_call_reaches_the_handler_and_nothing_stays_behind() -> None:
    model, batch = tiny("llama", dtype=torch.float32), batch_for("llama", labels=False)
    own, seen = model(**batch).logits, []

    def handler(kernel: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        return kernel(module, *args, **kwargs)

    with attention_handled_by(handler):
        assert torch.equal(model(**batch).logits, own)
    assert seen == [layer.self_attn for layer in model.model.layers]
    model(**batch)
    assert len(seen) == 3
    assert "get_interface" not in ALL_ATTENTION_FUNCTIONS.__dict__


@pytest.mark.parametrize("family", ["deberta-v2", "deberta-v3"])
def test_disentangled_attention_of_some_queries(family: str) -> None:
    """Rows of the kernel with k queries are those of the model's own attention with n."""
    model, batch = tiny(family, "masked-lm"), batch_for(family, "masked-lm", padding="right", labels=False)
    module = next(m for m in model.modules() if is_disentangled(m))
    caught: dict[str, Any] = {}

    def catch(m: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        caught.update(kwargs, hidden=args[0], mask=args[1], output=output[0])

    handle = module.register_forward_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
        handle.remove()
        x, rows = caught["hidden"], torch.tensor([0, 3, 4, 9])

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (4, -1)).transpose(1, 2)

        output, _ = disentangled_kernel(
            module,
            heads(module.query_proj(x[:, rows])),
            heads(module.key_proj(x)),
            heads(module.value_proj(x)),
            caught["mask"].bool()[:, :, rows],
            query_rows=caught["relative_pos"][:, rows],
            rel_embeddings=caught["rel_embeddings"],
        )
    assert torch.allclose(output.flatten(2), caught["output"][:, rows], rtol=1e-10)


def test_example_batches_fit_their_model() -> None:
    for family, tasks in FAMILIES.items():
        model = tiny(family, tasks[0], dtype=torch.float32)
        with torch.no_grad():
            assert torch.isfinite(model(**example(model, find_task(model))).loss)


def test_decoder_inputs_are_the_labels_shifted() -> None:
    labels = torch.tensor([[7, 8, -100]])
    assert decoder_inputs(tiny("t5", "seq2seq", dtype=torch.float32), labels).tolist() == [[0, 7, 8]]
