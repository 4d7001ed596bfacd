"""One run, from recipe to report. Data flows one way:

recipe → data and model → adapter → (estimation → prune →) training → run folder → evaluation of what was
saved → report
"""

from __future__ import annotations

import errno
import json
import math
import random
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset, DatasetDict
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from leantune.errors import RunError, UserError, first_line
from leantune.measure import PeakMemory, resident_bytes, saved_activation_bytes
from leantune.recipes import Recipe
from leantune.report import write_report
from leantune.run import lean, processes
from leantune.run.arguments import training_arguments
from leantune.run.callbacks import ProgressBar, RunLog
from leantune.run.checkpoints import newest_complete, processes_of, sweep
from leantune.run.estimation import STAGE, estimation_steps, pruned_model, removed_fractions, write_plan
from leantune.run.evaluation import evaluate_split
from leantune.run.facts import collect_metrics, count_parameters
from leantune.run.folder import RunFolder, whole_folder, write_json, write_text
from leantune.run.inputs import Inputs, read_inputs
from leantune.run.loading import open_run
from leantune.run.models import head_modules, load_base, new_modules, quiet_transformers
from leantune.run.parts import is_out_of_memory, parts_of, release
from leantune.run.prediction import sample_predictions
from leantune.run.quantization import check_installed, make_shareable, weight_bytes
from leantune.run.sharding import check_shareable, is_sharded, whole_weights
from leantune.run.stopping import StopOnSignal, Stopped
from leantune.run.tasks import Task
from leantune.run.trainer import LeanTrainer, build_trainer, enable_checkpointing

if TYPE_CHECKING:
    from leantune.planner.run_forecast import RunForecast

SAMPLED_PREDICTIONS = 12
LISTED = 5  # new modules that are told by name
_APART = 7919  # between the seeds of two processes
_LOWER = "a smaller model, model.dtype: bfloat16 or fewer trained parameters would need less"
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class Interrupted(Exception):  # noqa: N818 - not an error: the person asked for it
    """A run was stopped by a signal; its checkpoint is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.signal_number)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    recipe: Recipe
    metrics: dict[str, Any]


@dataclass
class _Prepared(Inputs):
    """What is known before the run folder is touched."""

    model: nn.Module
    bytes_before: int | None  # what the process held before it read the model


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> Run:
    """Fine-tune as the recipe says and leave a complete run folder.

    Args:
        recipe: From `Recipe.load`.
        resume: Go on from the newest complete checkpoint in the run folder.
        overwrite: Replace a run that lies in the folder.
        console: Where progress is shown; default: standard error.

    Returns:
        The finished run, with what `metrics.json` holds. Every metric is of the weights as they lie on disk,
        loaded again. With several processes the first has them, the others' are empty; all are on their own
        again (`torch.distributed` is left).

    Raises:
        UserError: Recipe, data or folder do not allow it; nothing was written then.
        RunError: The run went wrong; checkpoints from before are kept.
        Interrupted: SIGINT or SIGTERM came; where training had begun a checkpoint is saved, and `resume=True`
            goes on.
    """
    stop = StopOnSignal(waits=False)
    try:
        with stop.listening():
            processes.join()
            main = processes.is_main()
            console = (console or Console(stderr=True)) if main else Console(quiet=True)
            return _train(recipe, resume, overwrite, console, stop)
    except Stopped as stopped:
        begun = RunFolder(recipe.output).recipe_file.is_file()
        raise processes.shared(
            Interrupted(
                f"stopped; {_go_on(recipe)}" if begun else "stopped; nothing was written",
                stopped.signal_number,
            )
        ) from None
    except (UserError, RunError, Interrupted):
        raise
    except Exception as error:
        if processes.is_lost(error):
            lost = f"another of the {processes.count()} processes has ended"
            raise RunError(f"{lost}; {_go_on(recipe)}") from error
        if is_out_of_memory(error):
            raise RunError(f"{recipe.output}: out of memory: {first_line(error)}; {_LOWER}") from error
        if not isinstance(error, OSError) or error.errno not in _DISK_TROUBLE:
            raise
        raise RunError(
            f"{recipe.output}: cannot be written: {error.strerror}; checkpoints from before are kept"
        ) from error


def _train(recipe: Recipe, resume: bool, overwrite: bool, console: Console, stop: StopOnSignal) -> Run:
    folder = RunFolder(recipe.output)
    finished = processes.from_main(lambda: _look(folder, recipe, resume, overwrite))
    if finished is not None:
        console.print(f"{folder.path}: this run is finished already")
        return Run(folder.path, recipe, finished)
    with processes.together():
        prepared = _prepare(recipe, console)
        forecast = _forecast(recipe, prepared)
    console.print(forecast.line, highlight=False)
    processes.from_main(lambda: folder.begin(recipe, overwrite))
    if recipe.lean.prune is not None:
        if not (resume and folder.plan_file.is_file()):
            _estimate(recipe, folder, prepared, resume, console, stop)
        prepared.model = nn.Identity()  # let the whole model go before the pruned one is read
        release()  # which its Trainer, a ring of references, still holds
        set_seed(recipe.train.seed)
        with processes.together():
            prepared.model = pruned_model(folder, recipe, prepared.task, prepared.config)
    facts = _fit(recipe, folder, prepared, resume, console, stop)
    facts |= {"forecast": forecast.peak_bytes, "before": prepared.bytes_before}
    facts["processes"] = processes.count()
    main = processes.is_main()
    processes.leave()
    if not main:
        return Run(folder.path, recipe, {})
    splits, prepared.model = prepared.splits, nn.Identity()  # let the trained model go before loading it anew
    metrics = _finish(recipe, folder, splits, facts, console)
    return Run(folder.path, recipe, metrics)


def _look(folder: RunFolder, recipe: Recipe, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Whether a run may start here; the metrics, if it is finished. Changes nothing."""
    folder.check_free(recipe, resume, overwrite)
    if not resume:
        return None
    wrote = processes_of(folder.checkpoints) or processes_of(folder.estimation) or processes.count()
    if (finished := folder.metrics()) is None and wrote != processes.count():
        raise UserError(
            f"output = {str(folder.path)!r}: the run was begun in {wrote} process(es), whose batches "
            f"{processes.count()} would not have; go on with --processes {wrote}"
        )
    return finished


