"""`compare.html`: what stands on it, and that it is seen in a real browser on a phone and on a screen."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from leantune.errors import UserError
from leantune.report.comparison import write_comparison
from leantune.report.comparison_rows import comparison_table
from leantune.report.trade_off import Mark, frontier, round_ticks, trade_off_plot
from tests.compare.invented import FIGURES, make_comparison
from tests.report.test_browser import CHROMIUM, chromium, probe
from tests.report.test_page import EVIL, Page

PLOTS = 2 + len(FIGURES)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(make_comparison(tmp_path_factory.mktemp("page") / "banking-compare"))


def test_the_answer_comes_first(page: Path) -> None:
    text = Page(page.read_text()).text
    comparison = json.loads((page.parent / "compare.json").read_text())
    assert comparison["advice"] == "lean" or "Stay with LoRA" in comparison["verdict"]
    places = [text.index(each) for each in ("banking-compare", "8 methods", comparison["verdict"])]
    places += [text.index(each) for each in ("beside LoRA", "Accuracy against memory", "Course of training")]
    assert places == sorted(places)


def test_everything_is_there(page: Path) -> None:
    html = page.read_text()
    found = Page(html)
    assert sum(tag == "svg" for tag, _ in found.elements) == PLOTS
    for text in (
        "Adapter failed, seeds 0, 1, 2: lean.adapter: r=33 is above the size",
        "0.24×",  # bytes kept by lean
        "with estimation",
        "sample standard deviation",
        "its steps are of these",
        "the usual 5e-05, times 2.5 like the recipe's",
        "given for lora",
        "100 + 380",
        "Light-PEFT, seed 0",
        "8 of 12",
        "leantune compare recipes/banking77.yaml --methods full,lora,",
    ):
        assert text in found.text, text
    assert "lora-0/report.html" not in html, "there is no such page here"
    (page.parent / "lora-0" / "report.html").touch()
    assert 'href="lora-0/report.html"' in write_comparison(page.parent).read_text()


def test_self_contained_and_well_formed(page: Path) -> None:
    html = page.read_text()
    for tag, attributes in Page(html).elements:
        assert tag not in {"script", "iframe", "object", "base", "form", "img"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "xlink:href"} or (name == "href" and tag != "a"):
                assert value.startswith(("#", "data:")), (tag, value)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(href|url\()="?#[^")]*', "", svg)), "a fixed colour"


def test_texts_from_data_stay_texts(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "out", seeds=1)
    text = (folder / "compare.json").read_text().replace("bundled:minilm", "EVIL").replace("r=33 is", "EVIL")
    (folder / "compare.json").write_text(text.replace("EVIL", json.dumps(EVIL)[1:-1]))
    found = Page(write_comparison(folder).read_text())
    assert not [tag for tag, _ in found.elements if tag in {"script", "img"}]
    assert found.text.count(EVIL) >= 2


def test_one_seed(tmp_path: Path) -> None:
    text = Page(write_comparison(make_comparison(tmp_path / "out", seeds=1)).read_text()).text
    assert "One seed: no statement about noise" in text and "one seed, 480 steps" in text and "±" not in text


def test_what_is_no_comparison_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no comparison: compare.json is missing"):
        write_comparison(tmp_path)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        write_comparison(tmp_path)


def test_the_terminals_table(page: Path) -> None:
    comparison = json.loads((page.parent / "compare.json").read_text())
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison_table(comparison))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "219 MiB" in text and "0.24×" in text and "failed: lean.adapter" in text and "baseline" in text


def test_the_line_of_the_best() -> None:
    marks = [Mark("a", 1, [0.5]), Mark("b", 2, [0.9]), Mark("c", 3, [0.8]), Mark("d", 4, [0.95])]
    assert [mark.label for mark in frontier(marks)] == ["a", "b", "d"]
    assert [mark.label for mark in frontier(marks, lower_is_better=True)] == ["a"]


def test_ticks_are_round_in_the_unit_that_is_shown() -> None:
    ticks = round_ticks(219 * 2**20, 1024)
    assert [tick / 2**20 for tick in ticks] == [0, 50, 100, 150, 200, 250]


@pytest.mark.parametrize(
    "marks", [[Mark("a", 1, [0.5])], [Mark("a", 0.0, [0.5, 0.5]), Mark("b", 0.0, [0.5])]]
)
def test_plots_of_next_to_nothing(marks: list[Mark]) -> None:
    assert "<svg" in trade_off_plot("t", marks, cost="c", show_cost=str, show_quality=str).svg


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    _, console = chromium(tmp_path, page.as_uri())
    assert console == []
    for width, found in probe(tmp_path, page).items():
        assert found["overflow"] <= 0, f"scrolls sideways at {width} px"
        assert len(found["plots"]) == PLOTS
        assert all(w > 250 and h > 120 for w, h in found["plots"]), found["plots"]
        assert found["lines"] and "none" not in found["lines"]
        assert found["text"] >= 9, "text in plots too small to read"
