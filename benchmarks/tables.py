"""Write the tables of what `benchmarks/run.py` measured: into README, method cards, benchmarks/README.md.

python benchmarks/tables.py            write them
python benchmarks/tables.py --check    say which are stale; exit code 1 if any is

Of a suite that was measured on a GPU and on a CPU the GPU's figures are shown.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.grid import spread  # noqa: E402
from benchmarks.suites.cases import CKPT, SUITES  # noqa: E402
from benchmarks.suites.predicted import saved_by_lamda  # noqa: E402
from scripts.readme_tables import render  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "suites"
NONE = "–"
MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """A suite's results.

    Attributes:
        device: Where.
        scale: Of the shapes.
        groups: Name → {record, rows, complete}.
    """

    device: str
    scale: str
    groups: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, suite: str, folder: Path = RESULTS) -> Measured | None:
        """The GPU's where there are any; None without results."""
        for device in ("cuda", "cpu"):
            file = folder / f"{suite}-{device}.json"
            if file.is_file():
                found = json.loads(file.read_text(encoding="utf-8"))
                return cls(found["device"], found["scale"], found["groups"])
        return None

    def row(self, group: str, method: str) -> dict[str, Any] | None:
        """A case that was measured, else None."""
        row = self.groups[group]["rows"].get(method)
        return row if row is not None and row["status"] == "ok" else None

    def label(self, group: str) -> str:
        """A group's name, which says when its shape is not the real one."""
        return group if self.scale == "full" else group.replace(",", f" ({self.scale}),", 1)

    def times(self, group: str, row: dict[str, Any], what: str) -> list[float]:
        """Seconds of each timed step: of the processor on one CPU thread (others use the machine, too)."""
        threads = self.groups[group]["record"]["machine"]["threads"]
        name = "cpu_seconds" if self.device == "cpu" and threads == 1 else "seconds"
        found: list[float] = row[what][name]
        return found

    def speed(self, group: str, method: str, baseline: str, what: str = "training") -> float | None:
        """How many times as fast as the baseline: on a CPU the median of the rounds' ratios."""
        one, other = self.row(group, method), self.row(group, baseline)
        if one is None or other is None:
            return None
        own, base = self.times(group, one, what), self.times(group, other, what)
        if not own or not base:
            return None
        if self.device == "cpu":  # a step of each in every round
            return statistics.median(b / o for o, b in zip(own, base, strict=False))
        return statistics.median(base) / statistics.median(own)

    def share(self, group: str, method: str, baseline: str, what: str = "training") -> float | None:
        """Peak memory over the baseline's."""
        one, other = self.row(group, method), self.row(group, baseline)
        if one is None or other is None:
            return None
        ratio: float = one[what]["peak_allocated"] / other[what]["peak_allocated"]
        return ratio

    def kept(self, group: str, method: str, baseline: str) -> float | None:
        """Bytes kept for backward over the baseline's."""
        one, other = self.row(group, method), self.row(group, baseline)
        if one is None or other is None:
            return None
        key = "saved_activation_bytes"
        ratio: float = one["training"][key] / other["training"][key]
        return ratio


