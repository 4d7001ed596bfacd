"""From the recipe's `lean` to a model with its methods attached: the one place where they are put together.

Methods do not know of each other. Order: the adapter; token selection around the adapted model; masks on top
for the first stage of a pruned run. After it base and adapter are pruned, and the second stage has the first
two alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from leantune.anatomy import find_groups
from leantune.errors import UserError
from leantune.lamda import (
    frozen_in_place,
    frozen_share,
    prepare_lamda,
    unprepared_adapters,
)
from leantune.lightpeft import (
    Adapter,
    LightPeftConfig,
    LightPeftEstimation,
    PruningPlan,
    attach_masks,
    check_amounts,
    estimation_of,
    learned_plan,
    random_plan,
    shrink,
)
from leantune.recipes import Recipe
from leantune.run import processes
from leantune.run.adapters import adapter_callbacks, with_adapter
from leantune.tokentune import (
    CHOOSE_AHEAD,
    ChoosingCollator,
    TokenTuneConfig,
    TokenTuneState,
    has_tokens,
    learned_tokens,
    set_token_state,
    token_part,
    token_state,
    token_tune,
)

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


def attach(model: PreTrainedModel, recipe: Recipe, task_type: str) -> nn.Module:
    """Attach the recipe's methods; a model for full fine-tuning comes back as it is.

    Args:
        model: The base model with its head.
        recipe: The whole recipe.
        task_type: PEFT's task type: it keeps the head of a classifier trainable and saved.

    Raises:
        UserError: No layer matches, the adapter does not fit a layer, or token selection cannot work on
            this model.
    """
    adapted = attach_tokens(with_adapter(model, recipe, task_type), recipe)
    if recipe.lean.prune is not None:
        _attach_masks(adapted, recipe)
    return adapted


def _attach_masks(model: nn.Module, recipe: Recipe) -> None:
    try:
        check_amounts(prune_config(recipe), find_groups(model))
        attach_masks(model, prune_config(recipe))
    except UserError as error:
        raise UserError(f"lean.prune: {error}") from None


def prune_config(recipe: Recipe) -> LightPeftConfig:
    """The recipe's `lean.prune` as Light-PEFT's settings."""
    assert recipe.lean.prune is not None
    return LightPeftConfig(**recipe.lean.prune.model_dump(exclude={"estimate_steps", "choose"}))


def pruning_plan(model: nn.Module, recipe: Recipe) -> PruningPlan:
    """What goes, after the first stage.

    Raises:
        UserError: That much cannot be removed.
    """
    assert recipe.lean.prune is not None
    try:
        if recipe.lean.prune.choose == "random":
            return random_plan(model, prune_config(recipe), recipe.train.seed)
        return learned_plan(model)
    except UserError as error:
        raise UserError(f"lean.prune: {error}") from None


def shrunk_adapter(model: nn.Module, plan: PruningPlan) -> Adapter:
    """The model's adapter, cut to the plan."""
    return shrink(model, plan)


def attach_tokens(model: nn.Module, recipe: Recipe, verify: bool = True) -> nn.Module:
    """Token selection, if the recipe has it.

    Args:
        model: With its adapter.
        recipe: The whole recipe.
        verify: As of `token_tune`.

    Raises:
        UserError: It cannot work on this model.
    """
    tokens = recipe.lean.tokens
    if tokens is None:
        return model
    config = TokenTuneConfig(keep=tokens.keep, strategy=tokens.strategy, seed=recipe.train.seed)
    try:
        return token_tune(model, config, verify=verify)
    except UserError as error:
        raise UserError(f"lean.tokens: {error}") from None


def train_collator(model: nn.Module, recipe: Recipe, collator: Collator, counts_tokens: bool) -> Collator:
    """The collator for training: it chooses tokens where they must be known before the first forward.

    Losses that are divided by the tokens of all micro-batches and processes need the choice when those are
    counted.

    Args:
        model: With the recipe's methods attached.
        recipe: The whole recipe.
        collator: The task's.
        counts_tokens: Whether the task's loss is divided so.

    Raises:
        UserError: Batches are made in other processes, which cannot know the choice.
    """
    tokens, settings = recipe.lean.tokens, recipe.train.model_extra or {}
    together = settings.get("gradient_accumulation_steps", 1) * processes.count()
    if tokens is None or not counts_tokens or together == 1:
        return collator
    if tokens.strategy not in CHOOSE_AHEAD:
        return collator  # their scores come from the forward itself: a mean of means, as the card says
    if settings.get("dataloader_num_workers"):
        raise UserError(
            "lean.tokens with train.gradient_accumulation_steps or several processes needs batches made in "
            "the training process: leave train.dataloader_num_workers out"
        )
    return ChoosingCollator(model, collator)


