"""Damaged, odd and hostile inputs through every command: a little of `python -m tools.fuzz`, and it sees a fault."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tools.fuzz.changes import harm, odd_yaml, replaced
from tools.fuzz.stage import Case, outcome

ROOT = Path(__file__).resolve().parents[2]


def fuzz(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.fuzz", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_few_inputs(tmp_path):
    log = tmp_path / "log.jsonl"
    done = fuzz("--inputs", "2", "--seed", "1", "--log", str(log))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["input"] for line in lines] == [0, 1]
    assert {line["outcome"] for line in lines} <= {"refused", "right", "as it says", "said"}


@pytest.mark.slow
def test_ten_minutes_of_inputs():
    done = fuzz("--inputs", "1000000", "--seconds", "600", "--seed", "2")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "said", "digest", "expected"),
    [
        (None, "", "", "hang"),
        (1, "Traceback (most recent call last):\n", "", "traceback"),
        (-11, "", "", "traceback"),
        (2, "error: one line\n", "", "refused"),
        (2, "error: one\nerror: two\n", "", "traceback"),
        (0, "", "right", "right"),
        (0, "", "wrong", "silent"),
        (0, "not bit-for-bit equal to the run so far\n", "wrong", "said"),
    ],
)
def test_what_comes_of_an_input(code, said, digest, expected):
    assert outcome(Case([], "", lambda: digest, "right"), code, said) == expected
    if code == 0:
        assert outcome(Case([], ""), code, said) == "as it says"


def test_an_input_is_a_number(tmp_path):
    told = []
    for _ in range(2):
        path, chance = tmp_path / "x.json", random.Random("3/4")
        path.write_text('{"a": {"b": [1, 2]}, "c": 3}')
        told.append([replaced(path, chance), harm(path, chance), odd_yaml(path, chance)])
    assert told[0] == told[1]
