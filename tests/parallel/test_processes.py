"""The same run in one process and in several: the same losses, the same weights, checkpoints that fit all of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_tiny import MODEL, records, tiny

from apollo_optim.core.errors import InputError
from apollo_optim.parallel.world import ALONE, World, joined
from apollo_optim.plan import Parallel
from apollo_optim.plan.budget import resting
from apollo_optim.train import build
from apollo_optim.train.checkpoint import checkpoints, export
from apollo_optim.train.config import RunConfig, check_processes, save_config
from apollo_optim.train.optimizer import make_optimizer
from apollo_optim.train.plan import model_of
from apollo_optim.train.pretrain import pretrain
from benchmarks.processes import train, weights, work

CLOSE = 1e-5  # relative: sums of other orders


def cfg_of(folder: Path, name: str, mode: str = "ddp", **changes) -> RunConfig:
    """Two micro-batches in each of two processes, four in one; no dropout, whose random numbers are a process's own."""
    sections = {"model": {"config": {**MODEL, "attention_dropout": 0.0}}, "parallel": {"mode": mode}}
    sections["train"] = {"micro_batch": 1, **changes.pop("train", {})}
    return tiny(folder, name, **sections, **changes)


def written(cfg: RunConfig) -> Path:
    path = Path(str(cfg.out)).with_suffix(".yaml")
    save_config(cfg, path)
    return path


def assert_same(ours: Path, theirs: Path) -> None:
    """The same figures of every step and evaluation, and the same weights, but for rounding."""
    for event in ("step", "eval"):
        pairs = list(zip(records(ours, event), records(theirs, event), strict=True))
        assert pairs
        for a, b in pairs:
            assert (a["step"], a["tokens"]) == (b["step"], b["tokens"])
            for key in {"loss", "grad_norm"} & a.keys():
                assert a[key] == pytest.approx(b[key], rel=CLOSE), (event, a["step"], key)
    first, second = weights(ours), weights(theirs)
    assert first.keys() == second.keys()
    for name, t in first.items():
        assert (t - second[name]).norm() <= CLOSE * t.norm(), name