def prepare(model: nn.Module, recipe: Recipe, batches: Iterable[dict[str, Any]]) -> None:
    """Show an adapter some training data whose start comes from there (LaMDA's init), unless it has one.

    Raises:
        UserError: A layer sees nothing of the data.
    """
    for adapter_name in unprepared_adapters(model):
        try:
            with undisturbed(model):
                prepare_lamda(model, batches, adapter_name, seed=recipe.train.seed)
        except UserError as error:
            raise UserError(f"lean.adapter: {error}") from None


def callbacks(recipe: Recipe) -> list[TrainerCallback]:
    """What the recipe's methods need called while they are trained."""
    return adapter_callbacks(recipe) + ([TokenTuneState()] if recipe.lean.tokens is not None else [])


def estimation_callbacks(recipe: Recipe) -> list[TrainerCallback]:
    """The same for the first stage of a pruned run. The adapter's own schedules (LaMDA's freezing) wait."""
    return [LightPeftEstimation(), *([TokenTuneState()] if recipe.lean.tokens is not None else [])]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Forward passes in here leave the methods' own state as it was: the next tokens, what is measured."""
    tokens = token_state(model) if has_tokens(model) else None
    estimation = estimation_of(model)
    measuring = estimation.pause() if estimation is not None else None
    try:
        yield
    finally:
        if tokens is not None:
            set_token_state(model, tokens, collators=False)
        if estimation is not None and measuring is not None:
            estimation.begin_step(measuring)


@contextmanager
def unmeasured(model: nn.Module) -> Iterator[None]:
    """Training passes in here count for nothing that is measured: rows that another process has, too."""
    estimation = estimation_of(model)
    if estimation is None:
        yield
        return
    with estimation.unmeasured():
        yield


def forget_step(model: nn.Module, state: dict[str, int] | None) -> None:
    """The passes of the step in progress have not been; `state` is what `tokens_now` said before them."""
    estimation = estimation_of(model)
    if estimation is not None:
        estimation.forget_step()
    if state is not None:
        set_token_state(model, state, collators=False)


def tokens_now(model: nn.Module) -> dict[str, int] | None:
    """What the next choice of tokens depends on; None without token selection."""
    return token_state(model) if has_tokens(model) else None


@contextmanager
def part_of_batch(model: nn.Module, state: dict[str, int] | None, first: int, rows: int) -> Iterator[None]:
    """A forward pass in here is of rows from `first` on of a batch of `rows`: the same tokens are chosen."""
    if state is None:
        yield
        return
    set_token_state(model, state, collators=False)
    with token_part(model, first, rows):
        yield


def loss_shares(
    model: nn.Module, parts: list[tuple[int, dict[str, Any]]], rows: int, forward: Callable[[Any], Any]
) -> list[float]:
    """Factors for the losses of a batch's parts where the model divides by the number of items in the step.

    A sum over tokens needs none (all are 1). With token selection a part enters by its labels, but its loss
    is a mean over its chosen ones: the factors turn the sum of means into the mean over all that are chosen.

    Args:
        model: The model.
        parts: (first row, part).
        rows: Of the whole batch.
        forward: A training forward of a part; used where the choice depends on it.
    """
    state = tokens_now(model)
    if state is None:
        return [1.0] * len(parts)
    counts = []
    for first, part in parts:
        with undisturbed(model), part_of_batch(model, state, first, rows):
            counts.append(learned_tokens(model, partial(forward, part)))
    labels, chosen = (sum(column) for column in zip(*counts, strict=True))
    return [c / chosen * labels / n if n and c else 0.0 for n, c in counts]


def skip_step(model: nn.Module) -> None:
    """The step in progress is given up: the methods drop what they have seen of it."""
    estimation = estimation_of(model)
    if estimation is not None:
        estimation.skip_step()


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapter is attached (no: the model itself is trained)."""
    return isinstance(model, PeftModel)


def held_weights(model: nn.Module) -> int:
    """Numbers in trained parameters that are frozen all the same (LaMDA's B in several processes)."""
    return frozen_in_place(model)


def progress_facts(model: nn.Module) -> dict[str, float]:
    """What a line of `log.jsonl` says of the adapter beside the loss: the share of B that is frozen."""
    share = frozen_share(model)
    return {} if share is None else {"frozen_columns": round(share, 6)}
