"""One process of several that writes down what it really sends, for `test_traffic.py`."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from apollo_optim.core.collectives import Collective, Counter
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.parallel.world import World
from apollo_optim.train.config import load_config
from apollo_optim.train.pretrain import pretrain
from apollo_optim.train.step import TrainStep
from benchmarks.collectives import counted, line_of, optimizer_of, sharded_model, with_gradients
from benchmarks.processes import meet

CPU = torch.profiler.ProfilerActivity.CPU
PARTS = ("weights", "optimizer", "loop")


class Steps:
    """The collectives of each step of a run, by who asks for them."""

    def __init__(self) -> None:
        self.found: list[dict[str, list[Collective]]] = []
        self._counter: Counter | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self.found.append({part: [] for part in PARTS})
        with Counter() as self._counter:
            yield
        self.found[-1]["weights"] = self._counter.sent
        self._counter = None

    @contextlib.contextmanager
    def asked_by(self, part: str) -> Iterator[None]:
        """Within a step: what is sent here is not the model's."""
        first = len(self._counter.sent) if self._counter else 0
        yield
        if self._counter:
            self.found[-1][part] += self._counter.sent[first:]
            del self._counter.sent[first:]


def within(context: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return wrapped


def work(
    rank: int, size: int, port: int, files: Sequence[Path], rules: Sequence[str], layers: int, out: Path | None
) -> None:
    """The first process writes `FILE.json`, what each step of a run sent, and into `out` what one of each rule did."""
    meet(rank, size, port)
    found = {rule: counted(rule, layers) for rule in rules}
    if rank == 0 and out is not None:
        out.write_text(json.dumps(found))
    steps = Steps()
    TrainStep.learn = within(steps.step, TrainStep.learn)  # type: ignore[method-assign]
    for owner, name, part in (
        (RuleOptimizer, "_take", "optimizer"),
        (TrainStep, "clip_gradients", "loop"),
        (World, "total", "loop"),
    ):
        setattr(owner, name, within(functools.partial(steps.asked_by, part), getattr(owner, name)))
    for file in files:
        steps.found = []
        pretrain(load_config(file))
        if rank == 0:
            lines = [{part: line_of(sent) for part, sent in step.items()} for step in steps.found]
            file.with_suffix(".json").write_text(json.dumps(lines))
    torch.distributed.destroy_process_group()


def compiled(rank: int, size: int, port: int, rules: Sequence[str], layers: int, out: Path) -> None:
    """The second compiled step of rule after rule, seen by a profiler: a hook would keep it from being compiled."""
    meet(rank, size, port)
    found = {}
    for rule in rules:
        model = sharded_model(layers)
        optimizer = optimizer_of(model, rule, compile=True)
        with_gradients(model)
        optimizer.step()
        with_gradients(model)
        threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        with torch.profiler.profile(activities=[CPU], record_shapes=True, experimental_config=threads) as profile:
            optimizer.step()
        found[rule] = line_of(list(profiled(profile, size)))
    if rank == 0:
        out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def profiled(profile: torch.profiler.profile, size: int) -> Iterator[Collective]:
    """All numbers are of fp32."""
    for event in profile.profiler.kineto_results.events():
        namespace, _, kind = event.name().partition("::")
        if namespace == "_c10d_functional" and not kind.startswith(("wait", "_wrap")):
            entries = math.prod(event.shapes()[0])
            yield Collective(kind, 4 * entries * (size if kind.startswith("all_gather") else 1))