def suite_table(name: str, found: Measured | None) -> str:
    """One table with all groups, the claims, and what it was measured on."""
    if found is None:
        return f"Not measured yet: `python benchmarks/run.py {name}`.\n"
    suite = SUITES[name]
    head = ["", "trained", "step (quartiles)"]
    head += [f"speed, × {baseline}" for baseline in suite.baselines]
    head += ["kept", "peak"] + [f"of {baseline}" for baseline in suite.baselines]
    head += ["reserved"] if found.device == "cuda" else []
    head += ["evaluation", f"speed, × {suite.baselines[0]}", "peak", "saving, peak", "file"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group, content in found.groups.items():
        cut = "" if content["complete"] else " (cut off by the budget)"
        lines.append("| " + " | ".join([f"**{found.label(group)}**{cut}", *[""] * (len(head) - 1)]) + " |")
        for method, row in content["rows"].items():
            cells = _cells(found, group, method, row, suite.baselines, len(head))
            lines.append("| " + " | ".join(cells) + " |")
    own = [claim for claim in CLAIMS if claim.suite == name]
    claims = [*claims_table(own, {name: found}, place=False), ""] if own else []
    return "\n".join([*lines, "", *claims, *conditions(found), ""])


def _cells(
    found: Measured, group: str, method: str, row: dict[str, Any], baselines: tuple[str, ...], width: int
) -> list[str]:
    if row["status"] != "ok":
        said = row["status"] + (f": {row['why']}" if row["status"] != "out of memory" else "")
        return [method, said.replace("|", "/"), *[""] * (width - 2)]
    training, evaluation, saving = row["training"], row["evaluation"], row["saving"]
    cells = [method, f"{row['trained_parameters']:,}", seconds(found.times(group, row, "training"))]
    cells += [times(found.speed(group, method, baseline)) for baseline in baselines]
    cells += [mib(training["saved_activation_bytes"]), mib(training["peak_allocated"])]
    cells += [times(found.share(group, method, baseline)) for baseline in baselines]
    cells += [mib(training["peak_reserved"])] if found.device == "cuda" else []
    cells += [seconds(found.times(group, row, "evaluation"))]
    cells += [times(found.speed(group, method, baselines[0], "evaluation"))]
    cells += [mib(evaluation["peak_allocated"])]
    return [*cells, mib(saving.get("peak_allocated")), mib(saving.get("bytes"))]


def conditions(found: Measured) -> list[str]:
    """What the figures were measured on: one line for every different command, machine or commit."""
    lines = []
    for group in found.groups.values():
        record = group["record"]
        machine, versions = record["machine"], record["versions"]
        where = machine.get("gpu") or (
            f"CPU ({machine['processor']}, {machine['threads']} of {machine['cores']} cores, "
            "processor seconds)"
        )
        kept = ("torch", "transformers", "peft", "bitsandbytes", "liger-kernel")
        packages = ", ".join(f"{name} {versions[name]}" for name in kept if name in versions)
        changed = " with changes" if record["git"]["changed_files"] else ""
        lines.append(
            f"`{record['command']}`: **{where}**, {found.scale} shapes, {record['dtype']}, random weights, "
            f"AdamW, seed {record['seed']}, {record['rounds']} rounds; {packages}; "
            f"commit {record['git']['commit'][:9]}{changed}."
        )
    return list(dict.fromkeys(lines))


def seconds(values: list[float]) -> str:
    """Median (lower – upper quartile)."""
    if not values:
        return NONE
    middle = statistics.median(values)
    if len(values) < 2:
        return f"{_short(middle)} s"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{_short(middle)} s ({_short(low)}–{_short(high)})"


def _short(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def times(ratio: float | None) -> str:
    """1.32×."""
    return NONE if ratio is None else f"{ratio:.2f}×"


def mib(size: int | None) -> str:
    """Bytes in MiB, or GiB from four of them on."""
    if size is None:
        return NONE
    return f"{size / 2**30:.2f} GiB" if size >= 4 * 2**30 else f"{size / MIB:.1f} MiB"


@dataclass(frozen=True)
class Claim:
    """A figure that is promised, and how ours is read off the results.

    Attributes:
        suite: Where it was measured.
        what: In words.
        promised: The paper's figure, or what we set ourselves.
        ours: From a group's results; None where the group does not show it.
    """

    suite: str
    what: str
    promised: str
    ours: Callable[[Measured, str], str | None]


def _below(method: str, baseline: str, found: Measured, group: str) -> str | None:
    share = found.share(group, method, baseline)
    kept = found.kept(group, method, baseline)
    return None if share is None or kept is None else f"{1 / share:.2f}× (kept for backward {1 / kept:.2f}×)"


def _faster(method: str, baseline: str, what: str, found: Measured, group: str) -> str | None:
    ratio = found.speed(group, method, baseline, what)
    return None if ratio is None else f"{ratio:.2f}×"


def _less(method: str, baseline: str, what: str, found: Measured, group: str) -> str | None:
    share = found.share(group, method, baseline, what)
    if share is None:
        return None
    kept = found.kept(group, method, baseline) if what == "training" else None
    return f"{100 * (share - 1):+.0f} %" + (f" (kept {100 * (kept - 1):+.0f} %)" if kept is not None else "")


def _both(method: str, baseline: str, found: Measured, group: str) -> str | None:
    speed, share = found.speed(group, method, baseline), found.share(group, method, baseline)
    if speed is None or share is None:
        return None
    return f"{speed:.2f}× the speed at {share:.2f}× the memory"


def _of_full(methods: tuple[str, ...], found: Measured, group: str) -> str | None:
    shares = [found.share(group, method, "full") for method in methods]
    if any(share is None for share in shares):
        return None
    return " → ".join(f"{100 * share:.0f} %" for share in shares if share is not None)


def _as_predicted(found: Measured, name: str) -> str | None:
    one, other = found.row(name, "LaMDA, B frozen"), found.row(name, "LoRA")
    group = next((each for each in SUITES["lamda-memory"].groups[found.scale] if each.name == name), None)
    if found.device != "cpu" or one is None or other is None or group is None:
        return None  # counted for float32: in bfloat16 PEFT keeps copies of its own
    key = "saved_activation_bytes"
    measured = other["training"][key] - one["training"][key]
    return f"{mib(saved_by_lamda(group, found.scale))} predicted, {mib(measured)} measured"


THIRD, FORTY = "Light-PEFT 1/3 + 1/3", "Light-PEFT 40 % + 40 %"
CLAIMS: tuple[Claim, ...] = (
    Claim(
        "lamda-memory", "LaMDA, B frozen: peak below LoRA's", "paper: up to 1.32×",
        partial(_below, "LaMDA, B frozen", "LoRA"),
    ),
    Claim(
        "lamda-memory",
        "LaMDA, B frozen: kept for backward less than LoRA",
        "counted by hand (`suites/predicted.py`)",
        _as_predicted,
    ),
    *(
        claim
        for method, share in ((THIRD, "1/3"), (FORTY, "40 %"))
        for claim in (
            Claim(
                "light-peft-speed", f"Light-PEFT {share}: training, speed × LoRA", "paper: 1.6×",
                partial(_faster, method, "LoRA", "training"),
            ),
            Claim(
                "light-peft-speed", f"Light-PEFT {share}: inference, speed × LoRA", "paper: 1.6×",
                partial(_faster, method, "LoRA", "evaluation"),
            ),
            Claim(
                "light-peft-speed", f"Light-PEFT {share}: training memory", "paper: −39 %",
                partial(_less, method, "LoRA", "training"),
            ),
            Claim(
                "light-peft-speed", f"Light-PEFT {share}: inference memory", "paper: −48 %",
                partial(_less, method, "LoRA", "evaluation"),
            ),
        )
    ),
    Claim(
        "tokentune-memory", "QLoRA → QLoRA on 25 % of tokens, of full fine-tuning's memory",
        "paper: 37 % → 21 %", partial(_of_full, ("QLoRA", "QLoRA, 25 % of tokens")),
    ),
    Claim(
        "tokentune-memory", "16 tokens, of full fine-tuning's memory", "paper: about half",
        partial(_of_full, ("full, 16 tokens",)),
    ),
    *(
        Claim(
            "tokentune-memory", f"{method} against LoRA + checkpointing",
            "ours: faster at no more memory", partial(_both, method, CKPT),
        )
        for method in ("LoRA, 25 % of tokens", "LoRA, 25 % of tokens + checkpointing")
    ),
    Claim(
        "lean", "lean against LoRA + checkpointing", "ours: ≥ 2× the speed at no more memory",
        partial(_both, "lean", CKPT),
    ),
    Claim(
        "lean", "lean, of full fine-tuning's memory", "ours: ≤ 33 %", partial(_of_full, ("lean",)),
    ),
)  # fmt: skip
CARDS = {
    "lamda-memory": "src/leantune/lamda/README.md",
    "light-peft-speed": "src/leantune/lightpeft/README.md",
    "tokentune-memory": "src/leantune/tokentune/README.md",
    "lean": "benchmarks/README.md",
}


def claims_table(claims: list[Claim], found: dict[str, Measured], *, place: bool) -> list[str]:
    """Promised | ours, group by group; with `place` a link to the whole table."""
    lines = ["| | promised | ours |" + (" all of it |" if place else ""), "|---|---|---|" + "---|" * place]
    for claim in claims:
        measured = found.get(claim.suite)
        if measured is None:
            continue
        shown = [(group, claim.ours(measured, group)) for group in measured.groups]
        said = [f"{value} ({measured.label(group)})" for group, value in shown if value is not None]
        if said:
            link = f" [{claim.suite}]({CARDS[claim.suite]}) |" if place else ""
            lines.append(f"| {claim.what} | {claim.promised} | {'<br>'.join(said)} |{link}")
    return lines


def summary(found: dict[str, Measured]) -> str:
    """One row a claim, for the README."""
    if not found:
        return "Not measured yet: `python benchmarks/run.py all`.\n"
    where = sorted({_where(measured) for measured in found.values()})
    return "\n".join([*claims_table(list(CLAIMS), found, place=True), "", f"{'; '.join(where)}.", ""])


def _where(found: Measured) -> str:
    machine = next(iter(found.groups.values()))["record"]["machine"]
    if "gpu" in machine:
        return f"Measured on {machine['gpu']}, {found.scale} shapes"
    return f"Measured on a CPU ({machine['threads']} thread), on {found.scale} versions of the shapes"


def accuracy(file: Path) -> str:
    """Data sets × methods: mean ± standard deviation over seeds."""
    if not file.is_file():
        return "Not measured yet: `python benchmarks/run.py accuracy`.\n"
    result = json.loads(file.read_text(encoding="utf-8"))
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    lines = ["| | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
    for data in dict.fromkeys(row["data"] for row in result["rows"]):
        cells = []
        for method in methods:
            rows = [row for row in result["rows"] if (row["data"], row["method"]) == (data, method)]
            good = [row["metrics"] for row in rows if "metrics" in row]
            shown = spread(good, _split(good)) if good else "failed" if rows else NONE
            cells.append(f"{shown} [{len(good)}]" if good else shown)
        lines.append(f"| {data} | " + " | ".join(cells) + " |")
    record = result["record"]
    note = (
        f"`{record['command']}`; accuracy, Pearson's r (stsb) or held-out loss (gsm8k, arc_easy), [seeds]; "
    )
    return "\n".join([*lines, "", note + f"commit {record['git']['commit'][:9]}.", ""])


def _split(metrics: list[dict[str, Any]]) -> str:
    return "test" if all("test" in one["evaluation"] for one in metrics) else "validation"


def tables(folder: Path = RESULTS) -> dict[str, dict[str, str]]:
    """Document → marker → what stands between <!-- marker --> and <!-- /marker -->."""
    loaded = {name: Measured.load(name, folder) for name in SUITES}
    made: dict[str, dict[str, str]] = {}
    for name, card in CARDS.items():
        made.setdefault(card, {})[f"suite-{name}"] = suite_table(name, loaded[name])
    made["benchmarks/README.md"]["suite-accuracy"] = accuracy(folder / "accuracy.json")
    found = {name: measured for name, measured in loaded.items() if measured is not None}
    made["README.md"] = {"suites": summary(found)}
    return made


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit code."""
    if set(arguments) - {"--check"}:
        print(f"{' '.join(arguments)}: accepted is --check alone", file=sys.stderr)
        return 2
    stale = []
    for document, blocks in tables().items():
        path = ROOT / document
        old = new = path.read_text(encoding="utf-8")
        for marker, content in blocks.items():
            new = render(new, marker, content)
        if new != old:
            stale.append(document)
            if not arguments:
                path.write_text(new, encoding="utf-8")
    for document in stale:
        print(f"{document}: {'stale' if arguments else 'written'}")
    return int(bool(stale) and bool(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
