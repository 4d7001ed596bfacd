"""One optimizer step as the Trainer does it, with marks where its parts begin; fake and real alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from leantune.anatomy import find_head
from leantune.lightpeft.estimation import estimation_of
from leantune.planner.setting import Setting, arguments
from leantune.run.tasks import make_task

IGNORED = -100
Mark = Callable[[str], None]


def make_batch(setting: Setting) -> dict[str, Tensor]:
    """A batch of random tokens, every row as long as it may be (if padded: every other one a token less)."""
    draw = torch.Generator().manual_seed(0)
    text = setting.config.get_text_config()
    pad = text.pad_token_id if isinstance(getattr(text, "pad_token_id", None), int) else 0
    size = (setting.batch, setting.length)
    ids = torch.randint(0, max(2, text.vocab_size - 1), size, generator=draw)
    ids += (ids >= pad).long() if 0 <= pad < text.vocab_size else 0  # (batch, n): every token but padding
    mask = torch.ones_like(ids)
    if setting.padded and setting.length > 1:
        ids[1::2, -1], mask[1::2, -1] = pad, 0
        if setting.batch == 1:
            ids[0, -1], mask[0, -1] = pad, 0
    task = setting.recipe.model.task
    if task == "causal-lm":
        labels = ids.masked_fill(mask == 0, IGNORED)
    elif task == "regression":
        labels = torch.zeros(setting.batch)
    else:
        labels = torch.zeros(setting.batch, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def make_optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """AdamW as the Trainer makes it, with the state that it has after a first step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=setting.fused or None)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not setting.accumulates:
        optimizer.zero_grad(set_to_none=True)
    return optimizer


class Step:
    """A training step of one model.

    Args:
        model: From `build_fake` or `build_real`.
        optimizer: From `make_optimizer`.
        setting: What both were made for.
        mark: Told when a part of the step begins: `forward`, `head`, `head backward`, `backward`,
            `optimizer`.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting, mark: Mark | None = None
    ) -> None:
        self.model, self.optimizer, self.setting = model, optimizer, setting
        self.mark: Mark = mark or (lambda phase: None)

    def run(self, batch: dict[str, Tensor], saved: Saved | None = None) -> None:
        """Forward, backward, clipping, update.

        Args:
            batch: From `make_batch`.
            saved: Takes note of what autograd holds.
        """
        estimation = estimation_of(self.model)
        if estimation is not None:
            estimation.begin_step(measure=True)
        with self._marked(), kernels(self.setting):
            self.mark("forward")
            with nullcontext() if saved is None else saved.hooks():
                loss = self._loss(batch)
            if saved is not None:
                saved.note()
            self.mark("head backward")
            loss.backward()
            del loss
        self.mark("optimizer")
        limit = float(arguments(self.setting.recipe).get("max_grad_norm", 1.0))
        if limit:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if estimation is not None:
            estimation.step()
        self.optimizer.step()

    def evaluate(self, batch: dict[str, Tensor]) -> None:
        """A batch of an evaluation between two steps: logits, and what is kept of them."""
        self.model.eval()
        with torch.no_grad(), kernels(self.setting):
            output = self._output(batch)
            make_task(self.setting.recipe).reduce_logits(output.logits, batch["labels"])
        self.model.train()

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The forward pass; everything but the loss is let go, as the Trainer does."""
        return self._output(batch).loss

    def _output(self, batch: dict[str, Tensor]) -> Any:
        dtype = self.setting.autocast
        if dtype is None:
            return self.model(**batch)
        with torch.autocast("cpu", dtype=dtype):
            output = self.model(**batch)
        return convert_outputs_to_fp32(lambda: output)()

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Hooks on the model below the head tell where the head begins, forward and backward."""
        base = find_head(self.model).base_model

        def leave(module: Any, args: Any, output: Any) -> None:
            self.mark("head")
            first = output if isinstance(output, Tensor) else output[0]
            if first is not None and first.requires_grad:
                first.register_hook(lambda grad: self.mark("backward"))

        with ExitStack() as stack:
            stack.callback(base.register_forward_pre_hook(lambda *_: self.mark("forward")).remove)
            stack.callback(base.register_forward_hook(leave).remove)
            yield


def kernels(setting: Setting) -> Any:
    """Context manager: attention in the kernels of the setting's device."""
    return _NoAttentionDropout() if setting.device == "cuda" else nullcontext()


class _NoAttentionDropout(TorchFunctionMode):
    """CUDA's fused attention drops scores out without ever having them; the CPU's only works without."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


class Saved:
    """What autograd holds after a forward pass: the book behind `saved_activation_bytes`.

    Args:
        key: Names a tensor's storage.

    Attributes:
        keys: The storages that were held when the forward pass was over.
    """

    def __init__(self, key: Callable[[Tensor], int]) -> None:
        self.keys: set[int] = set()
        self._key = key
        self._handles: list[weakref.ref[_Held]] = []

    def hooks(self) -> Any:
        """Context manager for the forward pass."""

        def pack(tensor: Tensor) -> _Held:
            handle = _Held(tensor.detach())  # see leantune.measure.saved
            self._handles.append(weakref.ref(handle))
            return handle

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor)

    def note(self) -> None:
        """The forward pass is over: look at what is held, and forget how."""
        held = [handle for reference in self._handles if (handle := reference()) is not None]
        self.keys = {self._key(handle.tensor) for handle in held}
        self._handles.clear()


class _Held:
    """Stands in for one saved tensor, as long as the graph needs it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
