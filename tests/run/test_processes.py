"""Two processes train as one does: the same rows, loss and weights; they stop, fail and go on together.

They are forked (tests/together.py) and talk through gloo. The long matrix is marked slow.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import leantune
from leantune.anatomy import find_head, find_stacks
from leantune.errors import RunError, UserError
from leantune.run import Interrupted, callbacks, lean, processes
from leantune.run.checkpoints import newest_complete
from leantune.run.folder import RunFolder
from leantune.run.sharding import check_shareable
from tests.capabilities.cells import build
from tests.conftest import make_tokenizer, requests, write_jsonl
from tests.quantised import need
from tests.run.support import SETTINGS, printed, quiet, recipe
from tests.tiny_models import tiny
from tests.together import Team, free_port, together

ROWS = 43  # the last batch of eight has three: the second process has none of its own there
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, which no two settings could draw alike; with weights that all make a difference."""
    folder = tmp_path_factory.mktemp("still") / "bert"
    sizes = {"num_hidden_layers": 2, "hidden_size": 64}  # 64: what 4-bit layers want
    tiny("bert", "base", dtype=torch.float32, **sizes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for number, (split, count) in enumerate((("train", ROWS), ("validation", 9), ("test", 8))):
        write_jsonl(folder / f"{split}.jsonl", requests(count, number))
    return folder


def still(name: str) -> dict[str, Any]:
    """A method's settings without chance: no dropout, tokens chosen by what the model makes of them."""
    settings = json.loads(json.dumps(SETTINGS[name]))
    settings["adapter"].pop("dropout", None)
    if "tokens" in settings:
        settings["tokens"] = {"keep": 0.5, "strategy": "norm"}
    return settings


def train(made: Any, resume: bool = False, *planted: TrainerCallback) -> tuple[dict[str, Any], int, str]:
    """In one of the processes: metrics, the size of the world while training, what was printed."""
    seen, console = Seen(), quiet()
    needed, first = lean.callbacks, lean.estimation_callbacks
    lean.callbacks = lambda recipe: [*planted, seen, *needed(recipe)]
    lean.estimation_callbacks = lambda recipe: [*planted, *first(recipe)]
    try:
        metrics = leantune.train(made, resume=resume, console=console).metrics
    finally:
        lean.callbacks, lean.estimation_callbacks = needed, first
    return metrics, seen.world, printed(console)


class Seen(TrainerCallback):
    """Looks whether there are really several."""

    world = 0

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class At(TrainerCallback):
    """Does something in one process after a step."""

    def __init__(self, step: int, rank: int, act: Any) -> None:
        self.step, self.rank, self.act = step, rank, act

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == self.rank:
            self.act(model)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(RunFolder(folder).saved_weights().glob("*.safetensors")))


def losses(folder: Path) -> list[float]:
    file = RunFolder(folder).log_file
    lines = [line for stage in ("estimation", None) for line in callbacks.read_log(file, stage)]
    return [line["loss"] for line in lines if "evaluation" not in line]


