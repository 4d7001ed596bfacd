"""What the runs come to: counts, and every difference from LoRA with the reason that is on file for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import yaml

from tests.conformance.suite import FORMS, HERE, MODULES, RUNS

RESULTS = HERE / "results.json"
REASONS = HERE / "exceptions.yaml"


def reasons() -> dict[str, dict[str, str]]:
    """`exceptions.yaml`: `lamda` and `foreign` (pattern of a test's id -> why), `rows` (setting -> why)."""
    return yaml.safe_load(REASONS.read_text())


def summed_up(runs: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Counts of all (form, module) runs, and which of the reasons on file were needed how often.

    Raises:
        SystemExit: Something is not accounted for; each on a line of its own.
    """
    filed = reasons()
    used: dict[str, Counter[str]] = {kind: Counter() for kind in filed}
    faults: list[str] = []
    for kind, what, message in _differences_from_lora(runs):
        patterns = [p for p in filed.get(kind, ()) if fnmatchcase(what, p)]
        if patterns:
            used[kind][patterns[0]] += 1
        else:
            faults.append(f"not in exceptions.yaml under `{kind}`: {what}: {message}")
    for kind, patterns in filed.items():
        unused = [p for p in patterns if not used[kind][p]]
        faults += [f"listed under `{kind}`, and nothing is like that any more: {p}" for p in unused]
    if faults:
        raise SystemExit("\n".join(sorted(faults)))
    return {
        "counts": {
            form: {m: _counts(runs[form, m]["outcomes"].values()) for f, m in RUNS if f == form}
            for form in FORMS
        },
        "out_of_scope": {m: sum(runs["lora", m]["out_of_scope"].values()) for m in MODULES},
        "exceptions": {kind: dict(sorted(counts.items())) for kind, counts in used.items()},
    }


def _differences_from_lora(runs: dict[tuple[str, str], dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(kind of exception, what, what was said) of all that is not the same and green."""
    for form, module in RUNS:
        own, lora = runs[form, module], runs["lora", module]
        for test in own["outcomes"].keys() ^ lora["outcomes"].keys():
            yield "lamda", test, f"{form} and lora did not both collect it"
        for test, outcome in own["outcomes"].items():
            if outcome not in (lora["outcomes"].get(test), "passed"):
                yield "lamda", test, f"{form}: {outcome}: {own['messages'].get(test)}"
        if form != "lora":
            continue
        for row, reason in lora["without"].items():
            yield "rows", reason, row
        for test, outcome in lora["outcomes"].items():
            if outcome == "failed":
                yield "foreign", test, lora["messages"][test]


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def pinned() -> dict[str, Any]:
    """`results.json`, as committed."""
    return json.loads(RESULTS.read_text())


def table(results: dict[str, Any]) -> str:
    """Of the card: counts a module, and the exceptions."""
    counts = results["counts"]
    lines = [
        "| PEFT's tests | in scope | LoRA passes | LaMDA passes | in the paper's form | skipped |",
        "|---|---|---|---|---|---|",
    ]
    total: Counter[int] = Counter()
    for module in MODULES:
        lora = Counter(counts["lora"][module])
        passed = {form: counts[form].get(module, {}).get("passed", "–") for form in FORMS}
        row = [lora.total(), *passed.values(), lora["skipped"]]
        total.update({column: n for column, n in enumerate(row) if isinstance(n, int)})
        lines.append(f"| `{module}` | {' | '.join(map(str, row))} |")
    lines.append(f"| **together** | {' | '.join(str(total[column]) for column in range(5))} |")
    filed = reasons()
    titles = {
        "lamda": "LoRA passes, LaMDA does not",
        "foreign": "LoRA fails too",
        "rows": "Rows of LoRA's parameters without a counterpart",
    }
    for kind, title in titles.items():
        used = results["exceptions"][kind]
        lines += ["", f"{title}: {sum(used.values())}." if used else f"{title}: none."]
        lines += [""] * bool(used)
        lines += [f"- {n} × `{_short(p)}`: {filed[kind][p].strip()}" for p, n in used.items()]
    return "\n".join(lines)


def _short(pattern: str) -> str:
    return pattern.rpartition("::")[2].removesuffix("*").strip().removesuffix("[[]").removesuffix(":")


def pin(results: dict[str, Any]) -> None:
    """Write these results down."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def differences(new: Any, old: Any, path: str = "") -> list[str]:
    """Where two results differ, one line each."""
    if isinstance(new, dict) and isinstance(old, dict):
        keys = sorted(new.keys() | old.keys())
        return [line for key in keys for line in differences(new.get(key), old.get(key), f"{path}/{key}")]
    return [] if new == old else [f"{path}: {new}, pinned is {old}"]