def _prepare(recipe: Recipe, console: Console) -> _Prepared:
    """What can go wrong with recipe, data and model goes wrong here, before anything is written."""
    check_shareable(recipe)
    if recipe.lean.quantize is not None:
        check_installed(recipe.lean.quantize)
    with console.status("reading data and model"):
        inputs = read_inputs(recipe, console)
        wanted = (recipe.train.model_extra or {}).get("eval_strategy", "no")
        if wanted != "no" and "validation" not in inputs.splits:
            raise UserError(f"train.eval_strategy = {wanted!r}: the data has no validation split")
        training_arguments(recipe, Path("unused"), "validation" in inputs.splits)
        set_seed(recipe.train.seed)
        before = resident_bytes()
        base = load_base(recipe.model, inputs.task.auto_class, inputs.config, quantize=recipe.lean.quantize)
        if is_sharded(recipe):
            make_shareable(base)
    _tell_what_is_new(base, inputs.task, console)
    # Outside of that: what attaching computes (spectra) shows its own progress.
    model = lean.attach(base, recipe, inputs.task.peft_task_type)
    return _Prepared(**vars(inputs), model=model, bytes_before=before)


def _forecast(recipe: Recipe, prepared: _Prepared) -> RunForecast:
    """What the run is going to take, by the closed form."""
    from leantune.planner.run_forecast import forecast_run  # which imports from here
    from leantune.planner.sharing import Sharing

    packed = recipe.model.task == "causal-lm" and recipe.data.pack
    evaluates = "validation" in prepared.encoded
    cuda = torch.cuda.is_available()
    sharing = Sharing(processes.count(), "fsdp" if is_sharded(recipe) else "ddp")
    return forecast_run(recipe, prepared.config, prepared.encoded["train"], evaluates, packed, cuda, sharing)


def _tell_what_is_new(base: nn.Module, task: Task, console: Console) -> None:
    """A head is new as a rule; anything else that the weights lack may be a mistake."""
    head = head_modules(base) if task.peft_task_type == "SEQ_CLS" else []
    lacking = [name for name in new_modules(base) if name.split(".")[0] not in head]
    if lacking:
        names = ", ".join(lacking[:LISTED]) + (
            f" and {len(lacking) - LISTED} more" if lacking[LISTED:] else ""
        )
        console.print(f"the weights lack {names}: drawn from the seed, trained in full and saved")


