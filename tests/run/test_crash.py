"""A small part of benchmarks/crash_test.py: killed at random file operations, resumed, equal bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def crash(tmp_path: Path, *options: str) -> dict[str, object]:
    out = tmp_path / "crash.json"
    command = [sys.executable, "benchmarks/crash_test.py", "--out", str(out), *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=900)
    return json.loads(out.read_text())


def test_killed_at_random_file_operations(tmp_path: Path) -> None:
    told = crash(tmp_path, "--methods", "lean", "--kinds", "operation", "--kills", "1", "--seed", "5")
    assert told["struck"] and told["lost"] == told["different"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["operation", "time", "stop"])
def test_every_method(kind: str, tmp_path: Path) -> None:
    told = crash(tmp_path, "--kinds", kind, "--kills", "4")
    assert told["lost"] == told["different"] == told["stops_that_saved_nothing"] == 0
