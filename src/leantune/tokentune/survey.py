"""Make the plan of a model, or say by name why there can be none."""

from __future__ import annotations

import inspect
from collections import Counter
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from leantune.anatomy import (
    TOKENWISE,
    Kernel,
    Pooling,
    Side,
    argument_names,
    attention_handled_by,
    decoder_inputs,
    disentangled_forward,
    example,
    find_stacks,
    find_task,
    is_disentangled,
    poolings,
)
from leantune.errors import UserError
from leantune.tokentune.passes import shadow
from leantune.tokentune.plan import Plan


def make_plan(head: PreTrainedModel) -> tuple[Plan, dict[str, Tensor]]:
    """Try an ordinary forward on a tiny batch and note what runs when.

    Returns:
        The plan and the batch.

    Raises:
        UserError: The model has something that token selection cannot do, named.
    """
    _refuse_settings(head)
    task, stacks = find_task(head), find_stacks(head)
    batch = example(head, task)
    trace = _Trace(head, {id(layer): stack.side for stack in stacks for layer in stack.layers})
    trace.run(_inputs(head, task, batch))
    _refuse_layers(head, trace)
    _refuse_noise(head, _inputs(head, task, batch))
    modules = list(head.modules())
    plan = Plan(
        head=head,
        task=task,
        stacks=stacks,
        layers=tuple(trace.layers),
        sides=tuple(trace.sides),
        calls=tuple(trace.calls[i] for i in range(len(trace.layers))),
        arity=trace.arity,
        names=tuple(argument_names(layer) for layer in trace.layers),
        pooling=None if task in TOKENWISE else _find_pooling(head, task, trace.layers[-1], batch),
        disentangled=tuple(m for m in modules if is_disentangled(m)),
        biased=tuple(
            m for m in modules if hasattr(m, "compute_bias") and hasattr(m, "relative_attention_bias")
        ),
        parameters=frozenset(inspect.signature(type(head).forward).parameters),
        has_special=task not in ("causal-lm", "seq2seq") and not trace.causal,
        truncates=task == "causal-lm",
    )
    plan.shifts = task != "causal-lm" or _shifts(head, batch)
    if plan.pooling is not None and plan.pooling.position is None:
        # such a head reads padding, too, whose gradient is not followed: compare without
        batch = example(head, task, padded=False)
    return plan, batch


def _inputs(head: PreTrainedModel, task: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without its targets."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")}
    return inputs | (
        {"decoder_input_ids": decoder_inputs(head, batch["labels"])} if task == "seq2seq" else {}
    )


def _refuse_settings(head: PreTrainedModel) -> None:
    configs = [head.config, *(c for c in vars(head.config).values() if hasattr(c, "_attn_implementation"))]
    name = type(head).__name__
    for config in configs:
        used = getattr(config, "_attn_implementation", None)
        if used not in (None, "eager", "sdpa"):
            raise UserError(
                f"{name} uses attn_implementation={used!r}, which cannot take chosen rows of a mask: "
                "load it with attn_implementation='sdpa' (or 'eager')"
            )
        if getattr(config, "output_router_logits", False):
            raise UserError(
                f"{name} has output_router_logits=True: the router's auxiliary loss counts every token; "
                "set config.output_router_logits=False"
            )
        for setting in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            if getattr(config, setting, 0):
                raise UserError(f"{name} drops layers at random, differently in both passes: set {setting}=0")


