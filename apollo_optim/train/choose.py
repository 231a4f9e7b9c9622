"""Which optimizer for this run and this memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.core.printing import say
from apollo_optim.parallel.world import launched
from apollo_optim.plan import Plan
from apollo_optim.plan.choose import Candidate, Choice, first_that_fits
from apollo_optim.train.build import choose_device
from apollo_optim.train.config import RunConfig, load_config
from apollo_optim.train.plan import planned
from apollo_optim.train.run_dir import run_of

AUTO = "auto"
"""`optim.name` of a run whose optimizer is chosen when it starts."""


def choose(cfg: RunConfig, memory: float, plan_of: Callable[[RunConfig], Plan] = planned) -> tuple[RunConfig, Choice]:
    """The best optimizer for a run whose weights, gradients, activations and state together may take `memory` bytes.

    >>> run, choice = choose(RunConfig(model=ModelConfig("llama-7b", dtype="bfloat16")), 24e9)
    >>> run.optim.name, choice.chosen.why, choice.plan.total

    Model, batch, sequence, `train.release` and recomputation are those of `cfg`; what it says of an optimizer is left
    behind. `plan_of`: who plans, if not `planned`. Raises InputError, naming what would help, where nothing fits.
    """
    kept = {"targets": cfg.optim.targets, "exclude": cfg.optim.exclude, "seed": cfg.optim.seed}

    def run_with(candidate: Candidate) -> RunConfig:
        optim = type(cfg.optim).of(name=candidate.name, rest=candidate.rest, **kept)
        return dataclasses.replace(cfg, optim=optim, quant=dataclasses.replace(cfg.quant, bits=candidate.bits))

    ways = [] if cfg.train.release else ["train.release true"]
    ways += [] if cfg.model.gradient_checkpointing else ["model.gradient_checkpointing true"]
    ways += ["a smaller train.micro_batch or data.seq_len"]
    choice = first_that_fits(lambda candidate: plan_of(run_with(candidate)), memory, ways)
    return run_with(choice.chosen), choice


def settled(cfg: RunConfig, resume: bool, plan_of: Callable[[RunConfig], Plan] = planned) -> RunConfig:
    """The run with an optimizer: where its name is `auto`, the best whose plan fits in the free memory of its device.

    A run that is resumed keeps the one that was chosen when it began. Raises InputError where nothing fits, where
    nobody knows how much memory is free, and for several processes, of which each would choose for itself.
    """
    if cfg.optim.name != AUTO:
        return cfg
    if launched():
        raise InputError("optim.name=auto is for one process: name an optimizer (apollo-optim optimizers)")
    kept = {"name", "targets", "exclude", "seed"}
    said = [f"optim.{key}" for key, value in cfg.optim.flat().items() if value is not None and key not in kept]
    said += [] if cfg.quant.bits is None else ["quant.bits"]
    if said:
        raise InputError(f"optim.name=auto brings its own rates, knobs and bits: leave {', '.join(said)} out")
    if resume:
        if cfg.out is None:
            raise InputError("optim.name=auto: name the run to go on with, --out RUN")
        begun = load_config(run_of(cfg) / "config.yaml")
        return dataclasses.replace(cfg, optim=begun.optim, quant=begun.quant)
    memory = free_memory(choose_device(cfg))
    found, choice = choose(cfg, memory, plan_of)
    free = f"a plan of {choice.plan.total / 1e9:.2f} GB where {memory / 1e9:.1f} are free"
    say(f"optimizer: {choice.chosen.title}, {free}: {choice.chosen.why}")
    return found


def free_memory(where: torch.device) -> int:
    """Bytes that a new process may take, on a GPU or of this machine (and of the control group that it runs in).

    Raises InputError where that is not known.
    """
    if where.type == "cuda":
        return int(torch.cuda.mem_get_info(where)[0])
    told = Path("/proc/meminfo")
    if where.type != "cpu" or not told.exists():
        raise InputError(
            f"optim.name=auto: how much memory is free on {where.type} is not known here; "
            "apollo-optim plan --memory SIZE --choose says what to name"
        )
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines())
    limits = [int(lines["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()) != "max":
        limits.append(int(most) - int((group / "memory.current").read_text()))
    return min(limits)
