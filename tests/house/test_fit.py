"""The page "Will it fit?" computes what `apollo-optim plan` computes, and works by keys, wide and narrow.

As a command, `python -m tests.house.test_fit > results/welcome/fit.md`, it prints 200 settings with both totals
(19 minutes on a core beside other work; stderr says how far it is).
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apollo_optim.cli import plan as command
from apollo_optim.core.errors import InputError
from apollo_optim.plan import PARTS, Parallel, Plan, largest_batch
from apollo_optim.plan.draw import COLOURS, smallest_card
from apollo_optim.rules import RULES
from apollo_optim.train.config import RunConfig, check
from apollo_optim.train.plan import budget_of, micro_batch, planned
from tests.browser import Browser, chromium, needs_chromium
from tools import fit
from tools.site_hooks import FIT, fit_block

pytestmark = needs_chromium
ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "docs" / "assets" / "fit"
Settings = dict[str, Any]
START: Settings = {
    "model": "llama-60m", "optimizer": "apollo-mini", "bits": 16, "batch": 1, "seq": 256, "release": False,
    "checkpointing": False, "gpus": 1, "parallel": "fsdp2",
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    told: dict[str, Any] = json.loads((ASSETS / "data.json").read_text())
    return told


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the site's page has of it, without the theme."""
    return page_in(tmp_path_factory.mktemp("fit"))


def page_in(folder: Path) -> Path:
    page = folder / "fit.html"
    style, script = ((ASSETS / name).as_uri() for name in ("fit.css", "fit.js"))
    page.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta name="color-scheme" content="light dark"><link rel="stylesheet" href="{style}">'
        f'<style>html {{ font-size: 125% }}</style><body>{fit_block()}<script src="{script}"></script></body></html>'
    )
    return page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as made:
        yield made


class Planner:
    """The command's plans, models and traces made once."""

    def __init__(self) -> None:
        self._models: dict[Any, command.Models] = {}

    def at(self, s: Settings) -> Plan:
        cfg, how = self._asked(s)
        model, traces = self._of(s, cfg)
        return budget_of(cfg, model, parallel=how, batch=s["batch"]).at(traces.at(s["batch"]))

    def largest(self, s: Settings, limit: float) -> int | None:
        cfg, how = self._asked(s)
        model, traces = self._of(s, cfg)
        return largest_batch(budget_of(cfg, model, parallel=how, batch=1), traces, limit)

    def _asked(self, s: Settings) -> tuple[RunConfig, Parallel | None]:
        words = ["--batch", str(s["batch"]), "--seq", str(s["seq"])]
        words += [f"--{key}" for key in ("release", "checkpointing") if s[key]]
        cfg = command.with_optimizer(fit.planned(s["model"], s["bits"], words), s["optimizer"], None)
        return cfg, Parallel(s["parallel"], s["gpus"]) if s["gpus"] > 1 else None

    def _of(self, s: Settings, cfg: RunConfig) -> Any:
        key = tuple(s[name] for name in ("model", "bits", "seq", "checkpointing"))
        return self._models.setdefault(key, command.Models()).of(cfg)