def _checkpoint(place: Path, resume: bool, console: Console) -> str | None:
    processes.from_main(lambda: sweep(place))
    if not resume:
        return None
    checkpoint, skipped = processes.from_main(lambda: newest_complete(place))
    for line in skipped:
        console.print(line)
    console.print(
        f"resuming from {checkpoint.name}" if checkpoint else "no complete checkpoint: starting anew"
    )
    return None if checkpoint is None else str(checkpoint)


def _estimate(
    recipe: Recipe,
    folder: RunFolder,
    prepared: _Prepared,
    resume: bool,
    console: Console,
    stop: StopOnSignal,
) -> None:
    """The first stage of a pruned run: train with masks, and write down what goes."""
    steps = estimation_steps(recipe, len(prepared.encoded["train"]))
    progress = ProgressBar(console, f"{recipe.method}: {STAGE}")
    trainer = build_trainer(
        prepared.model,
        training_arguments(recipe, folder.estimation, has_validation=False, max_steps=steps),
        prepared.task,
        prepared.tokenizer,
        prepared.task.collator(prepared.tokenizer),
        [
            *lean.estimation_callbacks(recipe),
            *_watching(RunLog(folder.log_file, stage=STAGE), progress),
            stop,
        ],
        train=prepared.encoded["train"],
        train_collator=_train_collator(recipe, prepared),
        on_nan=recipe.train.on_nan,
        say=console.print,
    )
    _prepare_adapter(trainer, recipe, prepared.encoded["train"])
    _run(trainer, recipe, stop, progress, _checkpoint(folder.estimation, resume, console))
    write_plan(folder, prepared.model, recipe, console)


def _watching(*callbacks: TrainerCallback) -> list[TrainerCallback]:
    """What writes and prints: the main process's."""
    return list(callbacks) if processes.is_main() else []


def _train_collator(recipe: Recipe, prepared: _Prepared) -> lean.Collator:
    task = prepared.task
    return lean.train_collator(prepared.model, recipe, task.collator(prepared.tokenizer), task.counts_tokens)


def _run(
    trainer: LeanTrainer,
    recipe: Recipe,
    stop: StopOnSignal,
    progress: ProgressBar,
    checkpoint: str | None,
) -> PeakMemory:
    """Train one stage to its end.

    Raises:
        Interrupted: A signal came; the checkpoint is saved.
    """
    try:
        with stop.waiting(), PeakMemory(trainer.args.device) as peak:
            # dropout must not be the same in all processes
            set_seed((recipe.train.seed + _APART * processes.rank()) % 2**32)
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        progress.close()
    if (number := stop.agreed()) is not None:
        trainer.save_now()  # the signal may have come after the last step had looked
        where = f"stopped after step {trainer.state.global_step}"
        raise processes.shared(Interrupted(f"{where}; {_go_on(recipe)}", number))
    return peak


def _go_on(recipe: Recipe) -> str:
    again = ["leantune", "train", str(RunFolder(recipe.output).recipe_file), "--resume"]
    if processes.count() > 1:
        again += ["--processes", str(processes.count())]
    return f"go on with: {shlex.join(again)}"


def _fit(
    recipe: Recipe,
    folder: RunFolder,
    prepared: _Prepared,
    resume: bool,
    console: Console,
    stop: StopOnSignal,
) -> dict[str, Any]:
    """Train, and save the result. Returns what was measured on the way."""
    model = prepared.model
    classifies = prepared.task.peft_task_type == "SEQ_CLS"
    checkpoint = _checkpoint(folder.checkpoints, resume, console)
    lean.check_resumable(recipe, checkpoint)
    progress = ProgressBar(console, recipe.method)
    log = RunLog(folder.log_file, extra=lambda: lean.progress_facts(model))
    trainer = build_trainer(
        model,
        training_arguments(recipe, folder.checkpoints, "validation" in prepared.encoded),
        prepared.task,
        prepared.tokenizer,
        prepared.task.collator(prepared.tokenizer),
        [*lean.callbacks(recipe), *_watching(log, progress), stop],
        train=prepared.encoded["train"],
        validation=prepared.encoded.get("validation"),
        train_collator=_train_collator(recipe, prepared),
        on_nan=recipe.train.on_nan,
        say=console.print,
    )
    _prepare_adapter(trainer, recipe, prepared.encoded["train"])
    facts: dict[str, Any] = {
        "parameters": count_parameters(model, classifies),
        "weight_bytes": weight_bytes(model),
        "saved_activation_bytes": _saved_bytes(trainer, recipe, prepared.encoded["train"]),
    }
    peak = _run(trainer, recipe, stop, progress, checkpoint)
    facts |= {
        "trainable_end": count_parameters(model, classifies)["trainable"] - lean.held_weights(model),
        "peak": peak,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "steps": trainer.state.global_step,
    }
    whole = whole_weights(trainer)
    processes.from_main(lambda: _save(folder, prepared, trainer, whole))
    return facts


