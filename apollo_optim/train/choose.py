"""Which optimizer for this memory: the best by the evidence of docs/choose.md whose plan fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.core.printing import say
from apollo_optim.parallel.world import launched
from apollo_optim.plan import Plan
from apollo_optim.train.build import choose_device
from apollo_optim.train.config import RunConfig, load_config
from apollo_optim.train.plan import planned
from apollo_optim.train.run_dir import run_of

AUTO = "auto"
"""`optim.name` of a run whose optimizer is chosen when it starts."""


class Candidate(NamedTuple):
    """An optimizer, the bits of its weights if they are not the model's own, why it stands there, and its rest."""

    name: str
    bits: Literal[4, 8] | None
    why: str
    rest: str | None = None

    @property
    def title(self) -> str:
        return self.name + (f", weights of {self.bits} bits" if self.bits else "")


CANDIDATES = (
    Candidate("full", None, "a winner of the race, with a byte of state for a weight (docs/race.md)"),
    Candidate("lite", None, "the race's lowest so far with half a byte of state for a weight (docs/race.md)"),
    Candidate("lite", 8, "level with weights of 32 bits in our run (docs/low-bit.md)"),
    Candidate("nano", 8, "next to no state, and 3 % above its weights of 32 bits in our run (docs/low-bit.md)"),
    Candidate("q-apollo-mini", 4, "half a byte a weight costs 16 % of perplexity, if nothing else fits", "adamw8bit"),
)
"""Each takes less than the one before, and ends no lower in our runs; `nano` with weights of 16 bits would take more
than `lite` with weights of 8, and ends above it. With weights of 4 bits it is no better than APOLLO-Mini."""


class Choice(NamedTuple):
    """What fits.

    Attributes:
        cfg: The run with it; its other keys are those that were given.
        title: What it is called, with the bits of its weights.
        why: One line.
        plan: Of its fullest moment.
        passed_over: Titles and plans of what is better and does not fit.
    """

    cfg: RunConfig
    title: str
    why: str
    plan: Plan
    passed_over: tuple[tuple[str, Plan], ...]


def choose(cfg: RunConfig, memory: float, plan_of: Callable[[RunConfig], Plan] = planned) -> Choice:
    """The best optimizer for a run whose weights, gradients, activations and state together may take `memory` bytes.

    >>> choice = choose(RunConfig(model=ModelConfig("llama-7b", dtype="bfloat16")), 24e9)
    >>> choice.cfg.optim.name, choice.why, choice.plan.total

    Model, batch, sequence, `train.release` and recomputation are those of `cfg`; what it says of an optimizer is left
    behind. `plan_of`: who plans, if not `planned`. Raises InputError, naming what would help, where nothing fits.
    """
    passed: list[tuple[str, Plan]] = []
    for candidate in CANDIDATES:
        kept = {"targets": cfg.optim.targets, "exclude": cfg.optim.exclude, "seed": cfg.optim.seed}
        optim = type(cfg.optim).of(name=candidate.name, rest=candidate.rest, **kept)
        one = dataclasses.replace(cfg, optim=optim, quant=dataclasses.replace(cfg.quant, bits=candidate.bits))
        plan = plan_of(one)
        if plan.total <= memory:
            return Choice(one, candidate.title, candidate.why, plan, tuple(passed))
        passed.append((candidate.title, plan))
    ways = [] if cfg.train.release else ["train.release true"]
    ways += [] if cfg.model.gradient_checkpointing else ["model.gradient_checkpointing true"]
    ways += ["a smaller train.micro_batch or data.seq_len"]
    title, least = passed[-1]
    raise InputError(
        f"nothing fits in {memory / 1e9:.1f} GB: {title}, takes {least.total / 1e9:.1f} GB. "
        f"What would help: {', '.join(ways)}"
    )


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
    choice = choose(cfg, memory, plan_of)
    free = f"a plan of {choice.plan.total / 1e9:.2f} GB where {memory / 1e9:.1f} are free"
    say(f"optimizer: {choice.title}, {free}: {choice.why}")
    return choice.cfg


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
