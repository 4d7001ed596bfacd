"""Reading a log, smoothing and thinning it."""

import json
import math

import pytest

from leantune.report.runlog import Points, read_log, smooth, thin


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_resumed_run_counts_each_step_once_and_the_later_line_holds(tmp_path):
    log = read_log(
        write(
            tmp_path / "log.jsonl",
            *({"step": s, "loss": 1.0} for s in (1, 2, 3, 4)),
            {"step": 4, "evaluation": "validation", "accuracy": 0.5},
            *({"step": s, "loss": 2.0} for s in (3, 4, 5)),
            {"step": 4, "evaluation": "validation", "accuracy": 0.6},
        )
    )
    assert log.series("loss") == Points([1, 2, 3, 4, 5], [1.0, 1.0, 2.0, 2.0, 2.0])
    assert log.evaluated("validation", "accuracy") == Points([4], [0.6])


def test_half_a_last_line_costs_nothing_else(tmp_path):
    log = read_log(write(tmp_path / "log.jsonl", {"step": 1, "loss": 1.0}, "", "[1]", '{"step": 2, "lo'))
    assert log.series("loss") == Points([1], [1.0])
    assert log.unreadable == 2


def test_not_finite_losses_are_named_and_not_drawn(tmp_path):
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": math.nan},
        {"step": 3, "loss": math.inf},
        {"step": 4},
    ]
    log = read_log(write(tmp_path / "log.jsonl", *lines))
    assert log.not_finite == [2, 3]
    assert log.series("loss") == Points([1], [1.0])


def test_a_missing_log_is_an_empty_one(tmp_path):
    log = read_log(tmp_path / "log.jsonl")
    assert not log.steps and log.last_step == 0 and log.epochs is None and not log.series("loss")


def test_metrics_without_the_trainers_bookkeeping(tmp_path):
    line = {
        "step": 9,
        "epoch": 1.0,
        "evaluation": "test",
        "loss": 1.0,
        "runtime": 3.0,
        "accuracy": 0.5,
        "note": "x",
    }
    log = read_log(write(tmp_path / "log.jsonl", line))
    assert log.metric_names() == ["accuracy"] and log.splits() == ["test"]


def test_smoothing_keeps_a_constant_and_a_straight_line_and_damps_noise():
    x = [float(i) for i in range(200)]
    assert smooth(Points(x, [3.0] * 200)).y == pytest.approx([3.0] * 200)
    assert smooth(Points(x, x)).y[20:-20] == pytest.approx(x[20:-20])
    noise = smooth(Points(x, [(-1.0) ** i for i in range(200)]))
    assert max(map(abs, noise.y)) < 0.3


def test_thinning_keeps_spikes_and_both_ends():
    n = 100_000
    y = [1.0] * n
    y[0], y[51_234], y[77_777], y[-1] = 5.0, 99.0, -99.0, 7.0
    thinned = thin(Points([float(i) for i in range(n)], y), most=400)
    assert len(thinned) <= 402
    assert {5.0, 99.0, -99.0, 7.0} <= set(thinned.y)
    assert thinned.x == sorted(thinned.x) and thinned.x[0] == 0 and thinned.x[-1] == n - 1


def test_short_series_are_not_touched():
    points = Points([1, 2, 3], [1, 2, 3])
    assert thin(points) is points
    assert smooth(points).y == points.y