def _prepare_adapter(trainer: LeanTrainer, recipe: Recipe, train: Dataset) -> None:
    """Give an adapter its start from data, if it needs one: from rows that the seed alone decides.

    A resumed run does it again and then takes the checkpoint's values, which are the same.
    """
    enable_checkpointing(trainer)
    with trainer.compute_loss_context_manager():
        lean.prepare(cast(nn.Module, trainer.model), recipe, _drawn_batches(trainer, recipe, train))


def _drawn_batches(trainer: LeanTrainer, recipe: Recipe, train: Dataset) -> Iterator[dict[str, Any]]:
    order = list(range(len(train)))
    random.Random(recipe.train.seed).shuffle(order)
    count, rank = processes.count(), processes.rank()
    size = trainer.args.per_device_train_batch_size * count
    for start in range(0, len(order) - count + 1, size):
        batch = order[start : start + size]
        own = range(rank, len(batch) // count * count, count)  # as many in every process
        rows = [dict(train[batch[place]]) for place in own]
        yield trainer._prepare_inputs(trainer.data_collator(rows))


def _saved_bytes(trainer: LeanTrainer, recipe: Recipe, train: Dataset) -> int:
    """Bytes kept by one step on the first rows of the train split: the same rows for every method."""
    rows = train.select(range(min(trainer.args.per_device_train_batch_size, len(train))))
    batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
    enable_checkpointing(trainer)
    model = cast(nn.Module, trainer.model)
    most = len(rows)
    while True:
        try:  # what does not fit at once is measured in parts: activations add up
            kept = 0
            for _, part in parts_of(batch, most):
                with trainer.compute_loss_context_manager(), lean.undisturbed(model):
                    kept += saved_activation_bytes(model, part)
            return kept
        except Exception as error:
            if most == 1 or not is_out_of_memory(error):
                raise
        release()
        most = math.ceil(most / 2)


def _save(
    folder: RunFolder, prepared: _Prepared, trainer: LeanTrainer, whole: dict[str, Tensor] | None
) -> None:
    """The trained weights, with the config (label names) and tokenizer that make them usable."""
    full = not lean.is_adapted(prepared.model)
    with whole_folder(folder.model if full else folder.adapter) as place, quiet_transformers():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(place, state_dict=whole)
        prepared.config.save_pretrained(place)
        prepared.tokenizer.save_pretrained(place)


def _finish(
    recipe: Recipe, folder: RunFolder, splits: DatasetDict, facts: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Load what was saved, evaluate it, and write metrics, predictions and report."""
    loaded = open_run(folder)
    evaluation = {}
    for name in ("validation", "test"):
        if name in splits:
            with console.status(f"evaluating on the {name} split ({len(splits[name]):,} rows)"):
                evaluation[name] = evaluate_split(loaded, splits[name], name)
    sampled = next((splits[name] for name in ("test", "validation") if name in splits), None)
    if sampled is not None:
        rows = sample_predictions(loaded, sampled, SAMPLED_PREDICTIONS)
        write_predictions(folder, [row.to_dict() for row in rows])
    if loaded.plan is not None:
        facts["removed"] = removed_fractions(recipe, loaded.task, loaded.config, loaded.plan)
    metrics = collect_metrics(recipe, folder, evaluation, facts)
    write_json(folder.metrics_file, metrics)
    write_report(folder.path)
    return metrics


def write_predictions(folder: RunFolder, rows: list[dict[str, Any]]) -> None:
    """The sample of predictions, one JSON object a line."""
    write_text(folder.predictions_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