@pytest.fixture(scope="module")
def compare(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Several processes with batches of 4 against one with as many rows in a batch.

    Vectors that are computed from data are rounded otherwise, and may have the other sign: losses decide.
    """
    ran: dict[str, tuple[Path, dict[str, Any]]] = {}  # alone

    def made(settings: dict[str, Any], size: int, keys: dict[str, Any]) -> Any:
        place = tmp_path_factory.mktemp("compare") / "run"
        return recipe(
            base,
            rows,
            place,
            settings,
            train={"batch_size": size, "learning_rate": 1e-3, "epochs": 1, **keys},
        )

    def alone(*asked: Any) -> tuple[Path, dict[str, Any]]:
        if (key := json.dumps(asked, sort_keys=True)) not in ran:
            run = leantune.train(made(*asked), console=quiet())
            ran[key] = run.folder, run.metrics
        return ran[key]

    def as_one(
        settings: dict[str, Any],
        *planted: TrainerCallback,
        count: int = 2,
        shared: dict[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        first, expected = alone(settings, 4 * count, keys)
        several = made(settings, 4, keys | (shared or {}))
        (metrics, world, told), *others = together(count, train, several, False, *planted)
        assert world == metrics["processes"] == count
        assert others == [({}, count, "")] * (count - 1)
        assert told.count("forecast: ") == 1
        assert metrics["parameters"] == expected["parameters"]
        assert metrics["steps"] == expected["steps"]
        second = Path(several.output)
        from_data = settings["adapter"].get("init", "svd") != "svd"
        assert losses(second) == pytest.approx(losses(first), rel=1e-4 if from_data else 2e-6)
        one, two = weights(first), weights(second)
        assert one.keys() == two.keys()
        for name, tensor in () if from_data else one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-4)
        found = metrics["evaluation"]["test"]
        assert found == pytest.approx(expected["evaluation"]["test"], rel=1e-3)

    return as_one


QUICK = ("lean",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SETTINGS]
)
def test_as_one_process(name: str, compare: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    settings = still(name)
    if settings.get("quantize") == "int8-torchao":
        made = recipe(base, rows, tmp_path / "run", settings)
        with pytest.raises(UserError, match="lean.quantize = 'int8-torchao'"):
            together(2, train, made)
        return
    if settings["adapter"].get("init") == "gradient":
        # a sum over rows, however they are dealt
        settings["adapter"] |= {"init": "activation", "init_b": "zero"}
    compare(settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "lean"])
def test_with_accumulation(name: str, compare: Any) -> None:
    compare(still(name), gradient_accumulation_steps=2)


@pytest.mark.slow
def test_three_processes(compare: Any) -> None:
    """Of an epoch's last seven rows the second has three, the third none."""
    compare(still("lean"), count=3)


def test_stops_together_and_goes_on(bert_folder: Path, rows: Path, tmp_path: Path) -> None:
    """A signal to the second process; with LaMDA freezing, dropout and all, the same bits afterwards."""

    def made(name: str) -> Any:
        return recipe(bert_folder, rows, tmp_path / name, SETTINGS["lamda"], train={"batch_size": 4})

    together(2, train, made("whole"))
    signalled = At(8, 1, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    stopped = Team(2, train, made("halves"), False, signalled).results()
    assert all(isinstance(one, Interrupted) for one in stopped), stopped
    assert {str(one).split(";")[0] for one in stopped} == {"stopped after step 8"}
    assert "--resume --processes 2" in str(stopped[0])
    checkpoint, skipped = newest_complete(tmp_path / "halves" / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-8" and not skipped
    assert {file.name for file in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    with pytest.raises(UserError, match="was begun in 2 process.*; go on with --processes 2"):
        leantune.train(made("halves"), resume=True, console=quiet())
    told = together(2, train, made("halves"), True)[0][2]
    assert "resuming from checkpoint-8" in told
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "keys"), [("lora", {}), pytest.param("lean", {"fsdp": True}, marks=pytest.mark.slow)]
)
def test_one_is_killed(name: str, keys: dict[str, Any], base: Path, rows: Path, tmp_path: Path) -> None:
    """The other stops with one line, at once; the checkpoint from before is whole."""
    made = recipe(base, rows, tmp_path / "run", SETTINGS[name], train={"batch_size": 4, **keys})
    killed = At(8, 1, lambda model: os.kill(os.getpid(), signal.SIGKILL))
    left, gone = Team(2, train, made, False, killed).results()
    assert gone is None
    assert isinstance(left, RunError)
    assert str(left).startswith("another of the 2 processes has ended; go on with: leantune train")
    checkpoint, _ = newest_complete(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-6"


@torch.no_grad()
def _damage(model: torch.nn.Module) -> None:
    next(p for n, p in model.named_parameters() if "layer.1.output.dense.lora_B" in n)[0, 0] = torch.nan


@pytest.mark.parametrize("on_nan", [pytest.param("stop"), pytest.param("skip", marks=pytest.mark.slow)])
def test_not_finite_in_one(on_nan: str, base: Path, rows: Path, tmp_path: Path) -> None:
    keys = {"batch_size": 4, "on_nan": on_nan, "steps": 5}
    made = recipe(base, rows, tmp_path / "run", still("lora"), train=keys)
    found = Team(2, train, made, False, At(2, 1, _damage)).results()
    if on_nan == "stop":
        assert all(isinstance(one, RunError) for one in found), found
        assert str(found[0]) == str(found[1])
        assert str(found[0]).startswith("process 1: step 3: the loss is nan; its batch: rows ")
        assert "lora_B.default.weight is not finite itself" in str(found[0])
    else:
        assert found[0][0]["skipped_steps"] == 3


def _damaged_file(made: Any) -> Any:
    if os.environ["RANK"] == "1":
        lean.attach = lambda *args: (_ for _ in ()).throw(UserError("this one cannot"))
    return train(made)


def test_one_cannot_start(base: Path, rows: Path, tmp_path: Path) -> None:
    """Nothing is written, and all say the same."""
    made = recipe(base, rows, tmp_path / "run", SETTINGS["lora"])
    found = Team(2, _damaged_file, made).results()
    assert [str(one) for one in found] == ["process 1: this one cannot"] * 2
    assert not (tmp_path / "run").exists()


def _out_of_memory(made: Any) -> Any:
    from transformers import Trainer

    step = Trainer.training_step

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.process_index == 1 and self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, *args, **kwargs)

    Trainer.training_step = full
    return train(made)


def test_out_of_memory_in_one(base: Path, rows: Path, tmp_path: Path) -> None:
    made = recipe(base, rows, tmp_path / "run", SETTINGS["lora"], train={"batch_size": 4})
    left, full = Team(2, _out_of_memory, made).results()
    assert isinstance(full, RunError) and str(full).startswith("step 3: 4 rows of ")
    assert isinstance(left, RunError) and str(left).startswith("another of the 2 processes has ended")


# -- FSDP2 --------------------------------------------------------------------------------------------------


class Sharded(TrainerCallback):
    """Looks whether each process really has but a part, and gathers layer by layer."""

    def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        parameters = list(model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        held = sum(parameter.to_local().numel() for parameter in parameters)
        assert held < 0.6 * sum(parameter.numel() for parameter in parameters)
        stacks = find_stacks(find_head(model))
        assert all(isinstance(layer, FSDPModule) for stack in stacks for layer in stack.layers)


KEPT = {"fsdp_config": {"reshard_after_forward": False}}  # layers stay whole from the forward pass on
# Method, what only the several processes are told, what all are.
FSDP: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("lean", {}, {}),
    ("lean", KEPT, {"gradient_checkpointing": True}),
    ("lean", {}, {"gradient_accumulation_steps": 2}),
    ("full", {}, {}),
    ("full", KEPT, {"gradient_checkpointing": True}),
    ("lora", {}, {"gradient_checkpointing": True}),
    ("lamda", {}, {}),
    ("lamda", {}, {"gradient_checkpointing": True}),
    ("bottleneck", {}, {}),
    ("tokentune", {}, {}),
    ("tokentune", KEPT, {}),
    ("lora+tokentune", {}, {"gradient_checkpointing": True}),
    ("lora+light-peft", {}, {}),
    ("lamda+light-peft", {}, {}),
    ("bottleneck+light-peft", {}, {"gradient_checkpointing": True}),
)


@pytest.mark.parametrize(
    ("name", "shared", "keys"),
    [pytest.param(*FSDP[0]), *(pytest.param(*c, marks=pytest.mark.slow) for c in FSDP[1:])],
)
def test_fsdp_as_one_process(name: str, shared: dict[str, Any], keys: dict[str, Any], compare: Any) -> None:
    """FSDP2, with parameters in pieces in both stages of a run: the result of one process."""
    compare(still(name), Sharded(), shared={"fsdp": True, **shared}, **keys)


@pytest.mark.slow
def test_fsdp_in_three_processes(compare: Any) -> None:
    compare(still("lean"), Sharded(), count=3, shared={"fsdp": True})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "bottleneck+light-peft"])
