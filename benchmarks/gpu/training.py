"""A real run: `pretrain` of llama-60m on text that is there, so many seconds for each optimizer.

How many steps that is, a short run says first. The rate is constant after a warm-up of so many steps, so that runs of
different lengths can be compared at equal tokens; nobody's rate is tuned here, and the losses are no race. (`race` has
whole schedules and the rates that are known; its equal tokens are its equal steps.)
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from apollo_optim.data.config import DataConfig
from apollo_optim.report import read_events
from apollo_optim.train.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from apollo_optim.train.failures import Interrupted
from apollo_optim.train.pretrain import pretrain
from benchmarks.cases import Running
from benchmarks.gpu.device import open_device
from benchmarks.kit import Line

TIMED = 6  # steps of the short run
MARGIN = 3.0  # seconds that are kept for the end


def run_config(config: Line, optimizer: str, steps: int, out: Path, scratch: Path) -> RunConfig:
    """The run file of a case."""
    return RunConfig(
        model=ModelConfig(config["size"], dtype=config["dtype"], vocab_size=config["vocabulary"]),
        data=DataConfig(
            config["source"],
            seq_len=config["seq"],
            vocab_size=config["tokens"],
            cache_dir=str(scratch / "text"),
        ),
        optim=OptimConfig(optimizer, lr=config["rates"].get(optimizer), compile=config["compile"]),
        schedule=ScheduleConfig(config["schedule"], warmup=min(config["warmup"], steps // 2)),
        train=TrainConfig(steps=steps, batch_size=config["batch"], device=config["device"]),
        eval=EvalConfig(every=None, tokens=config["evaluated"]),
        checkpoint=CheckpointConfig(every=None, export=False),
        log=LogConfig(every=1 if steps <= TIMED else 5, display="none"),
        out=str(out),
    )


def ran(case: Running, optimizer: str, steps: int) -> Line:
    """A run from the beginning to its end, or to where it was stopped: what its log says."""
    out = case.scratch / f"{case.case.name}-{optimizer}-{steps}"
    started, stopped = time.perf_counter(), None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()
    try:
        pretrain(run_config(case.config, optimizer, steps, out, case.scratch))
    except Interrupted as error:
        stopped = str(error)
    seconds = time.perf_counter() - started
    lines = read_events(out / "metrics.jsonl")
    shutil.rmtree(out)
    said: dict[str, list[Line]] = {"step": [], "eval": [], "start": []}
    for line in lines:
        said.setdefault(line["event"], []).append(line)
    return {"optimizer": optimizer, "steps": steps, "stopped": stopped, "wall_seconds": seconds, **figures(said)}


def figures(said: dict[str, list[Line]]) -> Line:
    """Pace, losses by tokens, and memory."""
    steps: list[Any] = said["step"]
    rates = [line["tokens_per_s"] for line in steps[len(steps) // 3 :]] or [None]
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    memory: Line = {"allocated": torch.cuda.max_memory_allocated() if used else None}
    return {
        "parameters": said["start"][0]["params"] if said["start"] else None,
        "tokens": steps[-1]["tokens"] if steps else 0,
        "tokens_per_s": statistics.median(rates) if steps else None,
        "train_seconds": steps[-1]["seconds"] if steps else 0.0,
        "curve": [[line["tokens"], line["loss"]] for line in steps],
        "validation": said["eval"][-1]["loss"] if said["eval"] else None,
        **memory,
    }


def limit(config: Line, short: Line, seconds: float) -> int:
    """How many steps go into the seconds, by what the short run took; its compiling is not paid again, mostly."""
    around = short["wall_seconds"] - short["train_seconds"] + MARGIN
    pace = short["tokens_per_s"] / (config["batch"] * config["seq"])
    steps = int(0.9 * (seconds - around) * pace)
    return min(steps, config["most"]) if config["most"] else steps


def train(case: Running) -> None:
    """The short run, and the one that it says there is time for."""
    open_device(case.config["device"])
    with case.attempt(what="short") as line:
        line.update(ran(case, case.config["optimizer"], TIMED))
    if "tokens_per_s" not in line:
        return
    steps = limit(case.config, line, case.left())
    if steps <= TIMED:
        case.skipped(f"no time for more than {TIMED} steps", what="run")
        return
    with case.attempt(what="run") as line:
        line.update(ran(case, case.config["optimizer"], steps))


def race(case: Running) -> None:
    """As many steps for each as all have time for."""
    open_device(case.config["device"])
    names, shorts = case.config["optimizers"], []
    for name in names:
        with case.attempt(what="short") as line:
            line.update(ran(case, name, TIMED))
        shorts.append(line)
    if any("tokens_per_s" not in line for line in shorts):
        return
    # each gets what it needs for the same number of steps
    paces = [line["tokens_per_s"] for line in shorts]
    slowest = {**shorts[0], "tokens_per_s": len(paces) / sum(1 / pace for pace in paces)}
    steps = limit(case.config, slowest, case.left() / len(names))
    if steps <= TIMED:
        case.skipped(f"no time for more than {TIMED} steps", what="run")
        return
    for name in names:
        with case.attempt(what="run") as line:
            line.update(ran(case, name, steps))
