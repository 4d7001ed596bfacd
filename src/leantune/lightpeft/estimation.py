"""The first stage of Light-PEFT: masks and importance statistics are attached, trained along, and read."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import safetensors.torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from leantune.anatomy import find_head
from leantune.anatomy.blocks import Group, find_groups
from leantune.errors import UserError
from leantune.lightpeft.adapters import adapter_axes, adapter_config
from leantune.lightpeft.config import LightPeftConfig, ratio
from leantune.lightpeft.importance import ModuleImportance, RankImportance
from leantune.lightpeft.masks import Masks

_ATTRIBUTE = "_leantune_estimation"


class Estimation:
    """What is learned about one model before it is pruned. Made by `attach_masks`.

    `LightPeftEstimation` drives it in a Trainer. In a training loop of your own:

        for step in range(steps):
            estimation.begin_step(measure=step >= steps / 2)
            model(**batch).loss.backward()
            estimation.step()
            optimizer.step()
            optimizer.zero_grad()

    Attributes:
        config: The settings.
        groups: The groups that have masks.
    """

    def __init__(self, model: nn.Module, config: LightPeftConfig, groups: Sequence[Group]) -> None:
        self.config = config
        self.groups = tuple(groups)
        name, peft_config = adapter_config(model)
        axes = adapter_axes(peft_config)
        wanted = {key: bool(ratio(getattr(config, key), key)) for key in ("modules", "ranks")}
        # what may refuse the model comes before what hooks it
        self._ranks = RankImportance(model, name, axes, config.taylor) if wanted["ranks"] else None
        self._modules = ModuleImportance(model, name) if wanted["modules"] else None
        self._masks = Masks(model, self.groups, config)
        parts = (self._masks, self._modules, self._ranks)
        self._parts: tuple[Any, ...] = tuple(part for part in parts if part is not None)
        self._skip = False

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by name of the group, (count,) float32, in the order of `groups`."""
        return self._masks.values

    def module_importance(self) -> dict[str, float]:
        """IM of every adapted module, by its name in the plain model; METHODS 2, "Module pruning".

        Raises:
            UserError: It was not asked for (`modules` is 0), or nothing was measured yet.
        """
        if self._modules is None:
            raise UserError("modules=0: module importance is measured only if modules are to be pruned")
        return self._modules.read()

    def rank_importance(self) -> dict[str, Tensor]:
        """Taylor importance of every rank, (r,) by the module's name in the plain model.

        Raises:
            UserError: It was not asked for (`ranks` is 0), or nothing was measured yet.
        """
        if self._ranks is None:
            raise UserError("ranks=0: rank importance is measured only if ranks are to be pruned")
        return self._ranks.read()

    def begin_step(self, measure: bool) -> None:
        """Before the forward passes of an optimizer step.

        Args:
            measure: Whether the step counts for the importance of modules and ranks (second half of the
                steps).
        """
        for part in (self._modules, self._ranks):
            if part is not None:
                part.active = measure

    def pause(self) -> bool:
        """Measure nothing until the next `begin_step`; returns whether anything was being measured."""
        measuring = any(part.active for part in (self._modules, self._ranks) if part is not None)
        self.begin_step(measure=False)
        return measuring

    @contextmanager
    def unmeasured(self) -> Iterator[None]:
        """Forward passes in here do not count for the importance of modules; the step goes on as ever."""
        if self._modules is None:
            yield
            return
        with self._modules.unmeasured():
            yield

    def skip_step(self) -> None:
        """Drop what the step's passes have left; the `step` that follows does nothing."""
        self._skip = True

    def step(self, scaler: Any = None) -> None:
        """Between the backward passes of an optimizer step and `optimizer.step()`; on every process.

        Args:
            scaler: The loss scaler of fp16 training, if there is one. The parameters' gradients must be
                unscaled by now (Trainer always has), the masks' are not.
        """
        if self._skip:
            self._skip = False
            self.forget_step()
            return
        if self._ranks is not None:
            self._ranks.step()
        if self._modules is not None:
            self._modules.step()
        self._masks.step(scaler)

    def forget_step(self) -> None:
        """The passes since the last step have not been."""
        if self._modules is not None:
            self._modules.forget_step()
        self._masks.forget_step()

    def reset(self) -> None:
        """As new: masks of ones, nothing measured, everything on the devices where the model is now."""
        for part in self._parts:
            part.reset()

    def state(self) -> dict[str, Tensor]:
        """Everything that continuing depends on, on the CPU, by name; between two steps."""
        return {
            name: tensor.detach().cpu().clone()
            for part in self._parts
            for name, tensor in part.state().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue where `state` was taken, bit for bit.

        Raises:
            UserError: It is of another model, adapter or of other settings.
        """
        for part in self._parts:
            part.load_state(state)

    def remove(self) -> None:
        """Take the hooks off; what was learned can still be read."""
        for part in (self._masks, self._modules):
            if part is not None:
                part.remove()


def attach_masks(
    model: nn.Module, config: LightPeftConfig, groups: Sequence[Group] | None = None
) -> Estimation:
    """Put masks on heads and neurons, and measure importance, as far as the config prunes them.

    Light-PEFT (Gu et al., Findings of ACL 2024, arXiv 2406.03792), estimation. Masks act in `train()` and in
    `eval()` mode, from now on until `detach_masks`. They are trained by `LightPeftEstimation`.

    Args:
        model: A transformers model with one PEFT adapter. Attach after the adapter.
        config: A kind whose ratio is 0 gets no masks, and what need not be ranked is not measured.
        groups: Where heads and neurons are; default: `find_groups(model)`.

    Returns:
        What will be known, also on the model for the callback.

    Raises:
        UserError: The model has no adapter or cannot be pruned, or there is nothing to estimate.
    """
    adapter_config(model)
    detach_masks(model)
    kinds = [kind for kind in ("heads", "neurons") if ratio(getattr(config, kind), kind)]
    if not kinds and not ratio(config.modules, "modules") and not ratio(config.ranks, "ranks"):
        raise UserError("heads, neurons, modules and ranks are all 0: there is nothing to prune")
    if groups is None and kinds:
        groups = find_groups(model)
    estimation = Estimation(model, config, [group for group in groups or () if group.kind in kinds])
    find_head(model).__dict__[_ATTRIBUTE] = estimation
    return estimation


def detach_masks(model: nn.Module) -> None:
    """Take masks and measurements off, if there are any; the estimation keeps what it learned."""
    estimation = find_head(model).__dict__.pop(_ATTRIBUTE, None)
    if estimation is not None:
        estimation.remove()


def estimation_of(model: nn.Module) -> Estimation | None:
    """The estimation attached to a model, wrapped or not."""
    return find_head(model).__dict__.get(_ATTRIBUTE)


class LightPeftEstimation(TrainerCallback, ExportableState):
    """Trains masks and measures importance in any Trainer: `callbacks=[LightPeftEstimation()]`.

    The masks have an optimizer of their own, which steps with the Trainer's. Modules and ranks are measured
    in the second half of the run's steps. Stateful: all of it is in `trainer_state.json`, and a run that is
    interrupted and resumed ends with the same masks and importances, bit for bit.

    Raises:
        UserError: When training begins: the model has no masks, or resumes from a checkpoint without.
    """

    def __init__(self) -> None:
        self.saved = ""
        self._estimation: Estimation | None = None

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` holds: the estimation's tensors as safetensors in base64."""
        if self._estimation is not None:
            self.saved = _packed(self._estimation.state())
        return {"args": {}, "attributes": {"saved": self.saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start anew, or from the resumed checkpoint."""
        estimation = estimation_of(kwargs["model"])
        if estimation is None:
            raise UserError("the model has no masks: call leantune.attach_masks(model, config) first")
        self._estimation = estimation
        if not state.global_step:
            estimation.reset()
            return
        callbacks: Any = state.stateful_callbacks
        stored = callbacks.get("LightPeftEstimation")
        saved = stored["attributes"]["saved"] if stored else ""
        if not saved:
            raise UserError("the checkpoint holds no masks: it was not written in a Light-PEFT estimation")
        estimation.load_state(_unpacked(saved))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The second half of the steps is measured."""
        if self._estimation is not None:
            self._estimation.begin_step(measure=2 * (state.global_step + 1) > state.max_steps)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All gradients of the step are there: summed, averaged over processes, unscaled and clipped.

        (The parameters'; the masks' the Trainer does not know.)
        """
        if self._estimation is not None:
            self._estimation.step(getattr(kwargs.get("optimizer"), "scaler", None))


def _packed(tensors: dict[str, Tensor]) -> str:
    return base64.b64encode(safetensors.torch.save(tensors)).decode()


def _unpacked(text: str) -> dict[str, Tensor]:
    return safetensors.torch.load(base64.b64decode(text))