def test_fsdp_of_tied_embeddings(name: str, tmp_path: Path) -> None:
    """One weight in four places, and layers that hold their own feed-forward block (BART)."""
    cell = build(name, "bart", "seq2seq", tmp_path / "cell")
    first = leantune.train(cell.recipe("one", learning_rate=1e-3), console=quiet()).folder
    several = cell.recipe("two", learning_rate=1e-3, batch_size=4, fsdp=True)
    together(2, train, several, False, Sharded())
    assert losses(Path(several.output)) == pytest.approx(losses(first), rel=2e-6)
    one, two = weights(first), weights(Path(several.output))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_fsdp_of_a_packed_base(kind: str, compare: Any) -> None:
    need(kind)
    settings = {**still("lora+tokentune"), "quantize": kind}
    compare(settings, Sharded(), shared={"fsdp": True}, gradient_checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step"), [("full", 8), ("lora", 8), ("lamda", 8), ("bottleneck", 8), ("lean", 3), ("lean", 8)]
)
def test_fsdp_stops_and_goes_on(name: str, step: int, bert_folder: Path, rows: Path, tmp_path: Path) -> None:
    """A signal to the second process, in a run with dropout and drawn tokens; then the same bits."""

    def made(place: str) -> Any:
        keys = {"batch_size": 4, "fsdp": True}
        return recipe(bert_folder, rows, tmp_path / place, SETTINGS[name], train=keys)

    together(2, train, made("whole"), False, Sharded())
    stop = At(step, 1, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    stopped = Team(2, train, made("halves"), False, stop).results()
    assert {str(one).split(";")[0] for one in stopped} == {f"stopped after step {step}"}, stopped
    assert RunFolder(tmp_path / "halves").plan_file.is_file() == (name == "lean" and step > 4)
    told = together(2, train, made("halves"), True, Sharded())[0][2]
    assert f"resuming from checkpoint-{step}" in told
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_what_fsdp_does_not_train(base: Path, rows: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def refused(name: str, **keys: Any) -> str:
        made = recipe(base, rows, tmp_path / "run", SETTINGS[name], train={"fsdp": True, **keys})
        with pytest.raises(UserError) as error:
            check_shareable(made)
        return str(error.value)

    assert "start with --processes N" in refused("lora")
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert refused("lora+int8").startswith("lean.quantize = 'int8': not with train.fsdp")
    monkeypatch.setitem(SETTINGS, "lora+nf4", {"adapter": {"type": "lora"}, "quantize": "nf4"})
    monkeypatch.setitem(SETTINGS, "adalora", {"adapter": {"type": "lora", "variant": "adalora"}})
    assert refused("adalora").startswith("lean.adapter.variant = adalora: not with train.fsdp")
    assert refused("lora+nf4", bf16=True).startswith("train.bf16: not with lean.quantize and train.fsdp")
    assert "accepted are" in refused("lora", fsdp_config={"activation_checkpointing": True})
    assert refused("lora", fsdp="full_shard").startswith("train.fsdp = 'full_shard': accepted is true")
    assert "with version 2" in refused("lora", fsdp_config={"version": 1})
    assert "accepted are" in refused("lora", fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"})
    assert not (tmp_path / "run").exists()


# -- launchers -----------------------------------------------------------------------------------------------


def command(made: Any, file: Path) -> subprocess.CompletedProcess[str]:
    """`leantune train RECIPE --processes 2`, as a person types it."""
    file.write_text(json.dumps(made.to_dict()))
    typed = [sys.executable, "-m", "leantune.cli", "train", str(file), "--processes", "2"]
    return subprocess.run(typed, capture_output=True, text=True, cwd=ROOT)


def test_the_command(base: Path, rows: Path, tmp_path: Path) -> None:
    """One report, exit code 0."""
    made = recipe(base, rows, tmp_path / "run", still("lamda"), train={"batch_size": 4, "steps": 2})
    done = command(made, tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("forecast: ") == done.stdout.count("Run folder: ") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("started", ["torchrun", "accelerate"])
def test_other_launchers(started: str, base: Path, rows: Path, tmp_path: Path) -> None:
    """As docs/processes.md says; the port alone is chosen here, not to meet another test."""
    keys = {"batch_size": 4, "steps": 2, "fsdp": True}
    made = recipe(base, rows, tmp_path / "run", still("lean"), train=keys)
    (tmp_path / "recipe.yaml").write_text(json.dumps(made.to_dict()))
    port = str(free_port())
    lines = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", port],
        "accelerate": [
            *("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port)
        ],
    }
    program, *options = [*lines[started], "-m", "leantune.cli", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | ({"ACCELERATE_USE_CPU": "true"} if started == "accelerate" else {}),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("forecast: ") == done.stdout.count("Run folder: ") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_mistake_is_told_once(base: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    done = command(recipe(base, rows, tmp_path / "run", still("lamda")), tmp_path / "recipe.yaml")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("leantune: ")]
    assert len(lines) == 1 and lines[0].endswith("the folder is not empty and holds no run")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_worker_is_killed(base: Path, rows: Path, tmp_path: Path) -> None:
    """The launcher names the process and the signal, and ends with 1."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, signal; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    code = (
        "import sys; from leantune.run import launching; from leantune.errors import RunError\n"
        "sys.executable = sys.argv[1]\n"
        "try: launching.launch(2, [])\n"
        "except RunError as error: print(error)"
    )
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    fake.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, str(fake)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "process 1 was ended by SIGKILL; the others were stopped"


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str]:
    """Exit code and what stands on standard error."""
    from leantune.cli import main

    monkeypatch.setattr(sys, "argv", ["leantune", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code, capsys.readouterr().err


def test_other_commands_run_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (
        ["predict", "run", "text"],
        ["evaluate", "run"],
        ["compare", "recipe.yaml"],
        ["doctor"],
    ):
        monkeypatch.setenv("RANK", "0")
        line = f"leantune: leantune {arguments[0]} runs in one process: start it without a launcher\n"
        assert refusal(monkeypatch, capsys, *arguments) == (2, line)
        monkeypatch.setenv("RANK", "1")
        assert refusal(monkeypatch, capsys, *arguments) == (0, "")
    monkeypatch.setenv("RANK", "0")
    code, line = refusal(monkeypatch, capsys, "train", "recipe.yaml", "--processes", "3")
    assert (code, line) == (2, "leantune: --processes = 3: the launcher has started 2\n")


def test_what_launchers_do_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process instead of two; DDP instead of FSDP: both are refused (HOSTS.md)."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="asked for several processes and has started one"):
        processes.join()
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for name, option in (("FSDP", "--use_fsdp: write train.fsdp"), ("DEEPSPEED", "--use_deepspeed: ")):
        with monkeypatch.context() as patched:
            patched.setenv(f"ACCELERATE_USE_{name}", "true")
            with pytest.raises(UserError, match=f"accelerate launch {option}"):
                processes.join()
