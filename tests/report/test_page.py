"""What stands on the page, and that nothing else gets onto it."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from leantune.errors import UserError
from leantune.report import read_run, render_report, write_report
from tests.report.runs import METRICS, make_run, write_jsonl

VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects elements and text, and fails on tags that do not match."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())


def page(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_answer_comes_first(tmp_path):
    text = page(make_run(tmp_path / "banking77")).text
    places = [
        text.index(each) for each in ("bundled:minilm", "LaMDA", "Accuracy on test", "91.5 %", "66.5 k")
    ]
    places += [text.index(each) for each in ("1.18 GiB", "2 min 43 s", "403 KiB", "Course of training")]
    assert places == sorted(places)
    assert "120 steps, 3 epochs, seed 0" in text


def test_plots_tables_predictions_recipe_and_command(tmp_path):
    folder = make_run(tmp_path / "a run")
    found = page(folder)
    titles = ("Loss", "Scores", "Learning rate", "Frozen share of columns", "Gradient norm")
    assert sum(tag == "svg" for tag, _ in found.elements) == len(titles)
    for text in (
        *titles,
        "Mistakes it was surest of",
        "12 of 40, evenly spaced",
        "adapter: {type: lamda, r: 32}",
    ):
        assert text in found.text
    assert f"leantune train '{folder}/recipe.yaml' 'output={folder}-again'" in found.text
    assert "2.13.0+cpu" in found.text and "16.0 GiB" in found.text


def test_self_contained(tmp_path):
    html = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    for tag, attributes in Page(html).elements:
        assert tag not in {"script", "iframe", "object", "base", "form"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"src", "href", "xlink:href"}:
                assert value.startswith(("#", "data:")), (tag, value)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "default-src 'none'" in html


EVIL = "<script>alert('1')</script>\"><img src=x onerror=alert(2)>{{ 7 * 191 }}$x_1$"


def test_texts_from_data_stay_texts(tmp_path):
    evaluation = {EVIL: {EVIL: 0.5}}
    folder = make_run(
        tmp_path / "<i>run",
        model=EVIL,
        method=EVIL,
        seed=EVIL,
        versions={EVIL: EVIL},
        hardware={EVIL: {EVIL: EVIL}},
        evaluation=evaluation,
        memory={"peak_kind": EVIL, "peak_bytes": EVIL},
    )
    write_jsonl(
        folder / "predictions.jsonl", [{"input": EVIL, "predicted": EVIL, "label": EVIL, "score": EVIL}]
    )
    lines = [{"step": s, "loss": 1.0, "evaluation": EVIL, EVIL: 0.5} for s in (1, 2)]
    write_jsonl(folder / "log.jsonl", lines)
    (folder / "recipe.yaml").write_text("model: {task: '</pre></code><script>'}\n")
    html = write_report(folder).read_text(encoding="utf-8")
    found = Page(html)
    assert not [tag for tag, _ in found.elements if tag in {"script", "img", "i"}]
    assert found.text.count(EVIL) >= 6 and "1337" not in found.text


def test_plots_are_wellformed_themed_and_described(tmp_path):
    html = write_report(make_run(tmp_path / "run", steps=9_000)).read_text(encoding="utf-8")
    assert len(html.encode()) < 400_000  # thousands of steps are thinned
    ids = []
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        root = ElementTree.fromstring(svg)  # noqa: S314 our own text
        assert root.find("title").text and "at step" in root.find("desc").text
        assert root.findall(".//text"), "axes are text, not outlines"
        ids += [e.get("id") for e in root.iter() if e.get("id")]
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(href|url\()="?#[^")]*', "", svg)), "a fixed colour"
    assert len(ids) == len(set(ids))
    variables = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert all(f"{name}:" in html for name in variables - {"--key"})


@pytest.mark.parametrize("metrics", [{}, dict.fromkeys(METRICS)])
def test_nothing_but_an_empty_metrics_file(tmp_path, metrics):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text = page(tmp_path).text
    assert "Result not evaluated –" in text and "No steps were logged" in text and "None" not in text


def test_diverged_and_damaged_runs_say_so(tmp_path):
    folder = make_run(tmp_path / "run")
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 121, "loss": NaN}\n{"step": 122, "loss": Infinity}\n{"step":')
    text = page(folder).text
    assert "The loss of 2 steps was not a finite number, first at step 121." in text
    assert "One line of log.jsonl could not be read" in text


def test_a_constant_curve_one_step_and_a_recipe_that_is_no_yaml(tmp_path):
    folder = make_run(tmp_path / "run")
    write_jsonl(folder / "log.jsonl", [{"step": 1, "loss": 0.0, "learning_rate": 0.0, "grad_norm": 0.0}])
    (folder / "recipe.yaml").write_text("a: [b")
    assert "a: [b" in page(folder).text
    write_jsonl(folder / "log.jsonl", [{"step": s, "loss": 1.0, "grad_norm": 10.0**s} for s in range(60)])
    assert "Gradient norm" in page(folder).text


def test_scripts_that_matplotlibs_font_lacks(tmp_path):
    folder = make_run(tmp_path / "run")
    write_jsonl(folder / "log.jsonl", [{"step": s, "evaluation": "試験", "正解率": 0.5} for s in (1, 2)])
    assert "正解率" in page(folder).text


def test_the_same_run_gives_the_same_page(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert render_report(run) == render_report(run)


def test_a_failed_write_leaves_the_old_page_and_no_litter(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    write_report(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_is_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no finished run: metrics.json is missing"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics.json is not JSON"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        write_report(tmp_path)


def test_importing_the_tables_loads_neither_torch_nor_matplotlib_nor_jinja():
    heavy = ("torch", "matplotlib", "jinja2", "numpy", "yaml")
    code = f"import sys, leantune.report; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_ranks_by_layer(tmp_path):
    folder = make_run(tmp_path / "ranks")
    names = [
        f"bert.encoder.layer.{block}.{kind}" for block in (0, 1, 10) for kind in ("query", "output.dense")
    ]
    scores = {name: 0.2 + 0.1 * number for number, name in enumerate([*names, "bert.pooler.dense"])}
    pattern = {"^" + re.escape(name): 16 * (1 + number % 3) for number, name in enumerate(scores)}
    config = {
        "spectral_ranks": {"budget": 32, "choices": [16, 32, 48], "more_rank_to": "spread"},
        "spectral_scores": dict(sorted(scores.items())),
        "rank_pattern": pattern,
    }
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    text = page(folder).text
    assert (
        "Ranks given to 7 layers under a budget of 32 a layer, more to those whose weights have the least"
        in text
    )
    assert "Side: rank, up to 48. Darkness: energy score, 0.20 to 0.80" in text
    places = [text.index(f"{name}: score {scores[name]:.3f}, rank") for name in scores]
    assert text.index("layer.1.query: score") < text.index("layer.10.query: score") < max(places)
    for broken in ("{", json.dumps({**config, "rank_pattern": None}), json.dumps({"spectral_ranks": None})):
        (folder / "adapter" / "adapter_config.json").write_text(broken)
        assert "Ranks given" not in page(folder).text
