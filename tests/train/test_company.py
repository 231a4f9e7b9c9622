"""A busy machine: threads sleep soon, and the log says what others took."""

import os
import subprocess
import sys
import time

import pytest
from train_tiny import records, tiny

from apollo_optim.cli.waiting import SPINS, WORDS
from apollo_optim.train import company, measure
from apollo_optim.train.company import Others
from apollo_optim.train.display import step_figures
from apollo_optim.train.pretrain import pretrain
from benchmarks import company as bench

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp and /proc/stat are Linux's")


@LINUX
@pytest.mark.parametrize(
    ("words", "said", "spins"),
    [
        ("--version", {}, SPINS),
        ("--version", {"OMP_WAIT_POLICY": "active"}, 30_000_000_000),
        ("--version", {"GOMP_SPINCOUNT": "77"}, 77),
        ("bench --help", {}, 300_000),  # which is the same by python -m benchmarks.NAME
    ],
)
def test_the_command_has_threads_sleep_soon_unless_a_user_says_how_they_wait(
    words: str, said: dict[str, str], spins: int
) -> None:
    """libgomp tells what it read when it was loaded, with torch."""
    code = f"from apollo_optim.cli.main import main; main({words.split()}); import torch; torch.ones(3)"
    env = {key: value for key, value in os.environ.items() if key not in WORDS}
    call = [sys.executable, "-c", code]
    env |= {"OMP_DISPLAY_ENV": "verbose", **said}
    told = subprocess.run(call, check=True, capture_output=True, text=True, env=env).stderr
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("this torch has another OpenMP")
    assert f"GOMP_SPINCOUNT = '{spins}'" in told


@LINUX
def test_what_others_take_is_not_what_this_process_takes() -> None:
    others = Others()
    with bench.busy(len(os.sched_getaffinity(0)) + 1):
        time.sleep(1.0)
        assert (share := others.since()) is not None
    assert share > 0.3
    before, began = company.processor_seconds(), time.process_time()
    while time.process_time() - began < 0.3:
        pass
    after = company.processor_seconds()
    assert before is not None
    assert after is not None
    there, taken = (b - a for a, b in zip(before, after, strict=True))
    assert taken <= there - 0.3 + 0.1  # the system counts in hundredths of a second


def test_a_busy_machine_is_in_the_log_and_said(tmp_path, monkeypatch, capsys) -> None:
    seconds = iter([(10.0 * n, 4.0 * n) for n in range(100)])
    monkeypatch.setattr(company, "processor_seconds", lambda: next(seconds))
    pretrain(tiny(tmp_path, log={"display": "plain"}))
    assert {record["others"] for record in records(tmp_path / "run", "step")} == {0.4}
    told = capsys.readouterr().err
    assert "| others' CPU 40%" in told
    assert told.count("other processes took 40% of the processors' time: figures of time are those of a busy") == 1


def test_where_nothing_is_known_nothing_is_said(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(company, "processor_seconds", lambda: None)
    pretrain(tiny(tmp_path, log={"display": "plain"}, train={"steps": 2}))
    assert {record["others"] for record in records(tmp_path / "run", "step")} == {None}
    assert "other" not in capsys.readouterr().err
    record = {"step": 2, "loss": 1.0, "lr": 0.1, "lr_rest": 0.1, "grad_norm": 1.0, "tokens_per_s": 1.0, "others": 0.05}
    assert "others' CPU" not in dict(step_figures(record, 1.0))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_processor_without_bfloat16_is_said(fast, dtype, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(measure, "multiplies_bfloat16", lambda: fast)
    pretrain(tiny(tmp_path, log={"display": "plain"}, train={"steps": 2}, model={"dtype": dtype}))
    assert records(tmp_path / "run", "start")[0]["hardware"]["bfloat16"] == fast
    slow = dtype == "bfloat16" and not fast
    assert capsys.readouterr().err.count("has no matmuls in bfloat16: they take seven to forty times") == slow


def test_what_torch_does_not_say_is_taken_as_fast(monkeypatch) -> None:
    assert measure.multiplies_bfloat16() in (True, False)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert measure.multiplies_bfloat16()


def test_the_bench_takes_ratios_round_by_round() -> None:
    def line(number: int, policy: str, alone: float, beside: float) -> dict:
        return {
            "kind": "figures", "hardware": {"cores": 2, "cpu": "a CPU"},
            "alone": {"tokens_per_s": alone, "others": 0.0}, "company": {"tokens_per_s": beside, "others": 0.3},
            "config": {"policy": policy, "round": number, "model": "m", "optimizer": "o", "batch": 1, "seq_len": 2,
                       "threads": 2, "beside": 1},
        }  # fmt: skip

    rows = [
        line(n, policy, speed * own, beside * own)
        for n, own in enumerate((100.0, 400.0, 200.0))
        for policy, speed, beside in ((bench.OWN, 1.0, 0.1), (bench.COMMAND, 0.99, 0.66))
    ]
    cells = [[cell.strip() for cell in text.split("|")[1:-1]] for text in bench.table(rows).splitlines()]
    own, ours = (next(row for row in cells if row and row[0].startswith(name)) for name in (bench.OWN, bench.COMMAND))
    assert own[2] == "1.000 (1.000-1.000)"
    assert own[4].startswith("0.15 (")
    assert ours[2] == "0.990 (0.990-0.990)"
    assert ours[4].startswith("1.00 (")  # two thirds are its share: two threads and a process on two cores
