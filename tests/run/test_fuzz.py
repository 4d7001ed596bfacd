"""A small part of benchmarks/fuzz.py: broken and hostile files are read or refused with a line."""

from __future__ import annotations

import pytest

from benchmarks import fuzz

SHARE = {"recipes": 0.04, "data": 0.02, "plans": 0.03, "checkpoints": 0.2, "runs": 0.02}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=[pytest.mark.slow] * (name == "runs")) for name in fuzz.TARGETS]
)
def test_nothing_but_clear_lines(target: str) -> None:
    found = fuzz.fuzz([target], SHARE[target])[target]
    assert found["wrong"] == []
    assert {"read", "refused"} & found["outcomes"].keys()


def test_the_harness_sees_a_fault() -> None:
    import subprocess

    tally = fuzz.Tally("faults", fuzz.Watch())
    with fuzz.workplace() as place:
        tally.watch.allowed = (str(place),)
        tally.case(lambda: 1 / 0, "a traceback")
        tally.case(lambda: subprocess.run(["true"], check=True), "a process")
        tally.case(lambda: (place.parent / "leantune-fuzz-outside").write_text(""), "a write elsewhere")
    (place.parent / "leantune-fuzz-outside").unlink()
    assert tally.outcomes["traceback"] == 1 and tally.outcomes["forbidden"] >= 2
