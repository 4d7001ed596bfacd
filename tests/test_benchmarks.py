"""`benchmarks/`: wrong arguments, the engine at tiny scale, tables from made-up results, freshness."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress

from benchmarks.run import parse
from benchmarks.suites import cases, engine
from benchmarks.suites.accuracy import GRID, as_prompt
from benchmarks.suites.accuracy import cells as accuracy_cells
from benchmarks.suites.cases import METHODS, SUITES, Group, Suite
from benchmarks.suites.engine import How, run_suite
from benchmarks.suites.peers import chunked
from benchmarks.suites.record import Results
from benchmarks.suites.shapes import SCALES, SHAPES
from benchmarks.tables import Measured, accuracy, suite_table, summary
from benchmarks.tables import main as tables
from leantune.recipes import Recipe

ROOT = Path(__file__).resolve().parent.parent
NEVER = float("inf")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["speed"], "SUITE = 'speed': accepted are lamda-memory, light-peft-speed"),
        (["lean", "--device", "tpu"], "--device = 'tpu': accepted are cuda, cpu"),
        (["lean", "--device", "cuda"], "sees no CUDA device here"),
        (["lean", "--device", "cpu", "--budget-minutes", "0"], "--budget-minutes = 0.0: must be above 0"),
        (["lean", "--device", "cpu", "--scale", "huge"], "--scale = 'huge': accepted are full, small, tiny"),
        (["lean", "--device", "cpu", "--scale", "tiny"], "name a folder with --out"),
        (["lean", "--device", "cpu", "--only", "lora"], "goes with the suite accuracy alone"),
        (["lean", "--rounds", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


def test_every_case_is_known() -> None:
    for suite in SUITES.values():
        assert set(suite.groups) == set(SCALES)
        for scale in SCALES:
            names = [group.name for group in suite.groups[scale]]
            assert len(names) == len(set(names))
            for group in suite.groups[scale]:
                assert group.shape in SHAPES and set(group.methods) <= set(METHODS)
                assert len(group.methods) == len(set(group.methods))


@pytest.fixture
def two_methods(monkeypatch: pytest.MonkeyPatch) -> str:
    group = Group("Llama-2-7B", 2, 24, ("LoRA + checkpointing", "lean", "LoRA, unsloth"))
    suite = Suite("for a test", ("LoRA + checkpointing",), 1, {"tiny": (group,)})
    monkeypatch.setitem(cases.SUITES, "test", suite)
    return group.name


def run(folder: Path, deadline: float = NEVER, memory: int | None = None) -> tuple[bool, dict[str, Any]]:
    results = Results(folder / "test-cpu.json", "test", "cpu", "tiny")
    with Progress(console=Console(quiet=True)) as progress:
        done = run_suite("test", How("cpu", "tiny", deadline, 2, memory), results, progress)
    file = folder / "test-cpu.json"
    return done, json.loads(file.read_text())["groups"] if file.exists() else {}


@pytest.mark.filterwarnings("ignore")  # other packages' own, as the command does
def test_a_suite_is_measured_and_gone_on_with(two_methods: str, tmp_path: Path) -> None:
    assert run(tmp_path, deadline=time.monotonic()) == (False, {})  # no time: nothing begun
    done, groups = run(tmp_path)
    assert done and groups[two_methods]["complete"]
    rows = groups[two_methods]["rows"]
    assert rows["LoRA, unsloth"]["status"] == "not installed"
    lora, lean = rows["LoRA + checkpointing"], rows["lean"]
    for row in (lora, lean):
        assert len(row["training"]["seconds"]) == len(row["evaluation"]["cpu_seconds"]) == 2
        assert row["training"]["peak_allocated"] > row["weight_bytes"] > 0
        assert row["saving"]["bytes"] > 0
    assert lean["weight_bytes"] < lora["weight_bytes"]
    record = groups[two_methods]["record"]
    assert {"git", "machine", "versions", "seed", "command", "load_at_start", "load_at_end"} <= set(record)
    before = (tmp_path / "test-cpu.json").read_bytes()
    assert run(tmp_path)[0] and (tmp_path / "test-cpu.json").read_bytes() == before  # nothing is done twice
    with pytest.raises(ValueError, match="name another --out"):
        Results(tmp_path / "test-cpu.json", "test", "cpu", "small")


@pytest.mark.filterwarnings("ignore")
def test_out_of_memory_is_a_row(two_methods: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, groups = run(tmp_path, memory=1000)
    row = groups[two_methods]["rows"]["lean"]
    assert done and row["status"] == "out of memory" and "forecast" in row["why"]

    def no_room(*anything: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(engine, "measure_memory", no_room)
    done, groups = run(tmp_path / "again")
    assert done and groups[two_methods]["rows"]["lean"]["status"] == "out of memory"


@pytest.mark.filterwarnings("ignore")
def test_one_method_at_a_time_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def cheap(built: Any, device: str) -> dict[str, Any]:
        return {"training": {}, "evaluation": {}}

    monkeypatch.setattr(engine, "measure_memory", cheap)
    group = Group("Llama-2-7B", 2, 24, ())
    rows = [engine.Case("LoRA + checkpointing"), engine.Case("LoRA, unsloth"), engine.Case("lean")]
    how = How("cpu", "tiny", NEVER, 2, None)
    steps: list[str] = []

    def tell(case: engine.Case) -> None:
        steps.append(case.name)
        held.append(sum(each.built is not None for each in rows))

    assert engine._in_rounds(group, rows, how, tell, lambda complete: None)
    assert set(held) == {0}  # each was let go before the next
    assert [len(case.row["training"]["seconds"]) for case in (rows[0], rows[2])] == [2, 2]
    assert rows[1].row["status"] == "not installed" and len(steps) == 9  # memory and two rounds of three


def test_chunked_loss_is_the_ordinary_one() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 11, (37,), generator=draw)
    target[::5] = -100
    ordinary = F.cross_entropy((hidden @ weight.T).float(), target)
    wanted = torch.autograd.grad(ordinary, (hidden, weight))
    loss = chunked(hidden, weight, target, size=10)
    found = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, ordinary)
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


def made_up(device: str) -> dict[str, Any]:
    def row(times: list[float], evaluation: list[float], peak: int, kept: int) -> dict[str, Any]:
        wall = [10 * second for second in times]
        return {
            "status": "ok", "trained_parameters": 1234, "saving": {"skipped": "13 GiB of weights"},
            "training": {
                "seconds": wall if device == "cpu" else times, "cpu_seconds": times,
                "peak_allocated": peak * 2**20, "peak_reserved": 2 * peak * 2**20,
                "saved_activation_bytes": kept * 2**20,
            },
            "evaluation": {
                "seconds": evaluation, "cpu_seconds": evaluation, "peak_allocated": 50 * 2**20,
            },
        }  # fmt: skip

    machine = {"processor": "P", "threads": 1, "cores": 2} | ({"gpu": "G"} if device == "cuda" else {})
    record = {
        "machine": machine, "versions": {"torch": "9"}, "command": "python benchmarks/run.py lean",
        "git": {"commit": "0123456789abcdef", "changed_files": False}, "dtype": "float32", "seed": 0,
        "rounds": 3,
    }  # fmt: skip
    rows = {
        "LoRA + checkpointing": row([2.0, 4.0, 3.0], [1.0, 1.0, 1.0], 200, 80),
        "lean": row([1.0, 1.0, 1.0], [0.5, 0.5, 0.5], 150, 60),
        "full": row([6.0, 6.0, 6.0], [1.0, 1.0, 1.0], 600, 300),
        "LoRA": {"status": "out of memory", "why": "no room"},
    }
    groups = {"Llama-2-7B, 2 × 2048": {"complete": True, "record": record, "rows": rows}}
    return {"suite": "lean", "device": device, "scale": "small", "groups": groups}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_tables_arithmetic(device: str, tmp_path: Path) -> None:
    (tmp_path / f"lean-{device}.json").write_text(json.dumps(made_up(device)))
    found = Measured.load("lean", tmp_path)
    text = suite_table("lean", found)
    lean = next(line for line in text.splitlines() if line.startswith("| lean |"))
    cells = [cell.strip() for cell in lean.strip("|").split("|")]
    reserved = ["300.0 MiB"] if device == "cuda" else []
    assert cells == [
        "lean", "1,234", "1.00 s (1.00–1.00)", "3.00×", "6.00×", "60.0 MiB", "150.0 MiB", "0.75×", "0.25×",
        *reserved, "0.500 s (0.500–0.500)", "2.00×", "50.0 MiB", "–", "–",
    ]  # fmt: skip
    assert "3.00 s (2.50–3.50)" in text and "| LoRA | out of memory |" in text
    assert "3.00× the speed at 0.75× the memory" in text and "| 25 % (" in text
    assert ("**G**" if device == "cuda" else "**CPU (P, 1 of 2 cores") in text and "commit 012345678" in text
    assert found is not None and "25 % (Llama-2-7B (small), 2 × 2048)" in summary({"lean": found})


def test_the_accuracy_table(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "data": "sst2",
            "method": "lora",
            "seed": seed,
            "metrics": {"evaluation": {"test": {"accuracy": value}}},
        }
        for seed, value in enumerate((0.8, 0.9, 1.0))
    ]
    rows += [{"data": "rte", "method": "lora", "seed": 0, "failed": "why"}]
    record = {"command": "c", "git": {"commit": "0123456789"}}
    (tmp_path / "accuracy.json").write_text(json.dumps({"record": record, "rows": rows}))
    text = accuracy(tmp_path / "accuracy.json")
    assert "| sst2 | 90.00 ± 10.00 [3] |" in text and "| rte | failed |" in text


def test_the_accuracy_grid_is_accepted() -> None:
    import yaml

    runs = list(accuracy_cells(yaml.safe_load(GRID.read_text(encoding="utf-8"))))
    assert {cell.seed for cell in runs} == {0, 1, 2} and len({cell.folder for cell in runs}) == len(runs)
    for cell in runs:
        if cell.seed == 0:
            Recipe.load(ROOT / cell.recipe, *cell.overrides)


def test_arc_as_prompt() -> None:
    row = {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"}
    assert as_prompt(row) == {"prompt": "Why?\nA. so\nB. no\nAnswer:", "completion": " B"}


def test_tables_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables(["--check"]) == 0, capsys.readouterr().out + "run: python benchmarks/tables.py"
