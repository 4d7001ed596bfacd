"""The command line: thin, and quick to start. Each command imports what takes time to import."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leantune.errors import RunError, UserError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="leantune",
    help="Fine-tune transformers with less memory, time and parameters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A finished run's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Entry point: mistakes become one clear line and exit code 2, failed runs 1, a stop 130 or 143."""
    try:
        app()
    except (UserError, RunError) as error:
        _complain_once(error)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        _complain("stopped")
        sys.exit(130)


def _complain_once(error: Exception) -> None:
    """Of several processes, the main one tells what all know; the others then end as if nothing were."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and getattr(error, "shared", False):
        sys.exit(0)  # an exit code above 0 would make the launcher stop the main one before it has spoken
    _complain(str(error) if rank == "0" else f"process {rank}: {error}")


def _complain(text: str) -> None:
    for line in text.splitlines():
        print(f"leantune: {line}", file=sys.stderr)  # noqa: T201


def _console() -> Console:
    from rich.console import Console

    return Console()


# Loggers of libraries. torch sets its own level again when it is imported, but not those of its parts.
_TALKATIVE = (
    *("transformers", "peft", "accelerate", "datasets", "torch", "torch.utils._pytree"),
    *("torchao", "bitsandbytes"),
)


def _quiet(command: Callable[..., None]) -> Callable[..., None]:
    """Keep the libraries' own chatter out of the output; `typer` still sees the command's signature."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        import logging
        import warnings

        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command.__name__ != "train":
            error = UserError(f"leantune {command.__name__} runs in one process: start it without a launcher")
            error.shared = True  # type: ignore[attr-defined]
            raise error
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        warnings.filterwarnings("ignore")
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        command(*args, **kwargs)

    return run


@app.command()
@_quiet
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Change keys, e.g. train.epochs=1.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run in the output folder.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", metavar="N", help="Train in N processes, on a GPU each if there are any."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune; writes the run folder."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    starts_others = _starts_others(processes)
    from leantune.recipes import Recipe

    loaded = Recipe.load(recipe, *(overrides or []))
    if starts_others:  # a mistake in the recipe is told once, by this process
        from leantune.run.launching import launch

        sys.exit(launch(processes or 1, sys.argv[1:]))
    from rich.console import Console

    from leantune.run import Interrupted
    from leantune.run import train as run_recipe

    try:
        run = run_recipe(loaded, resume=resume, overwrite=overwrite, console=Console(stderr=as_json))
    except Interrupted as stopped:
        _complain_once(stopped)
        sys.exit(143 if stopped.signal_number == signal.SIGTERM else 130)
    if not run.metrics:
        return  # one of several processes; the main one shows it
    if as_json:
        _print_json(run.metrics)
    else:
        _show_run(run.folder, run.metrics, loaded.model.task)


def _starts_others(processes: int | None) -> bool:
    """Whether this command is to start the processes, and is none of them."""
    if processes is None:
        return False
    if processes < 1:
        raise UserError(f"--processes = {processes}: must be a whole number of at least 1")
    world = os.environ.get("WORLD_SIZE")
    if world is not None and int(world) != processes:
        raise UserError(f"--processes = {processes}: the launcher has started {world}")
    return world is None and processes > 1


def _show_run(folder: Path, metrics: dict[str, Any], task: str) -> None:
    from leantune.report import metrics_table, predictions_table, summary_table

    console = _console()
    predictions = folder / "predictions.jsonl"
    if predictions.is_file():
        rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
        console.print(predictions_table(rows, task=task))
    console.print(summary_table(metrics))
    console.print(metrics_table(metrics["evaluation"]))
    console.print(f"Run folder: {folder}   page: {folder / 'report.html'}", soft_wrap=True)


