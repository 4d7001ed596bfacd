"""Attach TokenTune to a model, take it off again, and its state as plain data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from leantune.anatomy import Side, find_head
from leantune.errors import UserError
from leantune.tokentune.config import TokenTuneConfig
from leantune.tokentune.forward import TokenTuner
from leantune.tokentune.passes import after_base, after_layer, before_layer
from leantune.tokentune.score import check_strategy
from leantune.tokentune.survey import make_plan
from leantune.tokentune.verify import evaluation_mode, reruns
from leantune.tokentune.verify import verify as verify_passes

_ATTRIBUTE = "_leantune_tokens"


def token_tune(model: nn.Module, config: TokenTuneConfig | None, *, verify: bool = True) -> Any:
    """Back-propagate through chosen tokens only, from the next training forward on.

    TokenTune (Simoulin, Park et al., EMNLP 2024, arXiv 2501.18824). In `train()` mode with gradients enabled
    a forward becomes two passes (see `leantune.tokentune.passes`); in `eval()` mode, and in `generate()`,
    nothing changes. The output's `logits` are those of the chosen tokens, (batch, k, …), for heads with one
    output per token, and its `loss` is the mean over the chosen tokens that bear a label.

    Args:
        model: A transformers model with a head, plain or wrapped (PEFT, DDP, …). Attach before or after the
            adapter, and before `Trainer` sees the model.
        config: What to choose; None takes TokenTune off again.
        verify: Try the two passes first. False only where the weights are no numbers (fake tensors).

    Returns:
        The same object.

    Raises:
        UserError: The model cannot be done, with the reason by name. Attaching tries both passes once on a
            tiny batch and refuses where they do not give the model's own outputs and gradients.
    """
    head = find_head(model)
    _detach(head)
    if config is None:
        return model
    with evaluation_mode(head):
        plan, batch = make_plan(head)
        check_strategy(config.strategy, plan)
        tuner = TokenTuner(plan, config)
        _hook(tuner)
        try:
            if verify:
                _settle(tuner, batch)
            plan.reruns = reruns(tuner, batch) if verify else True
        except BaseException:
            _unhook(tuner)
            raise
    tuner.chosen = {}
    head.__dict__[_ATTRIBUTE] = tuner
    head.__dict__["forward"] = MethodType(
        _tuned_forward(type(head).forward, head.__dict__.get("forward")), head
    )
    return model


def check(model: nn.Module) -> str | None:
    """Why TokenTune cannot work on this model, in one line; None if it can. Leaves the model as it was."""
    attached = tuner_of(find_head(model))
    if attached is not None:
        return None
    try:
        token_tune(model, TokenTuneConfig())
    except UserError as error:
        return str(error)
    token_tune(model, None)
    return None


def chosen_tokens(model: nn.Module, side: Side = "decoder") -> Tensor:
    """Positions chosen in the last training forward.

    Args:
        model: With TokenTune attached.
        side: `decoder` (the sequence that the head reads; the only one of most models) or `encoder`.

    Returns:
        (batch, k) int64, ascending, padded with -1.

    Raises:
        UserError: TokenTune is not attached, or no training forward has run.
    """
    tuner = _tuner(model)
    if side not in tuner.chosen:
        raise UserError(f"no {side} tokens were chosen yet: run a training forward first")
    return tuner.chosen[side]


def has_tokens(model: nn.Module) -> bool:
    """Whether TokenTune is attached."""
    return tuner_of(find_head(model)) is not None


def token_state(model: nn.Module) -> dict[str, int]:
    """What the next choice depends on besides the rank: `{"seed", "step"}`, plain data."""
    tuner = _tuner(model)
    return {"seed": tuner.config.seed, "step": tuner.step}


def set_token_state(model: nn.Module, state: dict[str, int], collators: bool = True) -> None:
    """Continue where `state` (of `token_state`) was taken.

    Args:
        model: With TokenTune attached.
        state: From `token_state`.
        collators: A `ChoosingCollator` continues there as well: for a resumed run. False for a step that is
            done anew with the batches that were made for it.

    Raises:
        UserError: It was taken under another seed.
    """
    tuner = _tuner(model)
    if state["seed"] != tuner.config.seed:
        raise UserError(f"the saved token state has seed {state['seed']}, the model has {tuner.config.seed}")
    tuner.step = int(state["step"])
    for collator in tuner.collators if collators else ():
        collator.calls = tuner.step


@contextmanager
def token_part(model: nn.Module, first: int, rows: int) -> Iterator[None]:
    """Forwards in here are of rows from `first` on of a batch of `rows`, and choose as for the whole."""
    tuner = _tuner(model)
    tuner.part = (first, rows)
    try:
        yield
    finally:
        tuner.part = None


def learned_tokens(model: nn.Module, forward: Callable[[], Any]) -> tuple[int, int]:
    """Tokens with a label in a batch, and how many of them are chosen; nothing of the pass is kept.

    Args:
        model: With TokenTune attached, and a tokenwise head.
        forward: A training forward on the batch.
    """
    tuner = _tuner(model)
    found: list[tuple[int, int]] = []
    tuner.on_chosen = lambda labels, chosen: found.append((int(labels.sum()), int(chosen.sum())))
    try:
        forward()
    finally:
        tuner.on_chosen = None
    return found[0]


class TokenTuneState(TrainerCallback, ExportableState):
    """Keeps TokenTune's step in the Trainer's checkpoints (`trainer_state.json`): resuming is exact."""

    def __init__(self) -> None:
        self.saved: dict[str, int] = {}
        self._model: nn.Module | None = None

    def state(self) -> dict[str, Any]:
        """Plain data, written by the Trainer."""
        current = self.saved if self._model is None else token_state(self._model)
        return {"args": {}, "attributes": {"saved": current}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Continue from the resumed checkpoint, if there is one."""
        self._model = model
        stored = state.stateful_callbacks.get("TokenTuneState") if state.global_step else None
        if stored:
            set_token_state(model, stored["attributes"]["saved"])


