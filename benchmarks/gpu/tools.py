"""What people run, on the device: `pretrain` and transformers' Trainer, resumed and compared to the bit; FSDP2 on NCCL.

A run is made twice, so that what a device itself does differently from run to run is told from what a resume loses.
Both are asked for deterministic kernels; the library's own steps need no asking.
"""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apollo_optim import list_optimizers
from apollo_optim.data.config import DataConfig
from apollo_optim.report import read_events
from apollo_optim.train.checkpoint import checkpoints
from apollo_optim.train.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from apollo_optim.train.pretrain import pretrain
from benchmarks.cases import Running
from benchmarks.gpu.contract import Perceptron, judged, made, parted, plain, prepared
from benchmarks.gpu.device import open_device
from benchmarks.kill import figures, final_files
from benchmarks.kit import ROOT, Line

STEPS, SAVED = 8, 4
GAMES: dict[str, Line] = {
    "apollo-mini": {},
    "apollo": {"state_dtype": "8bit", "rank": 8},
    "q-apollo-mini": {"release": True},
    "muon": {"release": True},
}
"""optimizer -> what is not as it is by default."""


# --- pretrain ---


def command(case: Running) -> None:
    """The runs of GAMES: two alike, and one from the first one's checkpoint in the middle."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name, own in GAMES.items():
        with case.attempt(what="pretrain", optimizer=name, weights="bfloat16") as line:
            line.update(pretrained(case, name, own))


def run_config(config: Line, name: str, own: Line, out: Path, scratch: Path) -> RunConfig:
    """A small one, all else as it is by default."""
    keys = {key: value for key, value in own.items() if key != "release"}
    return RunConfig(
        model=ModelConfig(config["size"], dtype="bfloat16"),
        data=DataConfig(str(ROOT / "apollo_optim"), seq_len=64, vocab_size=300, cache_dir=str(scratch / "text")),
        optim=OptimConfig.of(name=name, lr=1e-3, **keys),
        train=TrainConfig(
            steps=STEPS,
            batch_size=8,
            micro_batch=None if own.get("release") else 4,
            release=own.get("release", False),
            device=config["device"],
            deterministic=True,
        ),
        eval=EvalConfig(every=None, tokens=512),
        checkpoint=CheckpointConfig(every=SAVED, keep=2, export=False),
        log=LogConfig(every=1, display="none"),
        out=str(out),
    )


def pretrained(case: Running, name: str, own: Line) -> Line:
    """What the log and the files of the second and of the resumed run have that the first one's have not."""
    whole, again, resumed = (case.scratch / f"{name}-{which}" for which in ("whole", "again", "resumed"))
    for out in (whole, again):
        pretrain(run_config(case.config, name, own, out, case.scratch))
    shutil.copytree(whole, resumed)
    shutil.rmtree(checkpoints(resumed)[STEPS])
    pretrain(run_config(case.config, name, own, resumed, case.scratch), resume=True)
    said = {run.name.rpartition("-")[2]: alike(run, whole) for run in (again, resumed)}
    events = read_events(whole / "metrics.jsonl")
    peak = next(event for event in reversed(events) if event["event"] == "end")
    for run in (whole, again, resumed):
        shutil.rmtree(run)
    bad = [f"{which}: {what}" for which, what in said.items() if what]
    return {"unlike": bad, "end": peak, "status": "differs" if bad else "ok", "reason": "; ".join(bad) or None}


def alike(run: Path, whole: Path) -> str:
    """'' if figures and files are the same, else which are not."""
    pairs = zip(figures(run), figures(whole), strict=True)
    steps = [ours.get("step") for ours, theirs in pairs if ours != theirs]
    ours, theirs = final_files(run), final_files(whole)
    files = [file for file in theirs if ours.get(file) != theirs[file]]
    return f"figures of steps {steps}, files {files}" if steps or files else ""


# --- transformers ---


def trainer(case: Running) -> None:
    """transformers' Trainer with the same tiny runs as `tests/clients` has on a CPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    sys.path.insert(0, str(ROOT / "tests" / "clients"))
    runs: Any = importlib.import_module("trainer_runs")
    on_cpu = case.config["device"] == "cpu"
    released = {"callbacks": (runs.ReleaseCallback,)}
    games: dict[str, Line] = {
        "apollo-mini": {"dtype": "float32"},
        "muon": {"dtype": "bfloat16"},
        "apollo": {"dtype": "bfloat16", "knobs": {"rank": 8, "state_dtype": "8bit"}, **released},
        "q-apollo-mini": {"dtype": "bfloat16", "bits": 8},
    }
    for name, game in games.items():
        rule = name.removeprefix("q-")
        with case.attempt(what="Trainer", optimizer=name, weights=game["dtype"]) as line:
            line.update(trained(runs, case.scratch / f"trainer-{name}", rule, {**game, "use_cpu": on_cpu}))


def trained(runs: Any, out: Path, rule: str, game: Line) -> Line:
    """Twice, and once from the first one's checkpoint; largest differences of a weight or of the state."""
    whole, again = (runs.train(out / which, rule, **game) for which in ("whole", "again"))
    resumed = runs.train(out / "resumed", rule, resume=out / "whole" / "checkpoint-4", **game)
    where = {str(t.device) for t in whole.weights.values()}
    said = {which: apart(run, whole) for which, run in (("again", again), ("resumed", resumed))}
    shutil.rmtree(out)
    return {**said, "device": sorted(where), "status": "differs" if any(said.values()) else "ok"}


def apart(run: Any, whole: Any) -> float:
    """The largest difference of all weights and all state."""
    pairs = [(run.weights[name], t) for name, t in whole.weights.items()]
    pairs += [(run.state[key], t) for key, t in whole.state.items() if isinstance(t, Tensor)]
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if b.numel())


# --- shards ---


def sharded(case: Running) -> None:
    """FSDP2 on NCCL (gloo on a CPU) of one process: every optimizer beside the same steps on plain tensors."""
    from torch.distributed.device_mesh import init_device_mesh

    device = open_device(case.config["device"])
    if device.type not in ("cuda", "cpu"):
        case.skipped(f"a {device.type} has no processes of torch", what="FSDP2")
        return
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29567",
    }
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (1,))
    for info in list_optimizers():
        kind = "float32" if info.bits is None else "low-bit"
        with case.attempt(what="FSDP2", optimizer=info.name, weights=kind) as line:
            line.update(beside(info, kind, device, mesh, case.config["width"]))
    dist.destroy_process_group()


def beside(info: Any, kind: str, device: torch.device, mesh: Any, width: int) -> Line:
    """Three steps with the same gradients, and a state that is saved and read again in between."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    start = prepared(Perceptron(width), info, kind)
    whole, parts = copy.deepcopy(start).to(device), copy.deepcopy(start).to(device)
    fully_shard(parts, mesh=mesh)
    ours, theirs = made(info, whole), made(info, parts)
    for step in range(3):
        each: list[tuple[nn.Module, torch.optim.Optimizer]] = [(whole, ours), (parts, theirs)]
        x = torch.randn(32, width, generator=torch.Generator().manual_seed(step))
        x = x.to(device, torch.float32 if kind == "float32" else torch.bfloat16)
        for model, optimizer in each:
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:
            saved = get_optimizer_state_dict(parts, theirs)
            set_optimizer_state_dict(parts, theirs, optim_state_dict=saved)
    after = {name: (p.detach().full_tensor() + 0).float().cpu() for name, p in parts.named_parameters()}  # type: ignore[attr-defined]
    return judged(parted(plain(whole), after, plain(start)), 1e-5)
