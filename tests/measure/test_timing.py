"""The step clock, on a clock of our own."""

import pytest
import torch

from leantune.measure import StepClock, device_synchronize


class Hands:
    """A clock whose hands the test moves."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def timed(steps, *, warm_up=2, tokens=None):
    hands = Hands()
    clock = StepClock(warm_up=warm_up, now=hands)
    for i, seconds in enumerate(steps):
        with clock.step(tokens=tokens[i] if tokens else None):
            hands.time += seconds
        hands.time += 1000.0  # between steps: evaluation, saving
    return clock


def test_median_leaves_warm_up_and_the_time_between_steps_out():
    clock = timed([90.0, 50.0, 1.0, 3.0, 2.0])
    assert clock.seconds == [90.0, 50.0, 1.0, 3.0, 2.0]
    assert clock.median_seconds == 2.0


def test_a_run_shorter_than_its_warm_up_counts_all():
    assert timed([4.0, 2.0]).median_seconds == 3.0
    assert timed([]).median_seconds is None


def test_tokens_per_second_of_the_steps_that_count():
    assert timed([90.0, 50.0, 1.0, 3.0], tokens=[999, 999, 100, 300]).tokens_per_second == 100.0
    assert timed([90.0, 50.0, 1.0, 3.0], tokens=[None, None, 100, 300]).tokens_per_second == 100.0
    assert timed([90.0, 50.0, 1.0, 3.0], tokens=[1, 1, 100, None]).tokens_per_second is None
    assert timed([]).tokens_per_second is None


def test_a_step_that_fails_is_no_step():
    clock = timed([1.0])
    with pytest.raises(ValueError, match="boom"), clock.step():
        raise ValueError("boom")
    assert len(clock.seconds) == 1
    with pytest.raises(RuntimeError, match="without start"):
        clock.stop()


def test_begin_and_end_by_hand_as_in_a_callback():
    hands = Hands()
    clock = StepClock(warm_up=0, now=hands)
    clock.start()
    hands.time += 5
    assert clock.stop(tokens=10) == 5
    assert clock.tokens_per_second == 2


def test_waits_for_the_device_at_both_ends(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(str(device)))
    clock = StepClock("cuda:0", now=Hands())
    with clock.step():
        assert calls == ["cuda:0"]
    assert calls == ["cuda:0", "cuda:0"]
    device_synchronize("cpu")
    assert len(calls) == 2


def test_warm_up_must_be_a_count():
    with pytest.raises(ValueError, match="warm_up must be 0 or more, not -1"):
        StepClock(warm_up=-1)