def tuner_of(head: PreTrainedModel) -> TokenTuner | None:
    """The tuner attached to this head model, if any."""
    return head.__dict__.get(_ATTRIBUTE)


def _tuner(model: nn.Module) -> TokenTuner:
    tuner = tuner_of(find_head(model))
    if tuner is None:
        raise UserError(
            "TokenTune is not attached to this model: call leantune.token_tune(model, config) first"
        )
    return tuner


def _tuned_forward(own: Callable[..., Any], wrapped: Callable[..., Any] | None) -> Callable[..., Any]:
    """A forward for the head that runs the two passes in training; `wrapped` is what stood there before."""

    @functools.wraps(own)  # Trainer reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = functools.partial(own, self) if wrapped is None else wrapped
        tuner = tuner_of(self)
        if tuner is None or not self.training or not torch.is_grad_enabled():
            kwargs.pop("token_choice", None)
            if "full_labels" in kwargs:  # a batch of ChoosingCollator's, but this is no training
                kwargs["labels"] = kwargs.pop("full_labels")
                kwargs.pop("num_items_in_batch", None)  # it counts the labels that are left
            return original(*args, **kwargs)
        return tuner.forward(original, kwargs | dict(zip(tuner.positional, args, strict=False)))

    forward.leantune_wrapped = wrapped  # type: ignore[attr-defined]
    return forward


def _hook(tuner: TokenTuner) -> None:
    for layer in {id(layer): layer for layer in tuner.plan.layers}.values():
        tuner.handles.append(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
        tuner.handles.append(layer.register_forward_hook(after_layer))
    if tuner.plan.head.base_model is not tuner.plan.head:
        tuner.handles.append(tuner.plan.head.base_model.register_forward_hook(after_base))


def _settle(tuner: TokenTuner, batch: dict[str, Tensor]) -> None:
    """Verify; if that fails, once more without shortcuts (truncation, gathered rows after the stack)."""
    try:
        verify_passes(tuner, batch)
    except UserError as first:
        tuner.plan.truncates, tuner.plan.full_tail = False, True
        try:
            verify_passes(tuner, batch)
        except UserError:
            raise first from None


def _unhook(tuner: TokenTuner) -> None:
    for handle in tuner.handles:
        handle.remove()


def _detach(head: PreTrainedModel) -> None:
    tuner = head.__dict__.pop(_ATTRIBUTE, None)
    if tuner is None:
        return
    _unhook(tuner)
    function: Any = getattr(head.__dict__.get("forward"), "__func__", None)
    if hasattr(
        function, "leantune_wrapped"
    ):  # else somebody wrapped it since: ours then calls the model's own
        del head.__dict__["forward"]
        if function.leantune_wrapped is not None:
            head.__dict__["forward"] = function.leantune_wrapped
