"""Fill the measured tables of src/leantune/tokentune/README.md from benchmarks/results/*.json.

python benchmarks/tokentune_card.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
CARD = ROOT / "src" / "leantune" / "tokentune" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def sweep() -> str:
    """Counts per task, and the lists."""
    data = json.loads((RESULTS / "tokentune_sweep.json").read_text())
    kinds = ("exact", "refused", "wrong", "not built")
    lines = ["| architectures | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    total = dict.fromkeys(kinds, 0)
    for task, counts in data["counts"].items():
        lines.append(f"| {task} | " + " | ".join(str(counts.get(kind, 0)) for kind in kinds) + " |")
        total = {kind: total[kind] + counts.get(kind, 0) for kind in kinds}
    lines.append("| all | " + " | ".join(f"**{total[kind]}**" for kind in kinds) + " |")
    lines += [
        "",
        f"transformers {data['versions']['transformers']}; reasons in `benchmarks/results/`.",
    ]
    for kind in ("exact", "refused"):
        names = sorted(
            {name for rows in data["rows"].values() for name, (what, _) in rows.items() if what == kind}
        )
        lines += ["", f"<details><summary>{kind}: {len(names)}</summary>", "", ", ".join(names), "</details>"]
    return "\n".join(lines)


def steps() -> str:
    """Memory and time per setting and variant."""
    data = json.loads((RESULTS / "tokentune_steps.json").read_text())
    lines = ["| setting | variant | MiB kept | ratio | step, CPU s | ratio |", "|---|---|---|---|---|---|"]
    for name, rows in data["results"].items():
        for label, row in rows.items():
            lines.append(
                f"| {name} | {label} | {row['bytes'] / 2**20:.1f} | {row['bytes_ratio']:.3f} "
                f"| {row['cpu_s']:.2f} | {row['cpu_s_ratio']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Rewrite the card."""
    text = CARD.read_text()
    for mark, table in (("SWEEP", sweep()), ("STEPS", steps())):
        block = f"<!-- {mark} -->\n{table}\n<!-- /{mark} -->"
        pattern = rf"@@{mark}@@|<!-- {mark} -->.*?<!-- /{mark} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.S)
    CARD.write_text(text)


if __name__ == "__main__":
    main()
