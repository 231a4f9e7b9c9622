"""The page of a report: curves to read off, a table to put in order, and the page of runs that go on."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from apollo_optim.cli.main import main
from apollo_optim.core.errors import InputError
from apollo_optim.report import follow, read_run, write_report
from apollo_optim.report.curves import losses, ticks
from apollo_optim.report.page import html_page
from tests.browser import Browser, chromium, needs_chromium
from tests.report.test_report import Event, log_of, write_log


def faster(optimizer: str, losses_less: float, state: int) -> list[Event]:
    """The run of `log_of`, a little better."""
    events = log_of(optimizer)
    for event in events:
        if event["event"] in ("step", "eval"):
            event["loss"] -= losses_less
        if event["event"] == "eval":
            event["perplexity"] = math.exp(event["loss"])
    events[-1]["memory"]["optimizer"] = state
    return events


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    logs = {"adamw": (0.0, 28_000_000), "apollo": (0.1, 7_000_000), "muon": (0.2, 14_000_000)}
    runs = [read_run(write_log(folder / name, faster(name, *how))) for name, how in logs.items()]
    return write_report(runs, folder / "out").page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as made:
        yield made


def test_a_curve_lies_where_its_figures_are(tmp_path: Path) -> None:
    run = read_run(write_log(tmp_path / "run", log_of()))
    page = losses([run])
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', page)[0])
    assert (data["width"], data["unit"]) == (40.96, "thousands of tokens")
    assert data["runs"][0]["eval"] == [[20.48, 5.5, 244.6919], [40.96, 3.0, 20.08554]]
    low, high = 3.0 - 0.08 * 2.5, 5.5 + 0.12 * 2.5  # of what is drawn: the evaluations lie from 3 to 5.5
    (points,) = re.findall(r'class="eval" style="--c:var\(--c0\)" d="M([^"]+)"', page)[:1]
    xs, ys = zip(*(map(float, point.split()) for point in points.split("L")), strict=True)
    assert xs == (500.0, 1000.0)
    assert ys == pytest.approx([1000 * (high - loss) / (high - low) for loss in (5.5, 3.0)], abs=0.06)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (2.97, 4.3, [3.0, 3.2, 3.4, 3.6, 3.8, 4.0, 4.2]),
        (0, 2867, [0, 500, 1000, 1500, 2000, 2500]),
        (3.0, 3.0, [3.0]),
    ],
)
def test_an_axis_has_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_what_a_log_names_is_no_part_of_the_page(tmp_path: Path) -> None:
    """Neither in the curves' data, which a script reads, nor in keys and bars."""
    page = html_page([read_run(write_log(tmp_path / "run", log_of("</script><script>alert(1)")))])
    assert page.count("<script") == 3  # two charts' figures and the page's own
    assert "<script>alert" not in page


def test_a_page_asks_for_nothing_and_is_not_read_again(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text
    assert 'http-equiv="refresh"' not in text
    assert not re.search(r"https?:", text)


@needs_chromium
@pytest.mark.parametrize("width", [1200, 360])
def test_curves_are_read_off_by_pointer_and_by_keys(page: Path, browser: Browser, width: int) -> None:
    browser.open(page, width)
    assert browser.js("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert browser.js("document.querySelector('.tip').hidden")
    browser.point(".plot", 0.99)
    tip = "[...document.querySelectorAll('.chart .tip')[0].querySelectorAll('tr')].map(r => r.textContent)"
    _, *rows = browser.js(tip)
    read_at = "document.querySelector('.tip caption').textContent"
    assert browser.js(read_at) == "40.6 thousands of tokens"
    assert rows == ["adamw3.00020.093.000", "apollo2.90018.172.900", "muon2.80016.442.800"]
    for part in (".tip", ".tip table"):
        box = browser.js(f"(b => [b.left, b.right])(document.querySelector('{part}').getBoundingClientRect())")
        assert 0 <= box[0] <= box[1] <= width, "what is read off lies outside the window"
    browser.press("Escape")
    browser.js("document.activeElement.blur()")
    browser.tab_to(".plot")
    browser.press("Home")
    browser.press(*["ArrowRight"] * 25)
    assert browser.js(read_at) == "20.5 thousands of tokens"
    assert browser.js(tip)[1].startswith("adamw5.500")
    browser.press("Tab")
    assert browser.js("document.querySelector('.tip').hidden")
    assert browser.errors == []
    assert all(url.startswith("file:") for url in browser.requests)


@needs_chromium
def test_the_table_is_put_in_order_by_keys(page: Path, browser: Browser) -> None:
    browser.open(page)
    names = "[...figures.rows[0].cells].slice(1).map(c => c.textContent)"
    assert browser.js(names) == ["adamw", "apollo", "muon"]
    row = "[...figures.rows].find(r => r.cells[0].textContent === 'optimizer')"
    browser.tab_to("tr:nth-child(15) button")
    assert browser.js(f"document.activeElement.closest('tr') === {row}")
    browser.press("Enter")
    assert browser.js(names) == ["apollo", "muon", "adamw"]  # by the bytes: 7 MB, 14 MB, 28 MB
    assert browser.js(f"[...{row}.cells].map(c => c.textContent)") == ["optimizer", "7 MB", "14 MB", "28 MB"]
    browser.press("Space")
    assert browser.js(names) == ["adamw", "muon", "apollo"]
    assert browser.js(f"{row}.cells[0].getAttribute('aria-sort')") == "descending"


def test_the_page_follows_runs_until_they_end(tmp_path: Path) -> None:
    """Its axes reach to where the runs will end; a log that has not grown is not drawn again."""
    events = log_of()
    events[0]["config"]["train"] = {"steps": 20}
    path = write_log(tmp_path / "run", [*events[:2], {"event": "nonsense?"}], tail="[]\n")
    log, pages, drawn = path / "metrics.jsonl", [], list[Path]()

    def wait(seconds: float) -> None:
        """The run goes on."""
        assert seconds == 5.0
        page = tmp_path / "out" / "report.html"
        pages.append(page.read_text() if page.exists() else "")
        with log.open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in [events[2:8], [], events[8:]][len(pages) - 1])

    (run,) = follow([path], tmp_path / "out", 5.0, drawn=drawn.append, wait=wait)
    assert run.end is not None
    assert drawn == [tmp_path / "out" / "report.html"]
    assert pages[0] == "", "nothing is drawn before the first step"
    assert pages[1] == pages[2]
    assert '<meta http-equiv="refresh" content="5">' in pages[1]
    assert '"width": 81.92, ' in pages[1]  # twenty steps of 4,096 tokens, five or six of which are made
    last = drawn[0].read_text()
    assert '"width": 40.96, ' in last, "an end is where the axis ends"


def test_the_command_follows_a_run_of_another_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = log_of()
    path = write_log(tmp_path / "run", events[:8])

    def goes_on() -> None:
        with (path / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in events[8:])

    later = threading.Timer(0.5, goes_on)
    later.start()
    assert main(["report", str(path), "--follow", "--every", "1"]) == 0
    later.join()
    told = capsys.readouterr()
    assert f"page: {path}/report/report.html (open it" in told.err
    page = (path / "report" / "report.html").read_text()
    assert "refresh" not in page
    assert "not ended" not in page
    assert (path / "report" / "report.png").is_file()


def test_following_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"no metrics\.jsonl there"):
        follow([tmp_path], tmp_path, 5.0)
    assert main(["report", str(tmp_path), "--every", "0"]) == 2
    assert "--every 0: at least a second" in capsys.readouterr().err
