"""The site: a page for every rule, links that lead somewhere, nothing from elsewhere. `make docs` checks all of it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from apollo_optim.rules import RULES
from apollo_optim.train.config import ModelConfig
from apollo_optim.train.models import skeleton
from tools.check_site import problems
from tools.rule_pages import docstring, index_page, rule_page

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_has_a_page_made_of_itself(name: str) -> None:
    rule = RULES[name]
    page = rule_page(rule)
    assert page.startswith(f"# {rule.title}\n")
    assert set(docstring(rule)[1]) == {"When", "Evidence"}, "its docstring says when to use it, and what was seen"
    assert all(f"| `{knob}` |" in page for knob in rule.knobs())
    assert f"rules/{name}.md" not in page
    assert f"({name}.md)" in index_page(RULES)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {"model": skeleton(ModelConfig(name="llama-4m"))})


def test_a_new_rule_has_its_page_by_itself() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-rule.md").read_text(), re.DOTALL)[0]
    with mock.patch.dict(RULES):
        exec(code, {"model": skeleton(ModelConfig(name="llama-4m")), "__name__": "mine"})
        page = rule_page(RULES["sign-of-mean"])
    assert "Lion without its second beta" in page
    assert "| `momentum` | `0.9` | a number in [0, 1) | Decay of the average. |" in page
    assert "180.36 MB" in page  # of one fp32 average


def test_what_a_page_loads_and_links_to_is_checked(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#there">b</a><img src="a.png"><a href="https://x.org">x</a>'
    )
    (tmp_path / "b.html").write_text('<h1 id="there">B</h1><link rel="stylesheet" href="b.css">')
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.css").write_text("@font-face { src: url('b.woff') }")
    assert problems(tmp_path) == []
    (tmp_path / "c.html").write_text(
        '<script src="https://cdn.org/x.js"></script><img src="c.png">'
        '<a href="b.html#nowhere">b</a><a href="d.html">d</a>'
    )
    (tmp_path / "b.css").write_text("@import url(https://fonts.org/x.css);")
    found = "\n".join(problems(tmp_path))
    assert len(problems(tmp_path)) == 5
    for what in ("cdn.org/x.js from elsewhere", "c.png, which is not there", "no such place", "d.html", "fonts.org"):
        assert what in found


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert problems(tmp_path) == []
    assert (tmp_path / "rules" / "apollo.html").is_file()
    assert (tmp_path / "results" / "README.html").is_file() or (tmp_path / "results" / "index.html").is_file()


def test_every_run_file_of_the_papers_is_on_the_page_with_its_figure() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text()
    rows = dict(re.findall(r"^\| \[(llama[\w.-]+)\]\S+ \| (.*)$", page, re.MULTILINE))
    files = {path.name: path.read_text() for path in (ROOT / "runs").glob("llama-*.yaml") if "-q-" not in path.name}
    files = {name: text for name, text in files.items() if not name.endswith("-full.yaml")}  # the race's, in no paper
    assert rows.keys() == files.keys()
    for name, text in files.items():
        figure = re.search(r"C4 validation perplexity ([\d.]+\d)", text)
        assert (figure[1] if figure else "none printed") in rows[name]
        steps = re.search(r"  steps: (\d+)", text)
        assert rows[name].startswith(f"{int(steps[1]):,} |")
