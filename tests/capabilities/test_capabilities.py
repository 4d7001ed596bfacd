"""The capability table says what is so: cells of it are examined again, and nothing is left out.

By default pairs and all three together, on a decoder's or an encoder-decoder's shape (BERT's are in
tests/run); every other cell in `make test-all`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from leantune.report.capabilities import Capabilities
from tests.capabilities.cells import ABILITIES, FAMILIES, abilities_on, examine
from tests.run.support import SETTINGS

QUICK = {
    ("lora+tokentune", *FAMILIES[2]),
    ("lamda+light-peft", *FAMILIES[2]),
    ("lora+light-peft+tokentune", *FAMILIES[1]),
    ("lean", *FAMILIES[1]),
}


@pytest.mark.filterwarnings("ignore")  # tiny tokenizers and models disagree on their special tokens
@pytest.mark.parametrize(
    ("method", "family", "task"),
    [
        pytest.param(method, *family, marks=() if (method, *family) in QUICK else pytest.mark.slow)
        for method in SETTINGS
        for family in FAMILIES
    ],
)
def test_the_table_is_right(method: str, family: str, task: str, tmp_path: Path) -> None:
    quick = ("train", "resume", "export lora", "export merged", "export pruned")
    abilities = quick if (method, family, task) in QUICK else abilities_on(family, task)
    claimed = Capabilities.load().cells[method][f"{family} {task}"]
    found = examine(method, family, task, tmp_path / "cell", abilities)
    assert found == {ability: claimed[ability] for ability in abilities}


def test_the_table_is_whole() -> None:
    table = Capabilities.load()
    assert table.abilities == tuple(ABILITIES)
    assert table.architectures == tuple(f"{family} {task}" for family, task in FAMILIES)
    assert list(table.cells) == list(SETTINGS)
    for cells in table.cells.values():
        assert list(cells) == list(table.architectures)
        assert all(
            tuple(cells[f"{family} {task}"]) == abilities_on(family, task) for family, task in FAMILIES
        )
