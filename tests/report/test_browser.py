"""The page in a real browser: nothing goes wrong, everything is seen, on a screen and on a phone.

Skipped where there is no chromium (`apt-get install chromium`).
"""

import html
import json
import re
import shutil
import subprocess

import pytest

from leantune.report import write_report
from tests.report.runs import LONG_LABEL, make_run, write_jsonl

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)"
)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--hide-scrollbars",
]

# Opens the page in frames of several widths and writes down what can be seen there.
PROBE = """<!doctype html><meta charset="utf-8"><body><script>
const page = PAGE, widths = [360, 1200], found = {};
const see = (frame, width) => {
  const d = frame.contentDocument, box = e => e.getBoundingClientRect();
  const style = e => frame.contentWindow.getComputedStyle(e);
  found[width] = {
    overflow: d.documentElement.scrollWidth - width,
    plots: [...d.querySelectorAll("svg")].map(e => [box(e).width, box(e).height]),
    lines: [...d.querySelectorAll("svg path[style*=plot-first]")].map(e => style(e).stroke),
    text: Math.min(...[...d.querySelectorAll("svg text")].map(e => box(e).height)),
    costs: Math.max(...[...d.querySelectorAll(".costs dd")].map(e => box(e).bottom)),
    background: style(d.body).backgroundColor, colour: style(d.body).color,
  };
  if (Object.keys(found).length == widths.length) document.body.dataset.found = JSON.stringify(found);
};
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:800px;border:0`;
  frame.onload = () => see(frame, width);
  frame.srcdoc = page;
  document.body.append(frame);
}
</script>"""


def chromium(tmp_path, url, *flags):
    """What the browser writes to its output (the DOM) and to its console."""
    profile = tmp_path / "profile"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def probe(tmp_path, page, *flags):
    """What is seen of `page`, by width of the window."""
    outer = tmp_path / "probe.html"
    text = json.dumps(page.read_text(encoding="utf-8")).replace("</", "<\\/")
    outer.write_text(PROBE.replace("PAGE", text, 1), encoding="utf-8")
    dom, console = chromium(tmp_path, outer.as_uri(), "--window-size=1600,1000", *flags)
    assert console == []
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found, dom[:500]
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "banking77")
    awkward = {
        "input": "x" * 300,
        "predicted": LONG_LABEL,
        "label": "<script>alert(1)</script>",
        "score": 0.99,
    }
    write_jsonl(folder / "predictions.jsonl", [awkward, {"input": "a", "predicted": "b", "label": "b"}])
    return write_report(folder)


def test_nothing_on_the_console(page, tmp_path):
    dom, console = chromium(tmp_path, page.as_uri())
    assert console == []
    assert "banking77" in dom and dom.count("<svg") == 5


def test_seen_on_a_phone_and_on_a_screen(page, tmp_path):
    seen = probe(tmp_path, page)
    for width, found in seen.items():
        assert found["overflow"] <= 0, f"scrolls sideways at {width} px"
        assert len(found["plots"]) == 5
        assert all(w > 250 and h > 120 for w, h in found["plots"]), found["plots"]
        assert found["lines"] and "none" not in found["lines"]
        assert found["text"] >= 9, "text in plots too small to read"
        assert found["costs"] < 640, "result and costs do not fit the first screen"


def test_dark_and_light(page, tmp_path):
    light = probe(tmp_path, page, "--blink-settings=preferredColorScheme=1")["1200"]
    dark = probe(tmp_path, page, "--blink-settings=preferredColorScheme=0")["1200"]

    def brightness(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765

    assert brightness(light["background"]) > 0.9 and brightness(light["colour"]) < 0.2
    assert brightness(dark["background"]) < 0.2 and brightness(dark["colour"]) > 0.8
    assert brightness(dark["lines"][0]) > brightness(light["lines"][0]), "plots follow the scheme"
