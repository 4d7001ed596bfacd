"""Write the tables of README and cards from what they are about: the registry, and results in JSON.

python scripts/readme_tables.py            write them
python scripts/readme_tables.py --check    say which are stale; exit code 1 if any is
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.grid import table as grid_table  # noqa: E402
from benchmarks.lamda_subspaces import table as subspaces_table  # noqa: E402
from benchmarks.lightpeft_steps import table as steps_table  # noqa: E402
from benchmarks.planner_advice import table as advice_table  # noqa: E402
from benchmarks.tokentune_card import accuracy, sweep  # noqa: E402
from benchmarks.tokentune_card import steps as tokentune_steps  # noqa: E402
from leantune.methods import METHODS  # noqa: E402
from leantune.report.capabilities import (  # noqa: E402
    Capabilities,
    capability_markdown,
    methods_markdown,
)
from tests.conformance import suite, verdict  # noqa: E402


def grid(name: str) -> str:
    """A grid's table with the command that reproduces it."""
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    good = next(row["metrics"] for row in result["rows"] if "metrics" in row)
    versions, hardware = good["versions"], good["hardware"]
    machine = ", ".join(hardware["gpus"]) or f"CPU, {hardware['threads']} thread(s) a run"
    how = f"`{result['command']}`; torch {versions['torch']}, transformers {versions['transformers']}, "
    return f"{grid_table(result)}\n\n{how}peft {versions['peft']}; {machine}.\n"


def steps() -> str:
    """What a pruned model's step costs, with the command that reproduces it."""
    result = json.loads((ROOT / "benchmarks" / "results" / "lightpeft_steps.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    threads = result["machine"]["threads"]
    return f"{steps_table(result)}\n\n`{result['command']}`; {versions}; CPU, {threads} thread(s).\n"


def subspaces() -> str:
    """What LaMDA's starts see of the gradient, with the command that reproduces it."""
    result = json.loads((ROOT / "benchmarks" / "results" / "lamda_subspaces.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{subspaces_table(result)}\n\n`{result['command']}`; {versions}; CPU, 1 thread.\n"


def advice() -> str:
    """Whether what the plan proposes holds under a real limit."""
    result = json.loads((ROOT / "benchmarks" / "results" / "planner_advice.json").read_text())
    return f"{advice_table(result)}\n"


def conformance() -> str:
    """PEFT's own tests with LaMDA in place of LoRA, with the command that reproduces it."""
    how = f"`make test-conformance`; peft {suite.PEFT}; CPU."
    return f"{verdict.table(verdict.pinned())}\n\n{how}\n"


# Document → marker → what stands between <!-- marker --> and <!-- /marker -->.
TABLES = {
    "README.md": {
        "methods": lambda: methods_markdown(METHODS),
        "capabilities": lambda: capability_markdown(Capabilities.load()),
        "banking77": lambda: grid("banking77"),
    },
    "src/leantune/lamda/README.md": {
        **{name: partial(grid, name) for name in ("banking77", "trec-start", "lamda-init")},
        "lamda-subspaces": subspaces,
        "conformance": conformance,
    },
    "src/leantune/lightpeft/README.md": {
        "lightpeft-trec": partial(grid, "lightpeft-trec"),
        "lightpeft-sst2": partial(grid, "lightpeft-sst2"),
        "lightpeft-steps": steps,
    },
    "src/leantune/planner/README.md": {"planner-advice": advice},
    "src/leantune/tokentune/README.md": {
        "tokentune-sweep": sweep,
        "tokentune-steps": tokentune_steps,
        "tokentune-accuracy": accuracy,
    },
    "docs/experiments.md": {
        "tokentune-accuracy": accuracy,
        **{
            name: partial(grid, name)
            for name in (
                "banking77",
                "trec-start",
                "banking77-lean",
                "tokentune-trec",
                "tokentune-strategies",
                "tokentune-decoder",
                "lightpeft-trec",
                "lightpeft-sst2",
            )
        },
    },
}


def render(text: str, marker: str, content: str) -> str:
    """The document with the content between its markers."""
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no markers <!-- {marker} -->")
    return pattern.sub(lambda match: f"{match[1]}{content}{match[2]}", text)


def main() -> int:
    """Write or check; returns the exit code."""
    stale = []
    for document, tables in TABLES.items():
        path = ROOT / document
        old = new = path.read_text(encoding="utf-8")
        for marker, make in tables.items():
            new = render(new, marker, make())
        if new != old:
            stale.append(document)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    for document in stale:
        print(f"{document}: {'stale' if '--check' in sys.argv else 'written'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
