"""The documents say what is so: tables are fresh, commands and files exist, no path of one machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("src/leantune/*/README.md"),
        *ROOT.glob("data/*/*.md"),
    ]
)


def test_tables_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/readme_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr + "run: python scripts/readme_tables.py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists() or (ROOT / target).exists(), target


def test_the_readmes_recipe_is_accepted(tmp_path: Path) -> None:
    from leantune.recipes import Recipe

    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    file = tmp_path / "recipe.yaml"
    file.write_text(block[1])
    assert Recipe.load(file).method == "lamda+light-peft+tokentune"


def test_the_readmes_commands_exist() -> None:
    from leantune.cli import app

    known = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    written = set(
        re.findall(r"^leantune ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert written and written <= known