def stored(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint, as it holds them."""
    return load_file(max(checkpoints(run).items())[1] / "weights-00001-of-00001.safetensors")


RUNS = {
    "ddp": {"train": {"clip": 0.5}},
    "fsdp2": {"train": {"clip": 0.5}},
    "fsdp2-release": {"train": {"release": True, "clip_tensor": 0.5}},
    "fsdp2-8bit": {"train": {"clip": 0.5}, "quant": {"bits": 8, "tally": 4}},  # equal codes: no sum is at an edge here
    "fsdp2-4bit-release": {"train": {"release": True, "clip_tensor": 0.5}, "quant": {"bits": 4}},
    "tp": {"train": {"clip": 0.5}},
    "tp-release": {"train": {"release": True, "clip_tensor": 0.5}},
}
ONE_THEN_TWO = {
    "one-then-fsdp2": "ddp",
    "one-then-tp": "ddp",
    "one-then-fsdp2-8bit": "fsdp2-8bit",
}  # run -> that which it goes on
TWO_THEN_ONE = {"fsdp2-then-one": "fsdp2-2", "tp-then-one": "tp-2", "fsdp2-8bit-then-one": "fsdp2-8bit-2"}


def goes_on(folder: Path, source: str, name: str, mode: str) -> RunConfig:
    """A copy of a run as it was after its first checkpoint."""
    shutil.copytree(folder / source, folder / name, symlinks=True)
    shutil.rmtree(folder / name / "model")
    shutil.rmtree(max(checkpoints(folder / name).items())[1])
    return cfg_of(folder, name, mode, **RUNS[source.removesuffix("-2")])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Each of RUNS in one process (`NAME`) and in two (`NAME-2`), and runs that go on in another number of them."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for name, changes in RUNS.items():
        mode = name.partition("-")[0]
        pretrain(cfg_of(folder, name, mode, **changes))
        jobs.append((cfg_of(folder, f"{name}-2", mode, **changes), False))
    jobs += [(goes_on(folder, source, name, name.split("-")[2]), True) for name, source in ONE_THEN_TWO.items()]
    train(2, jobs)
    for name, source in TWO_THEN_ONE.items():
        pretrain(goes_on(folder, source, name, "ddp"), resume=True)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(runs, name):
    assert_same(runs / f"{name}-2", runs / name)
    assert len(records(runs / f"{name}-2", "step")) == 8
    start, end = records(runs / f"{name}-2", "start")[0], records(runs / f"{name}-2", "end")[0]
    assert (start["processes"], start["parallel"]) == (2, name.partition("-")[0])
    assert len(end["peak_by_rank"]) == 2


@pytest.mark.parametrize(("name", "source"), [*ONE_THEN_TWO.items(), *TWO_THEN_ONE.items()])
def test_a_checkpoint_goes_on_in_another_number_of_processes(runs, name, source):
    assert [record["resumed_from"] for record in records(runs / name, "start")] == [None, 4]
    assert_same(runs / name, runs / source.removesuffix("-2"))


def test_checkpoints_of_low_bit_shards_are_those_of_one_process(runs):
    """Codes and scales, by the same names: so an export of one is that of the other, too."""
    ours, its = (stored(runs / name) for name in ("fsdp2-8bit-2", "fsdp2-8bit"))
    assert any(name.endswith(".codes") for name in its)
    assert ours.keys() == its.keys()
    for name, t in its.items():
        assert torch.equal(ours[name], t) or not name.endswith((".codes", ".scales", ".shape")), name
    exported, written = export(runs / "fsdp2-8bit-2", out=runs / "exported"), weights(runs / "fsdp2-8bit-2")
    for name, t in load_file(exported / "model-00001-of-00001.safetensors").items():
        assert torch.equal(t, written[name]), name


def test_the_tally_of_shards_is_that_of_one_process(runs):
    ours, its = (records(runs / name, "tally") for name in ("fsdp2-8bit-2", "fsdp2-8bit"))
    assert [record["step"] for record in its] == [record["step"] for record in ours] == [4, 8]
    for a, b in zip(ours, its, strict=True):
        assert a["weights"].keys() == b["weights"].keys() != set()
        for name, figures in b["weights"].items():
            assert a["weights"][name] == pytest.approx(figures, rel=1e-4), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_groups_of_processes_train_as_one_does(runs):
    """Two groups of two (HSDP), from the beginning and going on from a checkpoint of one process."""
    again = {f"{source}-then-hsdp": source for source in ("ddp", "fsdp2-8bit")}
    anew = {f"hsdp-4 {source}": source for source in ("ddp", "fsdp2-release", "fsdp2-8bit", "fsdp2-4bit-release")}
    jobs = [(goes_on(runs, source, name, "hsdp"), True) for name, source in again.items()]
    train(4, [*jobs, *((cfg_of(runs, name, "hsdp", **RUNS[source]), False) for name, source in anew.items())])
    for name, source in {**again, **anew}.items():
        assert_same(runs / name, runs / source)
    whole, part = (records(runs / name, "memory")[0] for name in ("ddp", "hsdp-4 ddp"))
    assert part["weights"] < 0.52 * whole["weights"]
    assert len(records(runs / "hsdp-4 ddp", "end")[0]["peak_by_rank"]) == 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_matrices_split_within_groups_train_as_one_does(runs):
    """Two groups of two processes, a part of every matrix in each of four; and going on from other modes."""
    mode, again = "tp+fsdp2", {"one-then-both": "ddp", "two-then-both": "tp-2", "fsdp2-then-both": "fsdp2-release-2"}
    jobs = [(goes_on(runs, source, name, mode), True) for name, source in again.items()]
    anew = {f"both-4 {source}": source for source in ("tp", "tp-release")}
    train(4, [*jobs, *((cfg_of(runs, name, mode, **RUNS[source]), False) for name, source in anew.items())])
    for name, source in {**again, **anew}.items():
        assert_same(runs / name, runs / source.removesuffix("-2"))
    whole, part = (records(runs / name, "memory")[0] for name in ("tp", "both-4 tp"))
    assert part["weights"] < 0.52 * whole["weights"], "a quarter of the matrices, half of the rest"


def test_a_process_of_tensor_parallelism_has_its_part_of_the_matrices(runs):
    whole, part = (records(runs / run, "memory")[0] for run in ("tp", "tp-2"))
    matrices = 4 * 32 * 32 + 3 * 32 * 64
    assert whole["weights"] - part["weights"] == matrices // 2 * 4
    assert whole["gradients"] - part["gradients"] == matrices // 2 * 4


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-8bit"])
def test_a_sharded_process_has_its_part(runs, name):
    whole, part = (records(runs / run, "memory")[0] for run in (name, f"{name}-2"))
    for key in ("weights", "gradients", "optimizer"):
        assert part[key] < 0.52 * whole[key], key


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-8bit"])
def test_a_plan_of_shards_has_the_bytes_of_the_run(runs, name):
    real, cfg = records(runs / f"{name}-2", "memory")[0], cfg_of(runs, f"{name}-2", **RUNS[name])
    model = model_of(cfg, cfg.data.vocab_size)
    planned, _ = resting(model, make_optimizer(cfg.optim, model), Parallel("fsdp2", 2))
    assert planned["weights"] == real["weights"]
    assert planned["state, matrices"] + planned["state, rest"] == real["optimizer"]


def torchrun(cfg: RunConfig, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["--max-restarts", str(restarts)]
    command += ["-m", "apollo_optim", "pretrain", "--config", str(written(cfg)), "--log.display", "plain", *words]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    while not (run / "metrics.jsonl").exists() or len(records(run, "step")) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_torchrun_stops_after_the_same_step_and_goes_on(tmp_path):
    """SIGTERM, which torchrun hands on to every process: all save after one step, and the resumed run ends as one."""
    whole = cfg_of(tmp_path, "whole", train={"steps": 30})
    pretrain(whole)
    cfg = cfg_of(tmp_path, "run", "fsdp2", train={"steps": 30})
    process = torchrun(cfg)
    wait_for(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode
    assert said.count("saved after step") == 2  # each of the two processes
    reached = max(checkpoints(tmp_path / "run"))
    assert 5 <= reached < 30
    pretrain(cfg, resume=True)
    assert [record["resumed_from"] for record in records(tmp_path / "run", "start")] == [None, reached]
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_restarts_a_run_of_which_a_process_was_killed(tmp_path, victim):
    whole = cfg_of(tmp_path, "whole", train={"steps": 30})
    pretrain(whole)
    cfg = cfg_of(tmp_path, "run", "fsdp2", train={"steps": 30})
    process = torchrun(cfg, restarts=1)
    wait_for(tmp_path / "run", 10, process)
    os.kill(worker_of(process.pid, victim), signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    start, again = records(tmp_path / "run", "start")
    assert start["resumed_from"] is None
    assert again["resumed_from"] >= 8
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_hangs_ends_the_run(tmp_path):
    cfg = cfg_of(tmp_path, "run", "fsdp2", train={"steps": 4000})
    cfg.parallel.timeout = 15.0
    process = torchrun(cfg)
    wait_for(tmp_path / "run", 10, process)
    hung = worker_of(process.pid, 1)
    os.kill(hung, signal.SIGSTOP)
    said = process.communicate()[0]
    assert process.returncode
    told = r"another process of the run .* does not answer .* the last good checkpoint is .*step-"
    assert re.search(told, said), said


def spoilt(rank: int, *how) -> None:
    """One process of several. In the second, the gradients of the third forward pass are no numbers."""
    real = build.build_model

    def build_model(*args, **kwargs):
        model, calls = real(*args, **kwargs), iter(range(10**6))

        def spoil(_, __, output: torch.Tensor) -> None:
            if output.requires_grad and next(calls) == 2:
                output.register_hook(lambda grad: grad * torch.nan)

        if rank == 1:
            model.model.layers[0].mlp.down_proj.register_forward_hook(spoil)
        return model

    build.build_model = build_model
    work(rank, *how)


@pytest.mark.slow
def test_what_is_no_number_in_one_process_is_skipped_in_all(tmp_path):
    train(2, [(cfg_of(tmp_path, mode, mode), False) for mode in ("ddp", "fsdp2")], spoilt)
    assert_same(tmp_path / "ddp", tmp_path / "fsdp2")
    skipped = [records(tmp_path / mode, "end")[0]["skipped"] for mode in ("ddp", "fsdp2")]
    assert skipped[0] == skipped[1] > 0
    assert all(t.isfinite().all() for t in weights(tmp_path / "ddp").values())


def worker_of(parent: int, rank: int) -> int:
    """The process of this rank that torchrun has started."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = (process / "stat").read_text().rpartition(") ")[2].split()
            if int(status[1]) == parent and f"\0RANK={rank}\0" in "\0" + (process / "environ").read_text():
                return int(process.name)
        except OSError:
            continue  # gone meanwhile
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"batch_size": 5}}, "train.batch_size=5: 2 processes cannot share it equally"),
        ({"train": {"release": True}}, "train.release: with parallel.mode=ddp"),
        ({"parallel": {"mode": "tp"}, "quant": {"bits": 8}}, "parallel.mode=tp with low-bit weights"),
        ({"parallel": {"mode": "tp"}, "model": {"compile": True}}, "model.compile with parallel.mode=tp"),
        ({"parallel": {"mode": "tp+fsdp2", "tensor": 4}}, "parallel.tensor=4: 2 processes cannot be cut"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(tmp_path, changes, said):
    cfg = tiny(tmp_path, **changes)
    with pytest.raises(InputError, match=said):
        check_processes(cfg, World(0, 2))
    if "batch_size" not in changes.get("train", {}):
        check_processes(cfg, ALONE)


def test_groups_of_processes_are_equal():
    cfg = RunConfig()
    cfg.parallel.mode, cfg.parallel.replicas, cfg.train.batch_size = "hsdp", 4, 12
    with pytest.raises(InputError, match=r"parallel\.replicas=4: 6 processes cannot be cut"):
        check_processes(cfg, World(0, 6))
    check_processes(cfg, World(0, 4))


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined(10.0) as world:
        assert world is ALONE
    monkeypatch.setenv("RANK", "0")  # of another tool: not torchrun's four
    with joined(10.0) as world:
        assert world is ALONE


def test_the_rows_of_a_batch_are_shared(monkeypatch):
    rows = torch.arange(12).view(6, 2)
    parts = [World(rank, 3).mine(rows) for rank in range(3)]
    assert torch.equal(torch.stack(parts, 1).view(6, 2), rows)
    pairs = [World(rank, 6, tensor=2).mine(rows) for rank in range(6)]  # two processes of a share see the same rows
    assert all(torch.equal(pair, parts[rank // 2]) for rank, pair in enumerate(pairs))
    assert ALONE.mine(rows) is rows
