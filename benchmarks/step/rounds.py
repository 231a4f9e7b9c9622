"""First steps, rounds, and what else is measured of those who step the same tensors."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from apollo_optim.core.compile import can_compile
from apollo_optim.train.config import ScheduleConfig
from apollo_optim.train.measure import inner_tensors, tensor_bytes
from apollo_optim.train.schedule import factor, set_lr
from benchmarks.kit import Line, one_line
from benchmarks.step.contenders import CONTENDERS, Build, Contender
from benchmarks.step.stage import HALVES, Setting, Tensors, samples


@dataclass
class Entry:
    """A contender in a batch, and what has been measured of it."""

    name: str
    contender: Contender
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {half: [] for half in HALVES})
    found: Line = field(default_factory=dict)
    writes_gradients: bool = False

    @property
    def error(self) -> str | None:
        return self.found.get("error")

    def fail(self, error: Exception) -> None:
        """A crash is a result: it is written down, and the others go on."""
        first, *_ = str(error).strip().splitlines() or [""]
        self.found = {"error": one_line(f"{type(error).__name__}: {first}", 200)}
        self.optimizers, self.seconds = {}, {half: [] for half in HALVES}


def wait(device: torch.device) -> None:
    """Until it has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(optimizer: Optimizer, device: torch.device) -> float:
    """Seconds of one step."""
    wait(device)
    start = time.perf_counter()
    optimizer.step()
    wait(device)
    return time.perf_counter() - start


def graphs() -> int:
    """How many graphs torch.compile has compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def first_step(entry: Entry, tensors: Tensors, setting: Setting) -> None:
    """Build both halves and step once: state and compiled functions are there afterwards."""
    weights, gradients, compiled = samples(tensors.all), samples(tensors.gradients), graphs()
    for sample in weights:
        sample.zero_()  # where any step can be seen: elsewhere bf16 would round small ones away
    as_given = [sample.clone() for sample in gradients]
    rank = entry.contender.rank or setting.rank
    wait(setting.device)
    start = time.perf_counter()
    for half in HALVES:
        build: Build = getattr(entry.contender.halves, half)
        entry.optimizers[half] = build(tensors.halves[half], rank)
        entry.optimizers[half].step()
    wait(setting.device)
    entry.found["first_step"] = time.perf_counter() - start
    entry.found["graphs"] = graphs() - compiled
    entry.found["untouched"] = sum(not bool(sample.any()) for sample in weights)
    entry.writes_gradients = not all(map(torch.equal, as_given, gradients))
    entry.found["writes_gradients"] = entry.writes_gradients
    if entry.writes_gradients:
        tensors.fill_gradients()
    entry.found["knobs"] = knobs_of(entry.optimizers["matrices"])
    for half, optimizer in entry.optimizers.items():
        kept, projections = state_bytes(optimizer)
        reads = entry.contender.reads[HALVES.index(half)]
        weight = tensors.bytes_of(half)
        entry.found.setdefault("state_bytes", {})[half] = kept + projections
        entry.found.setdefault("floor_bytes", {})[half] = (reads + 2) * weight + 2 * kept + projections


def knobs_of(optimizer: Optimizer) -> Line:
    """The keys of its first group, as JSON has them."""
    group = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "param_names")}
    return {
        key: value if isinstance(value, (int, float, str, type(None))) else str(value) for key, value in group.items()
    }


def state_bytes(optimizer: Optimizer) -> tuple[int, int]:
    """Bytes of the tensors in the state, and of those in objects there: projections, which a step only reads."""
    kept: dict[int, Tensor] = {}
    held: dict[int, Tensor] = {}
    for state in optimizer.state.values():
        for value in state.values():
            objects = not isinstance(value, Tensor) and hasattr(value, "__dict__")
            for t in inner_tensors(vars(value) if objects else value):
                (held if objects else kept)[id(t)] = t
    return tensor_bytes(kept.values()), tensor_bytes(held.values())


def one_round(entries: Sequence[Entry], number: int, tensors: Tensors, device: torch.device, *, keep: bool) -> None:
    """Everybody steps once."""
    standing = [entry for entry in entries if not entry.error]
    turn = number % len(standing) if standing else 0
    for entry in standing[turn:] + standing[:turn]:
        try:
            seconds = {half: timed(optimizer, device) for half, optimizer in entry.optimizers.items()}
        except Exception as error:  # whatever a peer raises
            entry.fail(error)
            continue
        finally:
            if entry.writes_gradients:
                tensors.fill_gradients()
        if keep:
            for half in HALVES:
                entry.seconds[half].append(seconds[half])


def extra_bytes(optimizer: Optimizer, device: torch.device) -> int:
    """The most that one step has allocated at once, beyond what was there before it."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        optimizer.step()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        optimizer.step()
    found = watched.profiler
    assert found is not None
    assert found.kineto_results is not None
    events = [(e.start_ns(), e.nbytes()) for e in found.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return most


def run_batch(names: Sequence[str], setting: Setting, warmup: int, rounds: int) -> list[Entry]:
    """The protocol for contenders that fit together."""
    entries = [Entry(name, CONTENDERS[name]) for name in names]
    tensors = Tensors(setting)
    torch._dynamo.reset()
    can_compile(setting.device.type)  # loads the compiler, which is nobody's first step
    gc.collect()
    gc.disable()
    try:
        for entry in entries:
            print(f"  {entry.name}: first step", flush=True)
            try:
                first_step(entry, tensors, setting)
            except Exception as error:  # whatever a peer raises
                entry.fail(error)
                tensors.fill_gradients()
                print(f"  {entry.name}: {entry.error}", flush=True)
        for number in range(warmup + rounds):
            one_round(entries, number, tensors, setting.device, keep=number >= warmup)
    finally:
        gc.enable()
    for entry in (entry for entry in entries if not entry.error):
        try:
            extra = {half: extra_bytes(optimizer, setting.device) for half, optimizer in entry.optimizers.items()}
        except Exception as error:
            entry.fail(error)
        else:
            entry.found["extra_bytes"] = extra
        if entry.writes_gradients:
            tensors.fill_gradients()
    largest = {half: max(tensor_bytes([p]) for p in tensors.halves[half]) for half in HALVES}
    finite = all(bool(p.isfinite().all()) for p in tensors.all)
    for entry in entries:
        if not entry.error:
            entry.found |= {"largest_bytes": largest, "finite": finite, "seconds": entry.seconds}
    return entries


def schedule(name: str, setting: Setting, steps: int) -> Line:
    """Graphs compiled by the first step, and by all later ones of a run with warm-up and cosine."""
    torch._dynamo.reset()
    can_compile(setting.device.type)
    entry, tensors, cosine = Entry(name, CONTENDERS[name]), Tensors(setting), ScheduleConfig()
    try:
        first_step(entry, tensors, setting)
        before = graphs()
        for step in range(2, steps + 1) if entry.found["graphs"] else ():
            for optimizer in entry.optimizers.values():
                set_lr(optimizer, factor(step, steps, cosine))
                optimizer.step()
    except Exception as error:  # whatever a peer raises
        entry.fail(error)
        return {"steps": steps, **entry.found}
    return {"steps": steps, "graphs": entry.found["graphs"], "recompiled": graphs() - before}


@contextlib.contextmanager
def empty_compiler_cache() -> Iterator[None]:
    """What was compiled yesterday must be compiled again: the first step is timed."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        yield
