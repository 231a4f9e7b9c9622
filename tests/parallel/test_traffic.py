"""What a step is planned to send is what processes really send: collective by collective, to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import traffic_runs
from train_tiny import MODEL, records, tiny

from apollo_optim.core.errors import InputError
from apollo_optim.optim import together
from apollo_optim.plan import Parallel, Sends, planned_sends
from apollo_optim.plan.traffic import BUCKET, FIRST_BUCKET, ddp_sends, pretended
from apollo_optim.rules import RULES
from apollo_optim.train.config import OptimConfig, RunConfig, save_config
from benchmarks.collectives import Model, counted, optimizer_of
from benchmarks.processes import spawned

SOME = ["adafactor", "adamw", "apollo", "apollo-mini", "galore", "muon", "scale"]
each_rule = pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=[] if r in SOME else pytest.mark.slow) for r in RULES]
)


def sends_of(rule: str, layers: int, processes: int = 2, compile: bool | None = False) -> Sends:
    """As `benchmarks.collectives.counted` builds it, on the meta device."""
    with torch.device("meta"):
        model = Model(layers)
    return planned_sends(model, optimizer_of(model, rule, compile), Parallel("fsdp2", processes))


def line(traffic) -> dict:
    return {key: value for key, value in traffic.line().items() if key != "wire"}


# --- the same where others only seem to be there ---


@pytest.fixture
def one_of_two():
    with pretended(2):
        yield


@each_rule
def test_windows_are_those_of_the_step(rule, one_of_two, monkeypatch):
    """More entries than are stepped side by side: sums are put together in parts."""
    monkeypatch.setattr(together, "WINDOW", 20_000)
    assert line(sends_of(rule, 8).optimizer) == counted(rule, layers=8)


def test_adamw_is_there_to_compare_with():
    sends = sends_of("muon", 2)
    assert line(sends.adamw) == line(sends_of("adamw", 2).optimizer)
    assert sends.optimizer.nbytes > 100 * sends.adamw.nbytes
    assert sends.first == sends.optimizer
    galore = sends_of("galore", 2)
    assert galore.first.kinds["all_gather_into_tensor"] - galore.optimizer.kinds["all_gather_into_tensor"] == 14


def test_nothing_is_left_of_the_processes_that_seemed_to_be_there():
    sends_of("apollo", 1)
    assert not dist.is_initialized()
    with pretended(2), pytest.raises(InputError, match="what 3 processes send cannot be planned among 2 others"):
        sends_of("apollo", 1, 3)


def test_a_ring_sends_no_byte_oftener_than_it_must():
    sends = sends_of("adamw", 2, processes=4)
    model = sum(p.numel() for p in Model(2).parameters()) * 4
    root = (96 * 32 * 2 + 32) * 4  # it stays gathered
    assert sends.weights.nbytes == 3 * model - root
    assert sends.weights.wire == (3 * model - root) * 3 // 4
    assert sends.optimizer.wire == sends.optimizer.nbytes * 2 * 3 // 4


def test_buckets_of_ddp():
    """Those of torch's own reducer."""
    shapes = [(300, 1000), (200, 1000), (2000, 1000), (5000, 1000), (10, 10), (300, 1000), (10,)]
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    found = ddp_sends(params, 2)
    there = [torch.empty(shape) for shape in reversed(shapes)]
    torchs, _ = dist._compute_bucket_assignment_by_size(there, [FIRST_BUCKET, BUCKET])
    assert [one.nbytes for one in found.sent] == [sum(there[i].nbytes for i in bucket) for bucket in torchs]
    assert found.collectives == 3


# --- runs ---

