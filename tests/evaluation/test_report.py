# SPDX-License-Identifier: Apache-2.0
"""The page: what it says, that it is safe, and that a real browser shows it well."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from evaluation.synthetic import DENSE, PLAIN, SETTINGS, TASKS, answer, realistic, timings, write
from typer.testing import CliRunner

from vllm_adaskip.cli.report import report
from vllm_adaskip.lab.evaluation.report import make_report
from vllm_adaskip.lab.evaluation.results import Answer, OraclePoint, Results, ResultsError, Setting

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return write(tmp_path_factory.mktemp("run"), [*realistic()])


@pytest.fixture(scope="module")
def page(run: Results) -> str:
    return make_report(run, 0.1).html


class _Outline(HTMLParser):
    """What a browser would see: tags that are open at the end, and attributes that refer."""

    VOID = frozenset({"meta", "br", "use", "path", "rect", "circle", "line"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.refers: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.refers += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_refers_to_nothing_outside(page: str) -> None:
    outline = _Outline(page)
    assert not outline.open
    assert all(reference.startswith("#") for reference in outline.refers)
    assert {reference[1:] for reference in outline.refers} <= set(outline.ids)
    assert "script" not in outline.tags and "@import" not in page
    body = page.split("</style>")[1]
    assert not re.search(r"#[0-9a-f]{6}\b", body)  # all colours follow light and dark


def test_every_part_is_there(page: str) -> None:
    for part in (
        "<h1>Switch on ", "vllm serve --model bundled --plugin adaskip", "Every setting",
        "Quality against compute kept", "oracle skip<", "perfect saving",
        "Time against compute kept, batch 16", "Where skipping loses", "Slower than dense",
        "Task by task", "One plan for all sequences", "One layer deleted", "3 layers deleted",
        "Two neighbours swapped", "c0ffee", "some CPU", "0.32.0",
        "adaskip eval --out results", "360 items",
    ):  # fmt: skip
        assert part in page, part


def test_the_same_run_gives_the_same_page(run: Results, page: str) -> None:
    assert make_report(run, 0.1).html == page


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    tasks = [HOSTILE, "$\\frac{1}{0$", "a'\" onmouseover=alert(1)", "__proto__"]
    evil = Setting(name=f"</title>{HOSTILE}", family=f"_{HOSTILE}", skip=[5])
    records: list[Any] = [*realistic(tasks, 6)]
    for one in [r for r in records if isinstance(r, Answer) and r.setting == "dense"]:
        records.append(one.model_copy(update={"setting": evil.name, "text": HOSTILE, "skip": [5]}))
    for name in (HOSTILE, tasks[1]):
        records.append(OraclePoint(candidates=name, metric=name, layers=6, score=0.5))
    results = write(tmp_path, records, [*SETTINGS, evil])
    results.write_manifest(
        results.manifest().model_copy(update={
            "model": HOSTILE, "command": HOSTILE, "data": {HOSTILE: HOSTILE},
            "versions": {HOSTILE: HOSTILE}, "hardware": {HOSTILE: HOSTILE}, "commit": HOSTILE,
        })
    )  # fmt: skip
    page = make_report(results, 0.5).html
    assert "<script" not in page and page.count("&lt;script&gt;") > 20
    outline = _Outline(page)
    assert not outline.open and outline.tags.count("title") > 1


def test_only_perplexity(tmp_path: Path) -> None:
    made = [
        answer(name, f"text/{i}", factor * (4 + i % 3), skip, metric="perplexity")
        for name, factor, skip in (("dense", 1.0, []), ("skip 5", 1.25, [5]))
        for i in range(30)
    ]
    page = make_report(write(tmp_path, [*made], [DENSE, PLAIN]), 0.01).html
    assert "<h1>Nothing to recommend" in page and "perplexities only" in page
    assert "\N{MULTIPLICATION SIGN}1.25" in page and "Perplexity against compute kept" in page
    assert "Quality against compute kept" not in page


def test_nothing_but_two_settings(tmp_path: Path) -> None:
    made = [
        answer(name, f"sum/{i}", float(i > bad), skip)
        for name, bad, skip in (("dense", 2, []), ("skip 5", 20, [5]))
        for i in range(40)
    ]
    results = write(tmp_path, [*made], [DENSE, PLAIN])
    lossy = make_report(results, 0.01)
    assert lossy.headline == "Leave it off: no setting surely loses at most 1 point"
    assert "The nearest miss is <b>skip 5</b>" in lossy.html
    assert "Nothing was timed" in lossy.html and "What breaks the model" not in lossy.html
    untimed = make_report(results, 0.9)
    assert untimed.headline == "Leave it off for now: the numbers of skip 5 are in doubt"
    assert "Nothing was timed, and less compute" in untimed.html
    results.append(timings("skip 5", [0.95] * 5))
    assert make_report(results, 0.9).headline == "Switch on skip 5"


def test_dense_alone(tmp_path: Path) -> None:
    made = [answer("dense", f"sum/{i}", 1.0) for i in range(5)]
    assert "<h1>Nothing to recommend" in make_report(write(tmp_path, [*made], [DENSE]), 0.01).html


# --- the command ---


def command(*arguments: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(report)
    return CliRunner().invoke(app, [*arguments])


def test_the_command_writes_the_page(run: Results, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = command(str(run.folder), "--max-loss", "10 points", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert done.output.startswith("Switch on ") and str(out) in done.output
    assert out.read_text().startswith("<!doctype html>")


def test_the_command_says_what_is_wrong(tmp_path: Path, run: Results) -> None:
    assert "manifest.json: No such file" in command(str(tmp_path)).output
    wrong = command(str(run.folder), "--max-loss", "lots")
    assert wrong.exit_code == 1 and "--max-loss: 'lots' is not allowed; allowed:" in wrong.output
    no_dense = write(tmp_path, [answer("skip 5", "sum/0", 1.0, [5])], [PLAIN])
    assert "no answers of a setting of family 'dense'" in command(str(no_dense.folder)).output
    with pytest.raises(ResultsError, match="family 'dense'"):
        make_report(no_dense, 0.01)


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser: neither chromium nor google-chrome is on the path")
    api = pytest.importorskip("playwright.sync_api")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=quiet)
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it(
    browser: Any, page: str, tmp_path: Path, width: int, scheme: str
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page)
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    requests: list[str] = []
    view.on("console", lambda message: complaints.append(message.text))
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(file.as_uri())
    assert view.locator("h1").inner_text().startswith("Switch on ")
    assert view.locator("#headline strong").first.inner_text().endswith("less time")
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    tall = "[...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().height)"
    assert min(view.evaluate(tall)) > 150
    assert len(view.evaluate(tall)) == 3
    view.screenshot(path=tmp_path / f"report-{width}-{scheme}.png", full_page=True)
    assert complaints == []
    assert requests == [file.as_uri()]
    view.close()


def test_a_browser_runs_nothing_of_the_data(browser: Any, tmp_path: Path) -> None:
    tasks = [HOSTILE, "<img src=x onerror=alert(1)>", "x" * 300]
    results = write(tmp_path, [*realistic(tasks, 4)])
    (tmp_path / "report.html").write_text(make_report(results, 0.5).html)
    view = browser.new_page(viewport={"width": 400, "height": 900})
    alerts: list[str] = []
    view.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    view.goto((tmp_path / "report.html").as_uri())
    assert alerts == []
    assert view.locator("img").count() == 0
    assert HOSTILE in view.locator("body").inner_text()
    assert view.evaluate("document.documentElement.scrollWidth") <= 400
    view.close()


def test_nine_tasks_are_in_the_table(page: str) -> None:
    assert all(f">{task}<br>" in page for task in TASKS)
