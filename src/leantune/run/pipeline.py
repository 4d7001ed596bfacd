"""One run, from recipe to report. Data flows one way:

recipe → data and model → adapter → (estimation → prune →) training → run folder → evaluation of what was
saved → report
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from rich.console import Console
from torch import nn
from transformers import set_seed

from leantune.errors import RunError, UserError, first_line
from leantune.recipes import Recipe
from leantune.report import write_report
from leantune.run import processes
from leantune.run.checkpoints import processes_of
from leantune.run.estimation import pruned_model, removed_fractions
from leantune.run.evaluation import evaluate_split
from leantune.run.facts import collect_metrics
from leantune.run.folder import RunFolder, write_json, write_text
from leantune.run.loading import open_run
from leantune.run.parts import is_out_of_memory, release
from leantune.run.prediction import sample_predictions
from leantune.run.preparing import forecast, prepare
from leantune.run.stages import Job, estimate, fit
from leantune.run.stopping import Interrupted, StopOnSignal, Stopped, go_on

SAMPLED_PREDICTIONS = 12
_LOWER = "a smaller model, model.dtype: bfloat16 or fewer trained parameters would need less"
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    recipe: Recipe
    metrics: dict[str, Any]


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
                f"stopped; {go_on(recipe)}" if begun else "stopped; nothing was written",
                stopped.signal_number,
            )
        ) from None
    except (UserError, RunError, Interrupted):
        raise
    except Exception as error:
        if processes.is_lost(error):
            lost = f"another of the {processes.count()} processes has ended"
            raise RunError(f"{lost}; {go_on(recipe)}") from error
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
        prepared = prepare(recipe, console)
        expected = forecast(recipe, prepared)
    console.print(expected.line, highlight=False)
    processes.from_main(lambda: folder.begin(recipe, overwrite))
    job = Job(recipe, folder, prepared, resume, console, stop)
    if recipe.lean.prune is not None:
        if not (resume and folder.plan_file.is_file()):
            estimate(job)
        prepared.model = nn.Identity()  # let the whole model go before the pruned one is read
        release()  # which its Trainer, a ring of references, still holds
        set_seed(recipe.train.seed)
        with processes.together():
            prepared.model = pruned_model(folder, recipe, prepared.task, prepared.config)
    facts = fit(job)
    facts |= {"forecast": expected.peak_bytes, "before": prepared.bytes_before}
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
