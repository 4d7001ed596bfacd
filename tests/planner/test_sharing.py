"""Figures for each of several GPUs: against ZeRO's own table, and against two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leantune.errors import UserError
from leantune.planner import Sharing, Tracer, estimate
from leantune.planner.sharing import Units, parse_sharing
from tests.planner.settings import LAMDA, LORA, setting

# Rajbhandari et al., "ZeRO", figure 1: 7.5 B parameters, 64 processes, 2 + 2 + 12 bytes each; GB a process.
ZERO = {"ddp": 120.0, "zero1": 31.4, "zero2": 16.6, "zero3": 1.9, "fsdp": 1.9}


@pytest.mark.parametrize("strategy", ZERO)
def test_shares_are_those_of_the_paper(strategy: Any) -> None:
    weights, gradients, optimizer = Sharing(64, strategy).shares
    total = 7.5 * (2 * weights + 2 * gradients + 12 * optimizer)
    assert total == pytest.approx(ZERO[strategy], abs=0.06)


def test_what_is_on_its_way() -> None:
    units = Units(largest=100, outside=7, trained=50, trained_largest=20)
    found = {name: Sharing(2, name).communication(units) for name in ZERO}  # type: ignore[arg-type]
    assert found == {"ddp": 50, "zero1": 50, "zero2": 20, "zero3": 227, "fsdp": 227}
    assert Sharing(1, "fsdp").communication(units) == 0


@pytest.mark.parametrize("lean", [{}, {"adapter": LAMDA}], ids=["full", "lamda"])
def test_engines_agree_and_more_is_less(lean: dict[str, Any]) -> None:
    made = setting("llama", lean, gradient_checkpointing=True)
    tracer, peaks = Tracer(), []
    for strategy in ("ddp", "zero1", "zero2", "zero3"):
        shared = replace(made, sharing=Sharing(4, strategy))  # type: ignore[arg-type]
        traced, closed = tracer.trace(shared), estimate(shared)
        assert closed.peak == pytest.approx(traced.peak, rel=0.2)
        assert closed.memory.communication == traced.memory.communication
        peaks.append(traced.peak)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > tracer.trace(made).peak  # the buckets


def test_mistakes() -> None:
    with pytest.raises(UserError, match="--strategy = 'zero4': accepted are ddp, zero1"):
        parse_sharing(2, "zero4")
    with pytest.raises(UserError, match="give --gpus 2 or more"):
        parse_sharing(1, "fsdp")
    with pytest.raises(UserError, match="--gpus = 0"):
        parse_sharing(0, None)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
@pytest.mark.parametrize("lean", [{}, {"adapter": LORA}], ids=["full", "lora"])
def test_two_processes_take_what_was_forecast(strategy: Any, lean: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, str(worker), strategy, json.dumps(lean), str(tmp_path)]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [subprocess.Popen(command, env=os.environ | world | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["world"] == 2 and found["sharded"] == (strategy == "fsdp")
        assert found["forecast"] == pytest.approx(found["measured"], rel=0.15), found