MODES = {
    "ddp": {},
    "fsdp2": {"train": {"clip": 0.5}},
    "fsdp2-muon": {"optim": OptimConfig("muon", lr=1e-3)},
    "fsdp2-galore": {"optim": OptimConfig("galore", lr=1e-3, knobs={"rank": 8})},
    "fsdp2-release": {"train": {"release": True}},
    "fsdp2-8bit": {"quant": {"bits": 8}},
    "tp": {"train": {"clip": 0.5}, "model": {"gradient_checkpointing": True}},
}
OF_FOUR = {"hsdp": {}, "tp+fsdp2": {}, "fsdp2-4bit": {"quant": {"bits": 4}}, "ddp": {}}


def cfg_of(folder: Path, name: str, **changes) -> RunConfig:
    """Two micro-batches in each of two processes; two layers, no dropout; most steps not logged."""
    optim = changes.pop("optim", None)
    sections: dict = {"parallel": {"mode": name.partition("-")[0]}, "eval": {"every": None}, "log": {"every": 9}}
    sections["model"] = {"config": {**MODEL, "num_hidden_layers": 2, "attention_dropout": 0.0}}
    sections["train"] = {"micro_batch": 1, "steps": 4}
    for section, keys in changes.items():
        sections[section] = sections.get(section, {}) | keys
    cfg = tiny(folder, name, **sections)
    cfg.optim = optim or cfg.optim
    return cfg


def compare(folder: Path, processes: int, runs: dict[str, dict], rules: list[str], layers: int = 2) -> None:
    """Runs, and the second step of each rule, in processes that are there."""
    files = []
    for name, changes in runs.items():
        files.append(folder / f"{name}.yaml")
        save_config(cfg_of(folder, name, **changes), files[-1])
    spawned(processes, traffic_runs.work, files, rules, layers, folder / "rules.json")
    for rule, sent in json.loads((folder / "rules.json").read_text()).items():
        assert line(sends_of(rule, layers, processes).optimizer) == sent, rule
    for name in runs:
        planned = records(folder / name, "start")[0]["sends"]
        for of in planned.values():
            del of["wire"]
        steps = json.loads((folder / f"{name}.json").read_text())
        assert len(steps) == 4
        sent = steps[2]  # DDP's buckets are made anew after the first
        assert (sent["weights"], sent["optimizer"]) == (planned["weights"], planned["optimizer"]), name
        assert steps[0]["optimizer"] == planned.get("optimizer_first", planned["optimizer"]), name


def test_two_processes_send_what_is_planned(tmp_path):
    some = ("ddp", "fsdp2-galore", "tp")
    compare(tmp_path, 2, {name: MODES[name] for name in some}, SOME)
    galore = records(tmp_path / "fsdp2-galore", "start")[0]["sends"]
    assert galore["optimizer_first"]["bytes"] > galore["optimizer"]["bytes"] > galore["adamw"]["bytes"] > 0


@pytest.mark.slow
def test_every_rule_and_mode_of_two_processes_sends_what_is_planned(tmp_path):
    compare(tmp_path, 2, MODES, sorted(RULES), layers=3)
    low, plain = (records(tmp_path / name, "start")[0]["sends"] for name in ("fsdp2-8bit", "fsdp2"))
    assert low["weights"]["bytes"] < plain["weights"]["bytes"]
    assert low["optimizer"] == plain["optimizer"]


@pytest.mark.slow
def test_three_processes_send_what_is_planned(tmp_path):
    """Rows are filled up."""
    compare(tmp_path, 3, {}, sorted(RULES), layers=3)


@pytest.mark.slow
def test_four_processes_send_what_is_planned(tmp_path):
    compare(tmp_path, 4, OF_FOUR, [])


@pytest.mark.slow
def test_compiled_steps_send_what_is_planned(tmp_path):
    """What a step sends within its graph takes no turn, and one number a channel is gathered for each matrix."""
    spawned(2, traffic_runs.compiled, ["apollo", "muon"], 2, tmp_path / "sent.json")
    for rule, sent in json.loads((tmp_path / "sent.json").read_text()).items():
        assert sent == line(sends_of(rule, 2, compile=True).optimizer) != line(sends_of(rule, 2).optimizer), rule
