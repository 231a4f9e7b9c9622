"""One printer: names are data, whatever they are printed by."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apollo_optim.cli.main import main
from apollo_optim.cli.words import complain, show
from apollo_optim.core import printing
from apollo_optim.core.errors import InputError
from apollo_optim.train.config import OptimConfig, RunConfig, check
from apollo_optim.train.display import Live, Plain

PACKAGE = Path(__file__).resolve().parents[2] / "apollo_optim"
NAME = "[/b]$x$\x1b]0;title\x07\u202e"  # markup, mathematics, a terminal's title, text that runs backwards


def prints(source: str) -> list[str]:
    """What a source prints past the printer."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        or (
            isinstance(node, ast.Call)
            and "Console" in ast.unparse(node.func)
            and "markup=False" not in ast.unparse(node)
        )
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout.write", "sys.stderr.write"))
    ]


def test_everything_is_printed_by_the_printer():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "printing.py":
            assert not prints(path.read_text()), path


@pytest.mark.parametrize(
    "source", ["print(name)", "Console().print(x)", "rich.Console(stderr=True)", "sys.stderr.write(x)"]
)
def test_what_is_printed_past_it_is_seen(source):
    assert prints(source)


def test_control_characters_are_spelt_out(capsys):
    printing.say(f"two\nlines, {NAME}")
    assert capsys.readouterr().out == "two\nlines, [/b]$x$\\x1b]0;title\\x07\\u202e\n"
    assert complain(InputError(f"one\n{NAME}"), 2) == 2
    assert capsys.readouterr().err == "error: one\\n[/b]$x$\\x1b]0;title\\x07\\u202e\n"
    show(NAME)
    assert capsys.readouterr().out == "[/b]$x$\\x1b]0;title\\x07\\u202e\n"


def test_a_terminal_gets_what_a_model_writes_spelt_out_and_a_pipe_gets_it_as_it_is(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in ((Terminal(), "a\tb\nc\\x1b[2J"), (io.StringIO(), "a\tb\nc\x1b[2J")):
        monkeypatch.setattr(sys, "stdout", stream)
        printing.say_on("a\tb\nc\x1b[2J")
        assert stream.getvalue() == expected


def test_what_a_run_shows(capsys):
    for display in (Plain(NAME, 3), Live(NAME, 3)):
        display.note(f"a note on {NAME}")
        display.close()
    err = capsys.readouterr().err
    assert "[/b]$x$\\x1b]0;title\\x07" in err
    assert "\x1b]" not in err
    assert "\x07" not in err


def test_pictures_and_markdown():
    assert printing.literal("cost$_$\x1b") == r"cost\$_\$\x1b"
    assert printing.plain_markdown("<img src=x>|[a](b)\x1b") == r"&lt;img src=x&gt;\|\[a\](b)\\x1b"


# --- names that cannot be written ---


def test_a_name_that_is_not_utf_8_is_refused_at_the_start(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff"
    done = subprocess.run(
        [sys.executable, "-m", "apollo_optim", "report", name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "\\udcff, is not UTF-8: give the file another name" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["a\0b", "a\udcffb"])
def test_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(InputError, match=r"out=.*not a name that can be written"):
        check(RunConfig(out=name))
    with pytest.raises(InputError, match=r"optim.targets=.*not a name that can be written"):
        check(RunConfig(optim=OptimConfig(targets=[name])))


def test_debug_shows_the_rest(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such"}))
    assert main(["plan", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["plan", str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
