"""`apollo-optim bench`: the benchmarks are found in a checkout, and said to be missing where they are."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kept import RESULTS, needs_results

from apollo_optim.cli.bench import BENCHES, CHECKOUT
from apollo_optim.cli.main import main
from benchmarks import kit
from benchmarks.table import markdown


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package alone, as a wheel leaves it."""
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(CHECKOUT / "apollo_optim", folder / "apollo_optim", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def command(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from apollo_optim.cli.main import main; sys.exit(main())"
    env = os.environ | {"PYTHONPATH": str(installed)}
    call = [sys.executable, "-P", "-c", code, "bench", *words]
    return subprocess.run(call, check=False, capture_output=True, text=True, cwd=cwd, env=env)


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert main(["bench", "--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [words[0] for words in lines if words and words[0] in BENCHES] == [*BENCHES] * 2
    for name in BENCHES:
        assert importlib.util.find_spec(f"benchmarks.{name.replace('-', '_')}")


def test_outside_of_a_checkout_one_line_says_where_they_are(installed: Path, tmp_path: Path) -> None:
    told = command(installed, tmp_path, "step", "--table")
    assert told.returncode == 2
    line = "the benchmarks are not installed with the library; clone the repository and run this there"
    assert told.stderr == f"error: bench step: {line}\n"
    assert command(installed, tmp_path, "--help").returncode == 0


@needs_results
def test_in_a_checkout_an_installed_command_runs_the_checkouts(installed: Path) -> None:
    told = command(installed, CHECKOUT, "race", "table", "--results", "results/race/llama-4m")
    assert told.stdout == (RESULTS / "race" / "llama-4m" / "table.md").read_text()
    assert told.returncode == 0


def test_python_m_ends_as_the_command_does(tmp_path: Path) -> None:
    words = ["--table", "--out", str(tmp_path)]
    call = [sys.executable, "-m", "benchmarks.loop", *words]
    told = subprocess.run(call, check=False, capture_output=True, text=True, cwd=CHECKOUT)
    assert told.returncode == 2
    assert told.stderr == f"error: {tmp_path}/loop.jsonl: there is no such log; measure first (leave --table out), " + (
        "or name another folder\n"
    )


# --- the kit ---


def test_a_line_that_was_cut_off_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "new" / "log.jsonl"
    assert kit.read(log) == []
    kit.append(log, {"a": float("inf"), "b": [1, float("nan")]})
    with log.open("a") as file:
        file.write('{"a": ')
    kit.append(log, {"a": 2})
    assert kit.read(log) == [{"a": None, "b": [1, None]}, {"a": 2}]
    assert capsys.readouterr().err == f"{log}:2: a line that was cut off is left out\n"


def test_figures_in_words() -> None:
    assert kit.told(kit.spread([1.0, 2.0, 3.0, 4.0, 9.0]), 1e3, 1) == "3000.0 (2000.0-4000.0)"
    assert kit.told(kit.spread([1.5])) == "1.50 (1.50-1.50)"
    assert (kit.gb(1_234_500_000), kit.gb(None), kit.gb(8_055_000_000, ".3f")) == ("1.23", "-", "8.055")
    assert (kit.mb(1_234_560_000), kit.mb(-250_000, "+.1f")) == ("1,234.6", "-0.2")


def test_a_table_as_markdown() -> None:
    assert markdown(["a", "b", "c"], [["x", "1", "2"], ["y|z", "", "3"]], "lr").splitlines() == [
        "| a | b | c |",
        "|---|---:|---:|",
        "| x | 1 | 2 |",
        "| y/z |  | 3 |",
    ]


def test_every_bench_that_is_named_is_there() -> None:
    texts = [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md"), *CHECKOUT.glob("benchmarks/**/*.py")]
    named = {name for text in texts for name in re.findall(r"apollo-optim bench ([a-z][a-z-]*)", text.read_text())}
    assert len(named) > 10
    assert named <= {*BENCHES}
