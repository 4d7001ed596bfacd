"""Find out by doing it what each method can do on each architecture, and write the table.

python scripts/capabilities.py                     all cells (ten minutes on two cores)
python scripts/capabilities.py --only lora llama   cells of the named methods, architectures; others stay
python scripts/capabilities.py --abilities ddp     these columns alone; others stay
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FILE = ROOT / "src" / "leantune" / "capabilities.json"


def main() -> None:
    """Examine the cells, and write after each."""
    from rich.progress import Progress

    from leantune.run.facts import versions
    from tests.capabilities.cells import ABILITIES, FAMILIES, abilities_on
    from tests.run.support import SETTINGS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="methods or architectures")
    parser.add_argument("--abilities", nargs="*", choices=list(ABILITIES), help="columns")
    arguments = parser.parse_args()
    only = set(arguments.only)
    before = json.loads(FILE.read_text())["cells"] if FILE.is_file() else {}
    architectures = [f"{family} {task}" for family, task in FAMILIES]
    cells = {
        method: {name: before.get(method, {}).get(name, {}) for name in architectures} for method in SETTINGS
    }
    columns = {
        (family, task): [
            name
            for name in abilities_on(family, task)
            if arguments.abilities is None or name in arguments.abilities
        ]
        for family, task in FAMILIES
    }
    wanted = [
        (method, family, task, columns[family, task])
        for family, task in FAMILIES
        for method in SETTINGS
        if columns[family, task]
        and (
            not only
            or (method in only or not only & set(SETTINGS))
            and (family in only or not only - set(SETTINGS))
        )
    ]
    with ProcessPoolExecutor() as pool, Progress() as progress:
        found = pool.map(_examine, wanted)
        for (method, family, task, _), cell in zip(wanted, progress.track(found, len(wanted)), strict=True):
            known = cells[method][f"{family} {task}"] | cell
            cells[method][f"{family} {task}"] = {
                name: known[name] for name in abilities_on(family, task) if name in known
            }
            result = {
                "command": "python scripts/capabilities.py",
                "versions": versions(),
                "abilities": list(ABILITIES),
                "architectures": architectures,
                "cells": cells,
            }
            FILE.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _examine(cell: tuple[str, str, str, list[str]]) -> dict[str, bool | str]:
    """One cell, in a process of its own."""
    import torch

    from tests.capabilities.cells import examine

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        method, family, task, abilities = cell
        return examine(method, family, task, Path(place) / "cell", abilities)


if __name__ == "__main__":
    main()
