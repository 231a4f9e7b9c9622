"""One run, through `pretrain`, and what is measured of it.

What `pretrain` does not say - the bytes of state of each group, the time inside the optimizer's step - is seen through
torch's own hooks on every optimizer's step, so that nothing here depends on how the optimizer is made.
"""

import contextlib
import math
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from apollo_optim.core.errors import InputError
from apollo_optim.report import read_events
from apollo_optim.train.failures import Interrupted, TrainingFailed
from apollo_optim.train.measure import hardware, tensor_bytes
from apollo_optim.train.pretrain import pretrain
from benchmarks import kit
from benchmarks.race.agenda import Row
from benchmarks.race.methods import METHODS, Method
from benchmarks.race.protocol import HOPELESS, SEQ_LEN, SETTINGS, Trial, config_of, fingerprint


class Hopeless(Exception):
    """A search run that is too far behind to be worth its second half."""


@dataclass
class Watch:
    """What is seen of a run from its optimizer's step."""

    log: Path
    half: int
    """The step after which a hopeless run is stopped."""
    bar: float = math.inf
    """The training loss half way above which it is hopeless."""
    deadline: float = math.inf
    """`time.monotonic()` at which the run is saved and left for later."""
    state: dict[str, int] = field(default_factory=dict)
    """Bytes of optimizer state, by group."""
    walls: list[float] = field(default_factory=list)
    """When each step ended."""
    inside: list[float] = field(default_factory=list)
    """Seconds of each step inside the optimizer."""
    cpu: float = 0.0
    """Processor seconds at the end of the first step."""
    judged: bool = False
    corpus: str | None = None
    """The text that it must be, by its hash; None: the first run on it."""

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._entered = time.perf_counter()

    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        now = time.perf_counter()
        self.inside.append(now - self._entered)
        self.walls.append(now)
        if not self.state:
            self.state, self.cpu = state_bytes(optimizer), time.process_time()
            self.same_text()
        if time.monotonic() > self.deadline:
            signal.raise_signal(signal.SIGTERM)  # `pretrain` finishes the step, saves, and raises Interrupted
        if self.bar < math.inf and not self.judged:
            self.judge()

    def same_text(self) -> None:
        """Raises InputError where the text is not the other lines'."""
        read = events(self.log, "start")[-1]["corpus"]["sha256"]
        if self.corpus not in (None, read):
            raise InputError(
                f"the text that was read here is {read[:12]}..., that of the lines {str(self.corpus)[:12]}...: use the "
                "environment of constraints.txt that they were made in (`packages` reads what is installed), or new "
                "--results"
            )

    def judge(self) -> None:
        """Raises Hopeless where half of the run is over, at a loss above the bar."""
        loss = half_loss(self.log, self.half)
        if loss is not None:
            self.judged = True
            if not loss <= self.bar:
                raise Hopeless(f"training loss {loss:.3f} half way, the best run's {self.bar - HOPELESS:.3f}")

    def timing(self) -> dict[str, float | None]:
        """Seconds a step: median by the clock, mean of processor time, median inside the optimizer."""
        steps = len(self.walls) - 1
        if steps < 1:
            return {"step_wall": None, "step_cpu": None, "step_optimizer": None}
        return {
            "step_wall": statistics.median(b - a for a, b in zip(self.walls, self.walls[1:], strict=False)),
            "step_cpu": (time.process_time() - self.cpu) / steps,
            "step_optimizer": statistics.median(self.inside[1:]),
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While a run runs."""
        hooks = register_optimizer_step_pre_hook(self.before), register_optimizer_step_post_hook(self.after)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def state_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that stay between two steps, by the name of the group."""
    from torch.utils._pytree import tree_leaves

    sizes = {}
    for number, group in enumerate(optimizer.param_groups):
        leaves = tree_leaves([optimizer.state[p] for p in group["params"] if p in optimizer.state])
        sizes[group.get("name", str(number))] = tensor_bytes(t for t in leaves if isinstance(t, torch.Tensor))
    return sizes


def events(log: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's log."""
    return [event for event in read_events(log) if event["event"] == kind] if log.exists() else []


def half_loss(log: Path, half: int) -> float | None:
    """Mean training loss of the three records up to `half`, once that step is over; None before.

    All search runs of a method see the same text in the same order, so two of these differ by the rates alone.
    """
    steps = events(log, "step")
    if not steps or steps[-1]["step"] < half:
        return None
    losses = [record["loss"] for record in steps if record["step"] <= half][-3:]
    return statistics.mean(math.inf if loss is None else loss for loss in losses)


def run(
    trial: Trial,
    work: Path,
    *,
    rows: Mapping[Trial, Row],
    deadline: float = math.inf,
    methods: Mapping[str, Method] = METHODS,
) -> Row:
    """Run a trial, or go on with what a killed process left of it, and make its line.

    Args:
        work: The run directory is `work/<the trial's name>`; it stays until the line is written.
        rows: What is done: the text must be the same, and a search run is measured against its method's others.
        deadline: Of `time.monotonic()`, when the run is saved and left.

    Raises Interrupted at the deadline and on SIGTERM or Ctrl-C; InputError for what the configuration has wrong.
    """
    out = work / trial.name
    log = out / "metrics.jsonl"
    resume = (out / "config.yaml").exists()
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    half = trial.steps // 2
    watch = Watch(log, half, bar_of(trial, rows), deadline, corpus=corpus_of(trial, rows))
    began, result, ended = time.time(), None, "finished"
    try:
        with watch.watching():
            result = pretrain(config_of(trial, str(out), methods), resume=resume)
    except TrainingFailed as error:
        ended = f"failed: {error}"
    except Hopeless as error:
        ended = f"stopped: {error}"
    start = events(log, "start")[-1]
    memory = events(log, "memory")
    steps = events(log, "step")
    seconds = steps[-1]["seconds"] if steps else 0.0  # of training, earlier processes' included
    quality = ("loss", "perplexity", "perplexity_reference", "bits_per_byte")
    return {
        **asdict(trial),
        "fingerprint": fingerprint(trial, methods),
        "keys": dict(methods[trial.method].keys),
        "model": SETTINGS[trial.setting].model,
        "batch_tokens": SETTINGS[trial.setting].batch * SEQ_LEN,
        "ended": ended.replace(f"{work}{os.sep}", ""),  # where the work folder lies is nobody's business
        **{key: None if result is None else getattr(result, key) for key in quality},
        "half_loss": half_loss(log, half),
        "tokens": steps[-1]["tokens"] if steps else 0,
        "state": watch.state,
        "state_total": memory[-1]["optimizer"] if memory else None,
        "seconds": seconds,
        "wall": max(time.time() - began, seconds),
        "tokens_per_s": steps[-1]["tokens"] / seconds if steps else None,
        **watch.timing(),
        "resumed": resume,
        "corpus": start["corpus"]["sha256"],
        "tokenizer": start["corpus"]["tokenizer"],
        "versions": start["versions"],
        "hardware": hardware(torch.device("cpu")) | {"capability": torch.backends.cpu.get_cpu_capability()},
        "commit": kit.commit(),
        "tree": tree(),
        "time": began,
    }


def bar_of(trial: Trial, rows: Mapping[Trial, Row]) -> float:
    """The training loss half way above which a search run is hopeless; infinite for a final one."""
    same = [
        row["half_loss"]
        for other, row in rows.items()
        if (other.setting, other.method, other.search) == (trial.setting, trial.method, True)
        and row["ended"] == "finished"
        and row["half_loss"] is not None  # infinite
    ]
    return min(same) + HOPELESS if trial.search and same else math.inf


def corpus_of(trial: Trial, rows: Mapping[Trial, Row]) -> str | None:
    """The hash of the text that the lines of this source were made on."""
    source = SETTINGS[trial.setting].source
    return next((row["corpus"] for other, row in rows.items() if SETTINGS[other.setting].source == source), None)


def tree() -> str | None:
    """Git's hash of the package's files as they are committed: the same in every history. None without git."""
    try:
        words = ["git", "-C", str(kit.ROOT), "rev-parse", "HEAD:apollo_optim"]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


__all__ = ["Interrupted", "Watch", "run"]
