"""PEFT's own test suite with LaMDA in place of LoRA: `make test-conformance`.

    python -m tests.conformance            # run it all; fail if anything is not as pinned
    python -m tests.conformance --update   # the same, and pin what came out (results.json)
    python -m tests.conformance --keep     # go on where an interrupted run stopped

Anything unaccounted for is a failure: other counts than the pinned, a test that LoRA passes and LaMDA does
not (a skip counts as not) without a reason in `exceptions.yaml`, and a reason that nothing needs any more.
`scripts/readme_tables.py` writes the table of LaMDA's card from what is pinned.
"""

from __future__ import annotations

import argparse
import resource
from typing import Any

from tests.conformance import verdict
from tests.conformance.standins import write_standins
from tests.conformance.suite import RUNS, WORK, fetch, run


def main() -> None:
    """Fetch, run all forms of all modules, judge."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    parser.add_argument("--update", action="store_true", help="pin what comes out")
    parser.add_argument("--keep", action="store_true", help="go on where an interrupted run stopped")
    arguments = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    fetch()
    write_standins(WORK / "models")
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for form, module in RUNS:
        print(f"{module} as {form} …", flush=True)
        runs[form, module] = run(form, module, arguments.keep)
    results = verdict.summed_up(runs)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{seconds.ru_utime + seconds.ru_stime:.0f} CPU-seconds")
    if arguments.update:
        verdict.pin(results)
    elif differences := verdict.differences(results, verdict.pinned()):
        raise SystemExit("\n".join(differences))
    print(verdict.table(results))


if __name__ == "__main__":
    main()
