"""The table of clients: a case is a row, in its newest form, and what fails takes nothing with it."""

import subprocess
import sys
from pathlib import Path

from table import TOP, merged, read, table


def test_figures_of_one_case_are_one_row():
    """The micro-batches of a case are told before its releases and resumes."""
    key = {"client": "Trainer", "case": "llama"}
    old = [{**key, "resumed": "0.5", "adamw": "0.5"}, {"client": "timm", "case": "ViT"}]
    new = [{**key, "accumulated": 1e-6}, {"client": "TRL", "case": "llama"}, {**key, "resumed": 0.0}]
    assert merged(old, new) == [{**key, "accumulated": 1e-6, "resumed": 0.0}, old[1], new[1]]


def stand_in(folder: Path, script: str) -> Path:
    """An environment whose long half is a shell script."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return folder


def test_an_environment_that_fails_stops_no_other_and_loses_no_row(tmp_path):
    target = tmp_path / "clients.md"
    target.write_text(TOP + table([{"client": "timm", "case": "ViT", "resumed": 0.0}]))
    bad = stand_in(tmp_path / "vision", "exit 3")
    good = stand_in(tmp_path / "trl", """echo '{"client": "TRL", "case": "llama", "resumed": 0.0}'""")
    run = [sys.executable, Path(__file__).with_name("table.py"), target]

    ended = subprocess.run([*run, bad, good], check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"{bad}: its long half ended with 3" in ended.stderr
    assert [row["client"] for row in read(target)] == ["timm", "TRL"]

    assert subprocess.run([*run, good], check=False, capture_output=True).returncode == 0
    assert [row["client"] for row in read(target)] == ["TRL"]  # a whole run makes the whole table


def test_checkpoints_of_other_versions_are_those_that_were_kept(tmp_path):
    """An environment with a long half of its own keeps none."""
    own = stand_in(tmp_path / "own", ":")
    keeps = stand_in(tmp_path / "keeps", """mkdir "$3" && touch "$3/version" """)
    asks = stand_in(tmp_path / "asks", """echo "{\\"client\\": \\"asks\\", \\"case\\": \\"$# words\\"}" """)
    run = [sys.executable, Path(__file__).with_name("table.py"), tmp_path / "clients.md", own, keeps, asks]
    subprocess.run(run, check=True, capture_output=True)
    assert [row["case"] for row in read(tmp_path / "clients.md")] == ["5 words"]  # long.py --keep DIR --from DIR
