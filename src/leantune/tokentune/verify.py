"""Try the two passes on a tiny batch before training: the model's own outputs and gradients, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leantune.anatomy import TOKENWISE
from leantune.errors import UserError
from leantune.tokentune.config import TokenTuneConfig
from leantune.tokentune.forward import TokenTuner
from leantune.tokentune.record import Recording

# relative error (of norms) that is put down to rounding
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 3e-2}


def verify(tuner: TokenTuner, batch: dict[str, Tensor]) -> None:
    """Compare both passes with an ordinary forward; dropout is off meanwhile.

    All tokens chosen: the same loss, and the same gradient with respect to what enters the layers. Half of
    the tokens chosen, then only early ones: the same outputs on those.

    Raises:
        UserError: They differ, or the passes fail; the model cannot be done.
    """
    plan, name = tuner.plan, type(tuner.plan.head).__name__
    tolerance = _TOLERANCE.get(plan.head.dtype, 2e-3)
    loss, logits, gradient = _run(tuner, batch, None)
    n = gradient.size(1)
    trials = [("all tokens", TokenTuneConfig(1.0)), ("half of the tokens", TokenTuneConfig(0.5, seed=1))]
    if plan.truncates:
        trials.append(("the first tokens", TokenTuneConfig(n // 3)))
    for what, config in trials:
        early = what == "the first tokens"
        fixed = torch.arange(n // 3, device=gradient.device).expand(2, -1) if early else None
        try:
            mine = _run(tuner, batch, config, fixed)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001
            first = (str(error).strip().splitlines() or [""])[0][:160]
            raise UserError(f"{name}: the two passes fail: {type(error).__name__}: {first}") from error
        expected = _at_choice(logits, tuner) if plan.task in TOKENWISE else logits
        errors = {"outputs": _error(_at_real(mine[1], tuner), _at_real(expected, tuner))}
        if what == "all tokens":
            errors |= {"loss": _error(mine[0], loss), "gradients": _error(mine[2], gradient)}
        for of, size in errors.items():
            if not size <= tolerance:
                raise UserError(
                    f"{name}: with {what} chosen, the two passes do not give the model's own {of} "
                    f"(relative error {size:.1e}); token selection cannot follow what it does"
                )


def reruns(tuner: TokenTuner, batch: dict[str, Tensor]) -> bool:
    """Whether each stretch of layers, run again, gives the recorded keys and values."""
    plan = tuner.plan
    inputs, _, _ = tuner.split(batch)
    recording = Recording(plan, lambda *_: None, rerunnable=True)
    try:
        with recording.active():
            plan.head(**inputs)
        before = {number: (call.key, call.value) for number, call in recording.calls.items()}
        for start in list(recording.starts):
            recording.rerun(plan.stretch(start))
    except Exception:  # noqa: BLE001 (then K and V are kept: nothing is lost but memory)
        return False
    after = {number: (call.key, call.value) for number, call in recording.calls.items()}
    pairs = [(a, b) for number in before for a, b in zip(before[number], after[number], strict=True)]
    tolerance = _TOLERANCE.get(plan.head.dtype, 2e-3)
    return all(a is not None and b is not None and _error(a, b) <= tolerance for a, b in pairs)


def _run(
    tuner: TokenTuner, batch: dict[str, Tensor], config: TokenTuneConfig | None, choice: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logits, and the loss's gradient at the first decoder-side layer's input (batch, n, d)."""
    plan, leaves = tuner.plan, list[Tensor]()
    number = plan.sides.index("decoder")
    layer = plan.layers[number]

    per_pass, calls = sum(x is layer for x in plan.layers), [0]

    def cut(module: nn.Module, args: Any, kwargs: Any) -> Any:
        calls[0] += 1
        if (calls[0] - 1) % per_pass:  # a shared layer runs several times; only what enters the stack is cut
            return None
        name = plan.names[number][0]
        leaves.append((args[0] if args else kwargs[name]).detach().requires_grad_())
        return ((leaves[-1], *args[1:]), kwargs) if args else (args, {**kwargs, name: leaves[-1]})

    handle = layer.register_forward_pre_hook(cut, with_kwargs=True, prepend=True)
    try:
        with torch.enable_grad():
            output = _forward(tuner, batch, config, choice)
            (gradient,) = torch.autograd.grad(output.loss, leaves[-1], allow_unused=True)
    finally:
        handle.remove()
    logits = output.logits if "logits" in output else torch.cat([output.start_logits, output.end_logits], -1)
    return (
        output.loss.detach(),
        logits.detach(),
        torch.zeros_like(leaves[-1]) if gradient is None else gradient,
    )


def _forward(tuner: TokenTuner, batch: dict[str, Tensor], config: Any, choice: Tensor | None) -> Any:
    head = tuner.plan.head
    if config is None:
        return head(**batch)
    kept, step = tuner.config, tuner.step
    tuner.config = config
    try:
        return tuner.forward(head.forward, batch if choice is None else {**batch, "token_choice": choice})
    finally:
        tuner.config, tuner.step = kept, step


def _at_choice(logits: Tensor, tuner: TokenTuner) -> Tensor:
    index = tuner.chosen["decoder"].clamp_min(0)
    return logits.gather(1, index[..., None].expand(-1, -1, logits.size(-1)))


def _at_real(logits: Tensor, tuner: TokenTuner) -> Tensor:
    if tuner.plan.task not in TOKENWISE:
        return logits
    return logits[tuner.chosen["decoder"] >= 0]


def _error(mine: Tensor, own: Tensor) -> float:
    if mine.shape != own.shape:
        return float("inf")
    scale = own.double().norm().clamp_min(1e-30)
    return float((mine.double() - own.double()).norm() / scale)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode, each module's own mode and the random state restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