@app.command()
@_quiet
def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Option(help="Other data with the same columns.")] = None,
    split: Annotated[str | None, typer.Option(help="One split; default: validation and test.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Metrics of a run on labelled data."""
    from leantune.run import evaluate as evaluate_run

    found = evaluate_run(run, data, split)
    if as_json:
        _print_json(found)
    else:
        from leantune.report import metrics_table

        _console().print(metrics_table(found))


@app.command()
@_quiet
def predict(
    run: RunArgument,
    text: Annotated[str | None, typer.Argument(help="One input.")] = None,
    pair: Annotated[str | None, typer.Option(help="The second text, for a run on pairs.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="A text a line, or .jsonl with the data's columns.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Labels, numbers or generated text."""
    if (text is None) == (file is None):
        raise UserError("give one TEXT, or --file F")
    from leantune.run.loading import open_run
    from leantune.run.prediction import predict_with, read_inputs, typed_input

    loaded = open_run(run)
    typed = (text or "") if pair is None else (text or "", pair)
    inputs = read_inputs(file, loaded) if file is not None else [typed_input(loaded, typed)]
    for said in predict_with(loaded, inputs):
        if as_json:
            typer.echo(json.dumps(said.to_dict(), ensure_ascii=False))
        elif said.score is not None:
            typer.echo(f"{said.predicted}\t{said.score:.3f}" + (f"\t{said.input}" if file else ""))
        else:
            typer.echo(f"{said.predicted}" + (f"\t{said.input}" if file else ""))


@app.command()
@_quiet
def compare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Model, data and schedule.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Change keys, e.g. train.epochs=1.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Names with commas between; + joins, as in lamda+tokentune.")
    ] = "full,lora,lamda,tokentune,light-peft,lean",
    seeds: Annotated[int, typer.Option(help="Runs of each method, from the recipe's seed on.")] = 3,
    lr: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=RATE", help="A learning rate; the others follow the recipe's."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: the recipe's output + -compare.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Many methods on one recipe: what each costs and gives. The same command again goes on."""
    from leantune.comparison.rates import parse_rates
    from leantune.recipes import Recipe

    loaded, rates = Recipe.load(recipe, *(overrides or [])), parse_rates(lr or [])
    from rich.console import Console

    from leantune.comparison import compare as compare_methods
    from leantune.run import Interrupted

    try:
        done = compare_methods(
            loaded,
            methods,
            seeds,
            out,
            lr=rates,
            console=Console(stderr=as_json),
            command=shlex.join(["leantune", *sys.argv[1:]]),
        )
    except Interrupted as stopped:
        _complain(str(stopped))
        sys.exit(143 if stopped.signal_number == signal.SIGTERM else 130)
    if as_json:
        _print_json(done.result)
    else:
        _show_comparison(done.folder, done.result)


def _show_comparison(folder: Path, result: dict[str, Any]) -> None:
    from leantune.report.comparison_rows import comparison_table

    console = _console()
    console.print(comparison_table(result))
    console.print(result["verdict"], highlight=False, markup=False)
    console.print(f"\nComparison: {folder}   page: {folder / 'compare.html'}", soft_wrap=True)


@app.command()
@_quiet
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yaml] [key=value ...]", help="What to plan for, and keys to change."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Without a recipe: a folder with a config.json, a hub name, or shape:llama-2-7b."),
    ] = None,
    task: Annotated[
        str, typer.Option(help="With --model: causal-lm | classification | regression.")
    ] = "causal-lm",
    dtype: Annotated[
        str, typer.Option(help="With --model: auto | float32 | bfloat16 (bf16) | float16 (fp16).")
    ] = "auto",
    batch: Annotated[int | None, typer.Option(help="Rows a forward pass; default: the recipe's.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the longest row; default: the data's.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="What fits in, and how: 24GiB, say.")] = None,
    reserve: Annotated[str | None, typer.Option(help="Of it, what is not for tensors.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu | cuda | a100-80gb | …; default: what is here.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Processes, one GPU each: figures are for each of them.")] = 1,
    strategy: Annotated[
        str | None, typer.Option(help="With --gpus: ddp | zero1 | zero2 | zero3 | fsdp.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names as of `leantune compare`; recipe: no others.")
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Trace all rows, not the recipe's alone.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Trace nothing: the closed form, instant.")] = False,
    write: Annotated[
        Path | None, typer.Option(help="With --memory: write the recipe that fits, least changed.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Predicted memory and time of training, method by method; no weights are read."""
    from rich.console import Console

    from leantune.planner.command import plan_command
    from leantune.planner.table import plan_table

    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    made = plan_command(
        arguments or [],
        {"model": model, "task": task, "dtype": short.get(dtype, dtype), "batch": batch, "length": length},
        memory=memory,
        reserve=reserve,
        device=device,
        gpus=gpus,
        strategy=strategy,
        methods=methods,
        all_traced=trace,
        fast=fast,
        write=write,
        console=Console(stderr=True),
    )
    if as_json:
        _print_json(made.to_dict())
    else:
        console = _console()
        console.print(plan_table(made, console.width))


@app.command()
@_quiet
def export(
    run: RunArgument,
    to: Annotated[str, typer.Option(help="lora | merged | pruned")],
    out: Annotated[str, typer.Option(help="The new folder.")],
) -> None:
    """A plain PEFT LoRA or a merged or pruned checkpoint; compared with the run before it says done."""
    from leantune.run import export as export_run

    done = export_run(run, to, out)
    if done.kind == "lora" and (Path(run) / "pruning").is_dir():
        typer.echo(f"{done.folder}: lora, recovered onto the whole base")
        if done.evaluation is None:
            typer.echo("not evaluated there: the run's data is not to be had")
        else:
            from leantune.report import metrics_table

            _console().print(metrics_table(done.evaluation))
        return
    difference = f"largest difference {done.max_abs_difference:.1e}"
    typer.echo(f"{done.folder}: {done.kind}, outputs equal to the run's ({difference})")
    if done.base is not None:
        typer.echo(done.base)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """What there is and what it can do."""
    from leantune.methods import METHODS
    from leantune.report.capabilities import Capabilities, capability_table, methods_table, tried_on

    capabilities = Capabilities.load()
    if as_json:
        from dataclasses import asdict

        _print_json({"methods": [asdict(method) for method in METHODS], "capabilities": asdict(capabilities)})
        return
    console = _console()
    console.print(methods_table(METHODS))
    console.print(capability_table(capabilities))
    console.print(f"\n{tried_on(capabilities)}", style="dim")


@app.command()
@_quiet
def doctor(as_json: JsonOption = False) -> None:
    """The environment: versions, hardware, what is missing."""
    from leantune.run.doctor import examine

    found = examine()
    if as_json:
        _print_json(
            {check.name: {"ok": check.ok, "found": check.found, "advice": check.advice} for check in found}
        )
        return
    from leantune.report.capabilities import doctor_table

    _console().print(doctor_table(found))


@app.command(name="recipe-schema")
def recipe_schema() -> None:
    """JSON schema of a recipe, for editors."""
    from leantune.recipes import Recipe

    _print_json(Recipe.model_json_schema())


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
