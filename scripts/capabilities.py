"""Find out by doing it what each method can do on each architecture, and write the table.

python scripts/capabilities.py                     all cells (about half an hour on one core)
python scripts/capabilities.py --only lora llama   cells of the named methods, architectures; others stay
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FILE = ROOT / "src" / "leantune" / "capabilities.json"


def main() -> None:
    """Examine the cells, and write after each."""
    from rich.progress import Progress

    from leantune.run.facts import versions
    from tests.capabilities.cells import ABILITIES, FAMILIES, examine
    from tests.run.support import SETTINGS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="methods or architectures")
    only = set(parser.parse_args().only)
    before = json.loads(FILE.read_text())["cells"] if FILE.is_file() else {}
    architectures = [f"{family} {task}" for family, task in FAMILIES]
    cells = {
        method: {name: before.get(method, {}).get(name, {}) for name in architectures} for method in SETTINGS
    }
    wanted = [
        (method, family, task)
        for family, task in FAMILIES
        for method in SETTINGS
        if not only
        or (method in only or not only & set(SETTINGS))
        and (family in only or not only - set(SETTINGS))
    ]
    warnings.simplefilter("ignore")
    with Progress() as progress:
        for method, family, task in progress.track(wanted):
            with tempfile.TemporaryDirectory() as place:
                cells[method][f"{family} {task}"] = examine(method, family, task, Path(place) / "cell")
            result = {
                "command": "python scripts/capabilities.py",
                "versions": versions(),
                "abilities": list(ABILITIES),
                "architectures": architectures,
                "cells": cells,
            }
            FILE.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