def drawn(data: dict[str, Any], names: list[str], seed: int, count: int) -> list[Settings]:
    """So many settings that have a plan, at random, most of them of shapes that a step of that model may have.

    Four in a row share what a plan traces, which is most of its time. A micro-batch is one row or at most 16,384
    tokens: of a million, logits would be made in up to 2,000 parts, each of which is traced.
    """
    chance, found = random.Random(seed), list[Settings]()
    while len(found) < count:
        model, bits = chance.choice(names), chance.choice((16, 16, 8))
        s = START | {"model": model, "bits": bits, "checkpointing": chance.random() < 0.5}
        longest = min(data["models"][model]["context"], 1 << 15)
        s["seq"] = min(longest, chance.choice((64, 256, 512, 1024, 2048, chance.randint(1, longest))))
        s["batch"] = min(chance.choice((1, 1, 2, 3, 4, chance.randint(1, 40))), max(1, (1 << 14) // s["seq"]))
        for _ in range(4):
            s["optimizer"], s["release"] = chance.choice([*optimizers(data, model, bits)]), chance.random() < 0.5
            s["gpus"], s["parallel"] = chance.choice((1, 1, *fit.GPUS)), chance.choice(("ddp", "fsdp2"))
            if not (s["gpus"] > 1 and s["parallel"] == "ddp" and s["release"]):
                found.append(dict(s))
    return found[:count]


def optimizers(data: dict[str, Any], model: str, bits: int) -> dict[str, Any]:
    told: dict[str, Any] = data["models"][model]["bits"][str(bits)]["optimizers"]
    return told


DATA = "JSON.parse(document.getElementById('fit-data').textContent)"


def compared(browser: Browser, every: Iterable[Settings]) -> Iterator[tuple[Settings, dict[str, Any], Plan]]:
    """Of each setting: what the page says, and what the planner does."""
    browser.js(f"globalThis.figures = {DATA}; null")
    planner = Planner()
    for s in every:
        yield s, browser.js(f"fit.plan(figures, {json.dumps(s)})"), planner.at(s)


def check_equal(browser: Browser, every: list[Settings]) -> None:
    for s, told, expected in compared(browser, every):
        assert told["total"] == expected.total, s
        assert told["rows"] == expected.rows, s
        assert told["when"] == expected.peak.when.partition(" of ")[0], s
        card = browser.js(f"fit.smallestCard(figures, {expected.total})")
        assert (f"{card} GB" if card else "> 80 GB") == smallest_card(expected.total)


def test_the_page_computes_what_plan_computes(page: Path, browser: Browser, data: dict[str, Any]) -> None:
    """Each way of a step: gradients kept, freed and sharded; logits whole, in two parts, in many."""
    browser.open(page)
    settings = [
        START | {"batch": batch, "seq": seq, **how}
        for batch, seq, how in (
            (1, 256, {}),
            (2, 400, {"optimizer": "adamw", "release": True}),
            (3, 1000, {"optimizer": "apollo", "bits": 8, "release": True, "checkpointing": True}),
            (5, 512, {"optimizer": "muon", "gpus": 4}),
            (1, 256, {"optimizer": "q-apollo-mini", "bits": 8, "gpus": 2, "release": True}),
            (1, 777, {"optimizer": "adafactor", "gpus": 2, "parallel": "ddp", "checkpointing": True}),
        )
    ]
    check_equal(browser, settings)


@pytest.mark.slow
def test_the_page_computes_what_plan_computes_at_200_settings(
    page: Path, browser: Browser, data: dict[str, Any]
) -> None:
    browser.open(page)
    check_equal(browser, drawn(data, [*data["models"]], seed=0, count=200))


@pytest.mark.slow
def test_the_largest_micro_batch_is_that_of_plan(page: Path, browser: Browser) -> None:
    browser.open(page)
    s, limit = START | {"release": True, "seq": 512}, 2e9
    told = browser.js(f"fit.largestBatch({DATA}, {json.dumps(s)}, {limit})")
    assert told > 5
    assert told == Planner().largest(s, limit)
    assert browser.js(f"fit.largestBatch({DATA}, {json.dumps(s)}, 1e6)") == 0


def test_what_has_no_plan_has_none_on_the_page(page: Path, browser: Browser) -> None:
    browser.open(page)
    planner = Planner()
    refused = (
        {"gpus": 2, "parallel": "ddp", "release": True}, {"seq": 2049}, {"batch": 0},
        {"optimizer": "q-apollo"},
    )  # fmt: skip
    for how in refused:
        assert browser.js(f"fit.problem({DATA}, {json.dumps(START | how)})"), how
        if how.keys() - {"optimizer", "batch"}:  # (these two the command refuses by its words)
            with pytest.raises(InputError):
                planner.at(START | how)
    assert browser.js(f"fit.problem({DATA}, {json.dumps(START)})") is None


@pytest.mark.slow
def test_what_is_copied_is_what_was_planned(page: Path, browser: Browser, tmp_path: Path) -> None:
    """The run file and the command."""
    from apollo_optim.cli import pretrain

    browser.open(page)
    for how in ({}, {"bits": 8, "release": True, "checkpointing": True, "batch": 2}, {"gpus": 4, "batch": 3}):
        s = START | how
        (file := tmp_path / "run.yaml").write_text(browser.js(f"fit.runFile({json.dumps(s)})"))
        cfg = pretrain.parse(["--config", str(file)]).cfg
        check(cfg)
        assert micro_batch(cfg) == s["batch"]
        assert cfg.train.batch_size == s["batch"] * s["gpus"]
        assert (cfg.parallel.mode == "fsdp2") == (s["gpus"] > 1)
        told, train = browser.js(f"fit.commands({json.dumps(s)})")
        args, keys = command.make_parser().parse_beside_keys(told.split()[2:])
        assert (args.optimizer, args.gpus, keys) == ([s["optimizer"]], s["gpus"], [])
        assert train.startswith("torchrun" if s["gpus"] > 1 else "apollo-optim pretrain")
        if s["gpus"] == 1:
            expected = browser.js(f"fit.plan({DATA}, {json.dumps(s)}).total")
            assert planned(cfg).total == expected
            same = command.with_optimizer(command.config_of(args, keys), s["optimizer"], None)
            assert planned(same).total == expected


@pytest.mark.parametrize("width", [1200, 360])
def test_it_is_used_by_keys_alone(page: Path, browser: Browser, width: int) -> None:
    browser.open(page, width)
    assert browser.js("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    verdict = "document.querySelector('.verdict').textContent"
    before = browser.js(verdict)
    browser.tab_to("[name=model]")
    browser.press("l", "l", "a")  # as a reader would: by the letters of its name
    browser.press("Home")
    browser.tab_to("[name=optimizer]")
    browser.press("Home")
    browser.tab_to("[name=batch]")
    browser.press("ArrowUp", "ArrowUp")
    browser.tab_to("[name=release]")
    browser.press("Space")
    browser.tab_to("[name=checkpointing]")
    browser.press("Space")
    first = browser.js("document.querySelector('[name=optimizer]').value")
    s = START | {"optimizer": first, "batch": 3, "checkpointing": True}
    total = Planner().at(s).total
    assert browser.js(verdict) == f"{total / 1e6:.0f} MB: fits a card of {smallest_card(total)}" != before
    assert "model=llama-60m" in browser.js("location.hash")
    browser.tab_to(".copied button")
    assert browser.js("document.querySelector('.copied code').textContent").startswith("model:\n  name: llama-60m\n")
    shares = browser.js("[...document.querySelectorAll('.scale .bar i')].map(i => i.getBoundingClientRect().width)")
    assert len(shares) == sum(size > 0 for size in Planner().at(s).rows.values())
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.errors == []
    assert all(url.startswith("file:") for url in browser.requests)


def test_a_link_holds_the_settings(page: Path, browser: Browser) -> None:
    browser.open(page)
    browser.js("location.hash = '#model=llama-60m&optimizer=adamw&batch=4&release=false&bits=8'; location.reload()")
    browser.wait("document.readyState === 'complete' && document.querySelector('[name=batch]')?.value === '4'")
    fields = "[...document.querySelector('form').elements]"
    found = browser.js(f"{fields}.map(e => e.type === 'checkbox' ? e.checked : e.value)")
    assert found[:4] == ["llama-60m", "adamw", "8", "4"]
    assert found[7:] == [False, False]


def test_each_part_is_seen_on_a_light_and_on_a_dark_page(data: dict[str, Any]) -> None:
    """A swatch differs from white and from the dark theme's background by a good part of one of its three lights."""
    for part, colour in data["parts"].items():
        lights = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        for page in ((255, 255, 255), (0x1E, 0x21, 0x29)):
            assert max(abs(a - b) for a, b in zip(lights, page, strict=True)) > 90, part


def test_the_figures_are_of_rules_that_are_there(data: dict[str, Any]) -> None:
    """A rule that was registered since is missing until `python tools/fit.py` is run again."""
    from apollo_optim import list_optimizers

    there = {info.name for info in list_optimizers()}
    assert [*data["models"]] == fit.MODELS
    assert data["parts"] == COLOURS
    assert list(data["parts"]) == list(PARTS)
    for model in data["models"]:
        for bits in fit.BITS:
            names = set(optimizers(data, model, bits))
            assert names <= there
            assert {"adamw", "apollo", "apollo-mini"} <= names
    assert "adamw" in RULES
    assert FIT in (ROOT / "docs" / "will-it-fit.md").read_text()


def main() -> int:
    """Print the table of 200 settings, how far it is to stderr; 1 if the page says anything else than the planner."""
    data, wrong, cells = json.loads((ASSETS / "data.json").read_text()), 0, list[str]()
    every = drawn(data, [*data["models"]], seed=0, count=200)
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder) / "profile") as browser:
        browser.open(page_in(Path(folder)))
        for number, (s, told, expected) in enumerate(compared(browser, every), 1):
            equal = told["total"] == expected.total and told["rows"] == expected.rows
            wrong += not equal
            verdict = "equal" if equal else "NOT EQUAL"
            print(f"{number}/{len(every)} {s['model']}, {s['optimizer']}: {verdict}", file=sys.stderr, flush=True)
            how = f"{s['gpus']} x {s['parallel']}" if s["gpus"] > 1 else "1"
            with_ = " ".join(key for key in ("release", "checkpointing") if s[key])
            words = (s["model"], s["optimizer"], s["bits"], s["batch"], s["seq"], how, with_, told["when"])
            cells.append(" | ".join(map(str, (*words, told["total"], told["total"] - expected.total))))
    columns = "model|optimizer|bits|rows|tokens|GPUs|with|fullest in the|bytes on the page|less plan's"
    sys.stdout.write(
        '# The page "Will it fit?" and `plan`\n\n'
        "Made by `python -m tests.house.test_fit`: settings drawn with seed 0 from all models of the page,\n"
        "computed by its script in headless Chromium and by the planner.\n"
        f"Of {len(every)} {len(every) - wrong} are equal to the byte, in the total and in each of its parts.\n\n"
        f"| {columns.replace('|', ' | ')} |\n{'|---' * (columns.count('|') + 1)}|\n"
    )
    sys.stdout.writelines(f"| {line} |\n" for line in cells)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
