"""The memory bench: what a fresh process measures is what the plan says, and every row says what it is."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kept import RESULTS, needs_results
from torch import nn

from apollo_optim import build_optimizer, release
from apollo_optim.core.errors import InputError
from apollo_optim.quant.weight import LowBitWeight
from apollo_optim.train.config import to_dict
from apollo_optim.train.models import build_model
from apollo_optim.train.plan import planned
from benchmarks import kit
from benchmarks.cases import Case as Asked
from benchmarks.cases import Running
from benchmarks.memory import __main__ as command
from benchmarks.memory import cases, measure, run, table
from benchmarks.memory.cases import CASES, Case, config_of
from benchmarks.memory.rows import beside, run_case

WIDE = {"vocab_size": 32000}  # so that a gradient and a moment are larger than what a process adds by itself


def config(name: str, **shape: Any):
    return config_of(CASES[name], "llama-1m", seq=32, steps=2, threads=1, config=WIDE, **shape)


def row_of(case: str = "adamw", **changes: Any) -> dict[str, Any]:
    """A row as a measurement leaves it."""
    row = {
        "case": case, "size": "llama-1m", "dtype": "bfloat16", "batch": 1, "seq": 32, "steps": 2,
        "checkpointing": False, "malloc": "trimmed", "status": "ok", "package": None,
        "weights": 20_000_000, "gradients": 20_000_000, "optimizer": 40_000_000, "buffers": 0,
        "baseline": 300_000_000, "rest": 365_000_000, "peak": 393_000_000,
        "kept": {"pages": 2_000_000, "heap": 1_000_000},
    }  # fmt: skip
    return row | changes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is Linux's own account of it")
@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, None])
def test_a_fresh_process_takes_what_was_planned(compile: bool | None) -> None:
    name = "adamw-release"
    cfg = config(name, dtype="float32")
    cfg.optim.compile = compile
    row = run_case(name, cfg)
    assert row["status"] == "ok", row
    plan = planned(cfg)
    assert row["equal"]
    assert row["plan"]["total"] == plan.total
    assert row["gradients"] == plan.most["gradients"]
    # The tensors' part of the peak, which is wrong by more than that if a gradient or a moment (16 MB) is forgotten.
    assert abs(row["residual"]["peak"]) < 8e6, row["residual"]
    assert sum(row["residual"].values()) == row["difference"] == row["peak"] - row["baseline"] - plan.total
    assert row["residual"]["pages"] > 0
    assert row["versions"]["torch"] == torch.__version__
    assert row["hardware"]["threads"] == 1
    assert {key: row[key] for key in ("case", "size", "dtype", "steps", "malloc")} == {
        "case": name, "size": "llama-1m", "dtype": "float32", "steps": 2, "malloc": "trimmed",
    }  # fmt: skip


@pytest.mark.slow
def test_a_case_that_crashes_is_a_row_that_says_why() -> None:
    cfg = config("torch-adamw")
    cfg.data.seq_len = 4096
    row = run_case("torch-adamw", cfg)
    assert row["status"] == "failed"
    assert "longer than the context" in row["reason"]
    assert "failed: " in table.line(row)


def test_a_peer_that_is_not_there_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "nobody", Case(package="no_such_package", peer=lambda model: pytest.fail("called")))
    monkeypatch.setattr(measure.measure, "give_back_memory", lambda *_: True)  # this process is not the case's own
    asked = Asked("memory", "nobody", "", {"run": to_dict(config("adamw")), "malloc": "trimmed"})
    measure.life(Running(asked, tmp_path / "log.jsonl", deadline=0.0))
    (line,) = kit.read(tmp_path / "log.jsonl")
    row = row_of("nobody") | line
    assert row["status"] == "missing"
    assert "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'" in table.line(row)


def test_peers_get_the_same_matrices() -> None:
    model = build_model(config("adamw").model)
    follows, others = cases.matrices(model, rank=8, scale=1.0)
    matrices = {id(p) for name, p in model.named_parameters() if "self_attn" in name or "mlp" in name}
    assert {id(p) for p in follows["params"]} == matrices
    assert len(follows["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert (follows["rank"], follows["scale"]) == (8, 1.0)
    assert cases.quarter(model) == 32


def test_gradients_are_counted_while_they_are_there() -> None:
    found = []
    for released in (False, True):
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
        most = measure.count_gradients(model)
        optimizer = build_optimizer("adamw", model, targets="all-linear")
        if released:
            release(model, optimizer)
        model(torch.ones(2, 8)).sum().backward()
        found.append(most[0])
    assert found == [4 * (8 * 16 + 16 * 4), 4 * 8 * 16]


def test_a_wrapped_state_is_counted_as_it_is_stored() -> None:
    weight = nn.Parameter(torch.zeros(4, 8))
    optimizer = torch.optim.AdamW([weight])
    codes, step = LowBitWeight.from_float(torch.zeros(4, 256)), torch.tensor(1.0)
    optimizer.state[weight] = {"step": step, "exp_avg": codes, "twice": [codes.scales], "name": "x"}
    assert measure.state_bytes(optimizer) == 4 + 4 * 256 + 2 * 4 * 2


def test_what_is_above_the_plan_is_named_and_adds_up() -> None:
    cfg = config("adamw")
    plan = planned(cfg)
    state = plan.rows["state, matrices"] + plan.rows["state, rest"]
    row = row_of(weights=plan.rows["weights"], optimizer=state, rest=10**9, peak=2 * 10**9)
    found = beside(row, plan)
    assert found["equal"]
    assert sum(found["residual"].values()) == found["difference"] == 2 * 10**9 - row["baseline"] - plan.total
    assert found["residual"]["rest"] == 10**9 - row["baseline"] - plan.rows["weights"] - state - 3_000_000
    assert not beside(row | {"optimizer": state - 1}, plan)["equal"]


def test_the_table_has_the_last_row_of_each_measurement() -> None:
    plan = {"total": 90_000_000, "when": "update", "rows": {}}
    more = {"plan": plan, "equal": True, "difference": 3_000_000, "residual": {"pages": 2_000_000, "heap": 1_000_000}}
    rows = [row_of(peak=1), row_of("apollo", status="failed", reason="a | b"), row_of(**more), row_of(batch=2)]
    text = table.table(table.newest(rows))
    assert "| adamw | 20.0 | 20.0 | 40.0 | 93.0 | 90.0 | +3.3% | +2.0 | +1.0 | - | - | - |" in text
    assert "failed: a / b" in text
    assert text.count("## llama-1m, bfloat16") == 2
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {len(table.COLUMNS) + 1}
    assert "other bytes than planned" in table.line(row_of(**more | {"equal": False}))


def test_the_command_keeps_the_log_and_tells_when_bytes_are_not_those_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"plan": {"total": 90_000_000}, "equal": True, "difference": 3_000_000, "residual": {}}
    monkeypatch.setattr(command, "run_case", lambda name, *_: row_of(name, **more))
    words = ["--sizes", "llama-1m", "--cases", "adamw", "apollo", "--out", str(tmp_path)]
    assert command.main(words) == 0
    assert len(kit.read(tmp_path / "memory.jsonl")) == 2
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "| apollo |" in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    assert command.main([*words, "--table"]) == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "table.md").read_text().strip()
    more["equal"] = False
    assert command.main(words) == 1
    with pytest.raises(InputError, match="there is no such log"):
        command.main(["--table", "--out", str(tmp_path / "nowhere")])


def test_a_run_is_held_against_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("apollo-mini-release")
    asked: list[Any] = []

    def once(of: Any, *, vocab_size: int) -> Any:
        asked.append((to_dict(of), vocab_size))
        return plan

    plan = planned(cfg, vocab_size=4096)
    monkeypatch.setattr("apollo_optim.train.plan.planned", once)
    state = plan.rows["state, matrices"] + plan.rows["state, rest"]
    start = {
        "event": "start", "config": to_dict(cfg), "corpus": {"tokenizer": {"entries": 4096}},
        "memory": {"weights": plan.rows["weights"], "gradients": 0, "optimizer": 0},
        "baseline": {"imports": 300_000_000, "data": 340_000_000},
    }  # fmt: skip
    sizes = {"weights": plan.rows["weights"], "gradients": 1, "optimizer": state}
    events = [start, {"event": "memory", "step": 1, **sizes}]
    log = tmp_path / "metrics.jsonl"

    def told(**given: int) -> str:
        log.write_text("".join(json.dumps(event) + "\n" for event in events))
        return run.of_run(log, **given)

    assert "No peak in the log" in told()
    peak = 300_000_000 + plan.total + plan.total // 50
    assert "+2.0% |" in told(peak=peak)
    events.append({"event": "end", "step": 2, "memory": {**sizes, "peak": peak}})
    assert "+2.0% |" in told()
    assert told().count("+0 bytes") == 2
    assert "| of it the text and its tokenizer | 0.040 |" in told()
    del start["baseline"]
    assert "No import baseline" in told()
    assert "+2.0% |" in told(baseline=300_000_000)
    events[-1]["memory"]["optimizer"] += 4
    assert "| +4 bytes |" in told()
    assert all(question == (to_dict(cfg), 4096) for question in asked), "the plan is of the run's own configuration"


@needs_results
def test_the_kept_log_makes_the_kept_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Of earlier commits: what was measured stays readable."""
    kept = RESULTS / "memory"
    assert command.main(["--table", "--out", str(kept)]) == 0
    assert capsys.readouterr().out == (kept / "table.md").read_text() + "\n"


def test_sizes_in_words() -> None:
    assert [run.in_bytes(text) for text in ("8.06GB", "350MB", "12")] == [8_060_000_000, 350_000_000, 12]
    with pytest.raises(argparse.ArgumentTypeError, match="such as"):
        run.in_bytes("lots")