class _Trace:
    """What an ordinary forward runs: layers in order, and the attention calls in each."""

    def __init__(self, head: PreTrainedModel, sides: dict[int, Side]) -> None:
        self.head, self.known = head, sides
        self.layers: list[nn.Module] = []
        self.sides: list[Side] = []
        self.calls: Counter[int] = Counter()
        self.arity: int | None = None
        self.causal = False
        self._open = False

    def run(self, inputs: dict[str, Tensor]) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(attention_handled_by(self._attend))
            for module in self.head.modules():
                if id(module) in self.known:
                    stack.callback(module.register_forward_pre_hook(self._enter, prepend=True).remove)
                    stack.callback(module.register_forward_hook(self._leave).remove)
                elif is_disentangled(module):
                    shadow(stack, module, "forward", MethodType(disentangled_forward, module))
            try:
                self.head(**inputs)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 (whatever a model raises is the reason to name)
                raise UserError(
                    f"{type(self.head).__name__} fails on a tiny batch: {_short(error)}"
                ) from error

    def _enter(self, layer: nn.Module, args: Any) -> None:
        self.layers.append(layer)
        self.sides.append(self.known[id(layer)])
        self._open = True

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._open = False
        self.arity = None if isinstance(output, Tensor) else len(output)

    def _attend(
        self,
        kernel: Kernel,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        /,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self._open:
            self.calls[len(self.layers) - 1] += 1
            self.causal = self.causal or bool(getattr(module, "is_causal", False))
        return kernel(module, query, key, value, mask, **kwargs)


def _short(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:160]}"


def _refuse_layers(head: PreTrainedModel, trace: _Trace) -> None:
    name = type(head).__name__
    if not trace.layers:
        raise UserError(f"{name} runs none of its layers on a tiny batch")
    for number, layer in enumerate(trace.layers):
        if not trace.calls[number]:
            raise UserError(
                f"{name}: layer {number} ({type(layer).__name__}) makes no call through transformers' "
                "attention interface; it mixes tokens in a way that token selection cannot follow"
            )
    changes = sum(a != b for a, b in zip(trace.sides, trace.sides[1:], strict=False))
    if changes > 1 or trace.sides[-1] != "decoder":
        raise UserError(f"{name} runs its encoder and decoder layers in an unknown order")


class _NoDropout(TorchFunctionMode):
    """Dropout does nothing inside, in training mode too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.dropout, torch.dropout):
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def _refuse_noise(head: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Refuse what draws random numbers in training besides dropout (noisy routers, stochastic depth)."""
    modules = list(head.modules())
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
        raise UserError(
            f"{type(head).__name__} has batch normalisation, which mixes sequences and counts each pass"
        )
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            shadow(stack, module, "training", True)
            if getattr(module, "gradient_checkpointing", False):
                shadow(stack, module, "gradient_checkpointing", False)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_NoDropout())
        for seed in (0, 1):
            torch.manual_seed(seed)  # the caller restores the random state
            output = head(**inputs)
            outputs.append(output["logits"] if "logits" in output else output["start_logits"])
    if not torch.equal(*outputs):
        raise UserError(
            f"{type(head).__name__} draws random numbers in training besides dropout (router noise, "
            "stochastic depth), differently in both passes: switch that off in its config"
        )


def _shifts(head: PreTrainedModel, batch: dict[str, Tensor]) -> bool:
    """Whether the model's loss compares token t with label t + 1 rather than with label t."""
    with torch.no_grad():
        output = head(**batch)
    logits, labels = output.logits.float(), batch["labels"]
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    straight = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return bool((output.loss - shifted).abs() <= (output.loss - straight).abs())


def _find_pooling(head: PreTrainedModel, task: str, last: nn.Module, batch: dict[str, Tensor]) -> Pooling:
    """Which positions feed the head: where its output has a gradient with respect to the last layer's."""
    everything = Pooling("sequence", None)
    if task == "question-answering":
        return everything
    leaves: list[Tensor] = []

    def cut(layer: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        leaves.append(hidden.detach().requires_grad_())
        return leaves[-1] if isinstance(output, Tensor) else (leaves[-1], *output[1:])

    handle = last.register_forward_hook(cut)
    inputs = _inputs(head, task, batch)
    try:
        with torch.enable_grad():
            logits = head(**inputs).logits
            weight = torch.linspace(1, 2, logits.numel(), device=logits.device).view_as(logits)
            (gradient,) = torch.autograd.grad((logits * weight.to(logits.dtype)).sum(), leaves[-1])
    finally:
        handle.remove()
    touched = gradient.abs().sum(-1) > 0  # (batch, n)
    for rule in poolings(head):
        assert rule.position is not None
        position = rule.position(batch, touched.size(1))
        if bool((touched.sum(1) == 1).all()) and bool(touched.gather(1, position[:, None]).all()):
            return rule
    return everything
