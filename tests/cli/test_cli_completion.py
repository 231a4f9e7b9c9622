"""Words that a shell completes, and colours that are left out where nobody wants them."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apollo_optim.cli.completion import options
from apollo_optim.cli.main import COMMANDS, main


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """As each shell gets it."""
    made = {}
    for shell in ("bash", "zsh", "fish"):
        with contextlib.redirect_stdout(said := io.StringIO()):
            assert main(["completion", shell]) == 0
        made[shell] = said.getvalue()
    return made


def completed(script: str, *words: str) -> list[str]:
    """What bash would offer for the last of these words."""
    typed = " ".join(f"'{word}'" for word in words)
    asked = f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _apollo_optim; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], check=True, capture_output=True, text=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_commands_options_and_keys(scripts: dict[str, str]) -> None:
    assert completed(scripts["bash"], "apollo-optim", "") == [*COMMANDS]
    assert completed(scripts["bash"], "apollo-optim", "pre") == ["pretrain"]
    assert completed(scripts["bash"], "apollo-optim", "report", "out/x", "--fo") == ["--follow"]
    assert completed(scripts["bash"], "apollo-optim", "pretrain", "--optim.rest_l") == ["--optim.rest_lr"]
    assert completed(scripts["bash"], "apollo-optim", "report", "out/") == [], "a file is bash's own business"


@pytest.mark.parametrize(("shell", "check"), [("zsh", ["-n"]), ("fish", ["--no-execute"])])
def test_other_shells_can_read_theirs(shell: str, check: list[str], scripts: dict[str, str], tmp_path: Path) -> None:
    for name in COMMANDS:
        assert f"{name})" in scripts[shell] if shell == "zsh" else f"-a {name} " in scripts[shell]
    assert "--optim.lr " in scripts["zsh"]
    assert "-l optim.lr\n" in scripts["fish"]
    if shutil.which(shell):
        (file := tmp_path / "script").write_text(scripts[shell])
        subprocess.run([shell, *check, str(file)], check=True)


def test_every_option_of_a_help_is_found() -> None:
    assert {"--prompt", "--max-tokens", "--seed"} <= set(options("sample"))


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "powershell"]) == 2
    assert "invalid choice: 'powershell'" in capsys.readouterr().err


def test_no_color_is_respected() -> None:
    """Of what rich writes to a terminal, whatever else the environment says; bold is no colour."""
    code = "from apollo_optim.cli.words import show\nshow('text', style='bold red')"
    for no_color, coloured in (("", True), ("1", False)):
        env = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": no_color}
        done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
        assert ("31" in re.findall(r"\x1b\[([\d;]*)m", done.stdout)[0].split(";")) == coloured
