"""The time of a step: ours, the installed peers and torch's fused AdamW, interleaved in one process.

    apollo-optim bench step --sizes llama-350m
    apollo-optim bench step --sizes llama-60m --layers 2 --rounds 5 --contenders apollo-mini apollo-torch-mini
    apollo-optim bench step --table

The protocol:

1. The parameters of a LLaMA of that size, random weights and gradients, shared by everybody: each contender steps the
   same tensors, with a state of its own, through two optimizers, one of the matrices (attention and MLP) and one of the
   rest (embedding, head, norms). Everything included is the sum of both.
2. First steps, one contender after the other, compilation included and from an empty compiler cache. Every parameter
   must have moved afterwards.
3. Rounds. In each one everybody steps once, and the first of a round is the second of the one before's. The first
   `--warmup` rounds are thrown away. What does not fit in memory at once runs in batches, each with a fused AdamW of
   its own.
4. A figure is the median over the rounds; the ratio to fused AdamW is also taken round by round, in pairs. Quartiles
   say how much to believe.
5. One more step of each is profiled for the memory that it allocates beyond weights, gradients and state.
6. `--schedule-steps` steps of a small model with a cosine learning rate: how many graphs are compiled after the first.

The byte floor is what a step has to move: the gradient as often as the rule must read it, the weight read and written,
the tensors of the state read and written (projections: read). Beside it stands AdamW's.

Not seen: steps that draw a new projection (one in 200; a first step is one), scratch memory inside single kernels,
memory that a library takes past torch's allocator, and the cache: tensors that fit into it move fewer bytes.

Everything goes into `OUT/steps.jsonl`, a line for each contender, size and dtype with all of its times; `OUT/table.md`
and `OUT/steps.png` are made of its newest lines, `--table` makes them again. Exit code 1 if one of ours crashed,
recompiled or left a parameter where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from apollo_optim.bench.contenders import BASELINE, CONTENDERS, Build, Contender
from apollo_optim.bench.step_table import HALVES, SHORT, Row, draw, read_log, table, write_log
from apollo_optim.core.compile import can_compile
from apollo_optim.core.errors import InputError
from apollo_optim.optim.groups import param_groups
from apollo_optim.train import measure
from apollo_optim.train.config import ModelConfig, ScheduleConfig
from apollo_optim.train.models import DTYPES, SIZES, skeleton
from apollo_optim.train.schedule import factor, set_lr

SAMPLE = 4096  # entries of each tensor that are looked at to see whether a step has written there
SCHEDULE_SIZE = "llama-1m"  # graphs are counted by shape, so a small one says as much


@dataclass(frozen=True)
class Setting:
    """What is stepped."""

    size: str
    dtype: Literal["float32", "bfloat16"]
    layers: int | None
    """The model is cut to so many layers; None: it is whole."""
    rank: int
    device: torch.device

    @property
    def cut(self) -> str:
        whole = SIZES[self.size].layers
        return "" if self.layers in (None, whole) else f"cut to {self.layers} of {whole} layers"


class Tensors:
    """The parameters of a model, with gradients, on the device."""

    def __init__(self, setting: Setting) -> None:
        changes = {"num_hidden_layers": setting.layers} if setting.layers else {}
        model = skeleton(ModelConfig(setting.size, dtype=setting.dtype, config=changes))
        noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(setting.device, DTYPES[setting.dtype])
        self.halves: dict[str, list[Parameter]] = {half: [] for half in HALVES}
        for group in param_groups(model, rank=1):
            half = "matrices" if group["name"].startswith("matrices") else "rest"
            for bare in group["params"]:
                p = Parameter(torch.empty_like(bare, device=setting.device))
                p.grad = torch.empty_like(p)
                self.halves[half].append(p)
        for i, p in enumerate(self.all):
            self.fill(p.detach(), i, 0.02)
        self.fill_gradients()

    @property
    def all(self) -> list[Parameter]:
        return [p for half in HALVES for p in self.halves[half]]

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.all if p.grad is not None]

    def fill_gradients(self) -> None:
        for i, grad in enumerate(self.gradients):
            self.fill(grad, -1 - i, 1e-3)

    def fill(self, t: Tensor, shift: int, size: float) -> None:
        """Noise, the same each time, at the speed of a copy."""
        noise = self.noise.roll(shift * 7919) * size
        for part in torch.split(t.view(-1), noise.numel()):
            part.copy_(noise[: part.numel()])

    def bytes_of(self, half: str) -> int:
        return measure.tensor_bytes(self.halves[half])


def samples(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The first entries of each: views."""
    return [t.detach().view(-1)[:SAMPLE] for t in tensors]


@dataclass
class Entry:
    """A contender in a batch, and what has been measured of it."""

    name: str
    contender: Contender
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {half: [] for half in HALVES})
    found: Row = field(default_factory=dict)
    writes_gradients: bool = False

    @property
    def error(self) -> str | None:
        return self.found.get("error")

    def fail(self, error: Exception) -> None:
        """A crash is a result: it is written down, and the others go on."""
        lines = str(error).strip().splitlines() or [""]
        self.found = {"error": f"{type(error).__name__}: {lines[0]}"[:200]}
        self.optimizers, self.seconds = {}, {half: [] for half in HALVES}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(optimizer: Optimizer, device: torch.device) -> float:
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


def knobs_of(optimizer: Optimizer) -> Row:
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
            for t in measure.inner_tensors(vars(value) if objects else value):
                (held if objects else kept)[id(t)] = t
    return measure.tensor_bytes(kept.values()), measure.tensor_bytes(held.values())


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


class Needs(NamedTuple):
    shared: int
    """Bytes of weights, gradients and temporaries, which all contenders have in common."""
    own: dict[str, int]
    """Bytes of state for each contender; an upper bound."""


def needs(setting: Setting, names: Sequence[str]) -> Needs:
    """Estimated on the meta device, before anything is allocated."""
    meta = Tensors(Setting(setting.size, setting.dtype, setting.layers, setting.rank, torch.device("meta")))
    entries = {half: sum(p.numel() for p in meta.halves[half]) for half in HALVES}
    hidden = SIZES[setting.size].hidden

    def own(c: Contender) -> int:
        kept = c.keeps if c.rank is None else 3 * (c.rank or setting.rank) / hidden  # two moments and a projection
        return int(4 * (2 * entries["rest"] + kept * entries["matrices"]))

    temporaries = 3 * 4 * max(p.numel() for p in meta.all)
    shared = 2 * sum(map(meta.bytes_of, HALVES)) + temporaries
    return Needs(shared, {name: own(CONTENDERS[name]) for name in names})


def available(device: torch.device) -> float:
    """Bytes that are free, 90 % of them; infinite where the system does not say."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as info:
            return 0.9 * next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable:"))
    except OSError:
        return math.inf  # not Linux


def in_batches(names: Sequence[str], need: Needs, limit: float) -> tuple[list[list[str]], dict[str, str]]:
    """Contenders that fit in memory together, each batch with the baseline first; and why the others run not at all."""
    base = need.shared + need.own[BASELINE]
    batches: list[list[str]] = []
    refused: dict[str, str] = {}
    free = -1.0
    for name in names:
        own = need.own[name] if name != BASELINE else 0
        if base + own > limit:
            refused[name] = f"does not fit: needs {(base + own) / 1e9:.1f} GB, there are {limit / 1e9:.1f}"
            continue
        if own > free:
            batches.append([BASELINE])
            free = limit - base
        if name != BASELINE:
            batches[-1].append(name)
            free -= own
    return batches, refused


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
    largest = {half: max(measure.tensor_bytes([p]) for p in tensors.halves[half]) for half in HALVES}
    finite = all(bool(p.isfinite().all()) for p in tensors.all)
    for entry in entries:
        if not entry.error:
            entry.found |= {"largest_bytes": largest, "finite": finite, "seconds": entry.seconds}
    return entries


def schedule(name: str, setting: Setting, steps: int) -> Row:
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


def describe(name: str, setting: Setting) -> Row:
    """What a line of the log says of the contender, the model and the machine."""
    contender, versions = CONTENDERS[name], measure.versions()
    if contender.package not in ("torch", "apollo-optim"):
        versions[contender.package] = None if contender.missing() else version(contender.package)
    return {
        "contender": name,
        "size": setting.size,
        "dtype": setting.dtype,
        "cut": setting.cut,
        "rank": None if contender.rank is None else contender.rank or setting.rank,
        "versions": versions,
        "hardware": measure.hardware(setting.device),
    }


# --- the command line ---


def rank_for(size: str, rank: int) -> int:
    """The rank of the run, or a quarter of a small side that is no larger."""
    small = SIZES[size].hidden
    return rank if rank < small else small // 4


def measure_steps(setting: Setting, names: Sequence[str], args: argparse.Namespace, log: Path) -> None:
    """All contenders on one model: the lines of the log are written batch by batch."""
    limit = args.memory * 1e9 if args.memory else available(setting.device)
    chosen = [name for name in names if setting.dtype in CONTENDERS[name].dtypes]
    absent = {name: "not installed" for name in chosen if CONTENDERS[name].missing()}
    need = needs(setting, [BASELINE, *chosen])
    batches, refused = in_batches([name for name in chosen if name not in absent], need, limit)
    for name, error in (absent | refused).items():
        write_log(log, [{"kind": "step", "batch": None, **describe(name, setting), "error": error}])
    for number, batch in enumerate(batches, 1):
        print(f"{setting.size} {SHORT[setting.dtype]} {setting.cut}: batch {number} of {len(batches)}", flush=True)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S") + f"-{time.time_ns() % 10**9:09d}"
        entries = run_batch(batch, setting, args.warmup, args.rounds)
        common = {"batch": stamp, "rounds": args.rounds, "warmup": args.warmup, "load": os.getloadavg()[0]}
        write_log(log, [{"kind": "step", **describe(e.name, setting), **common, **e.found} for e in entries])
        del entries
        gc.collect()


def at_fault(rows: Sequence[Row]) -> list[str]:
    """What must not happen to ours, one line each."""
    lines = []
    for row in rows:
        c = CONTENDERS[row["contender"]]
        if c.package != "apollo-optim":
            continue
        where = f"{row['contender']}, {row['size']} {SHORT[row['dtype']]}"
        if "error" in row and not row["error"].startswith("does not fit"):
            lines.append(f"{where}: {row['error']}")
        if row.get("recompiled"):
            lines.append(f"{where}: {row['recompiled']} graphs compiled after the first step of a schedule")
        if row.get("untouched"):
            lines.append(f"{where}: {row['untouched']} parameters left as they were")
    return lines


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        "apollo-optim bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ["llama-60m", "llama-130m", "llama-350m", "llama-1b"]
    words.add_argument("--out", type=Path, default=Path("results/step"), help="where log, table and chart are kept")
    words.add_argument("--sizes", nargs="+", default=sizes, choices=list(SIZES), metavar="SIZE", help=", ".join(SIZES))
    words.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), metavar="DTYPE")
    words.add_argument(
        "--contenders",
        nargs="+",
        default=list(CONTENDERS),
        choices=list(CONTENDERS),
        metavar="NAME",
        help=f"{BASELINE} always steps, too; of {', '.join(CONTENDERS)}",
    )
    words.add_argument("--rank", type=int, default=256, help="of APOLLO, GaLore and Fira; not of APOLLO-Mini")
    words.add_argument("--rounds", type=int, default=20, help="measured rounds")
    words.add_argument("--warmup", type=int, default=3, help="rounds before them, after the first step")
    words.add_argument("--threads", type=int, help="of torch; its default")
    words.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    words.add_argument("--memory", type=float, help="GB that may be used; 90 %% of what is free")
    words.add_argument("--layers", type=int, help="cut the models to so many layers, for a quick look")
    words.add_argument("--schedule-steps", type=int, default=1000, help="of the search for recompilations; 0: none")
    words.add_argument("--table", action="store_true", help="measure nothing, make table and chart of the log")
    return words


def check(args: argparse.Namespace) -> None:
    for name, least in (
        ("rounds", 2),
        ("warmup", 0),
        ("rank", 1),
        ("layers", 1),
        ("threads", 1),
        ("schedule_steps", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: it must be at least {least}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: torch finds no CUDA device here; leave it out for the CPU")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = parser().parse_args(argv)
    log = args.out / "steps.jsonl"
    faults: list[str] = []
    if not args.table:
        check(args)
        args.out.mkdir(parents=True, exist_ok=True)
        before = len(read_log(log)) if log.exists() else 0
        threads, device = torch.get_num_threads(), torch.device(args.device)
        torch.set_num_threads(args.threads or threads)
        try:
            with empty_compiler_cache():
                measure_all(args, device, log)
        finally:
            torch.set_num_threads(threads)
        faults = at_fault(read_log(log)[before:])
    rows = read_log(log)
    text = table(rows)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    draw(rows, args.out / "steps.png")
    print(text, end="")
    for line in faults:
        print(f"error: {line}", file=sys.stderr)
    return 1 if faults else 0


def measure_all(args: argparse.Namespace, device: torch.device, log: Path) -> None:
    for dtype in args.dtypes if args.schedule_steps else ():
        setting = Setting(SCHEDULE_SIZE, dtype, None, rank_for(SCHEDULE_SIZE, args.rank), device)
        for name in args.contenders:
            if dtype in CONTENDERS[name].dtypes and not CONTENDERS[name].missing():
                found = schedule(name, setting, args.schedule_steps)
                write_log(log, [{"kind": "schedule", **describe(name, setting), **found}])
                print(f"schedule, {SHORT[dtype]}: {name}: {found}", flush=True)
    for size in args.sizes:
        for dtype in args.dtypes:
            setting = Setting(size, dtype, args.layers, rank_for(size, args.rank), device)
            measure_steps(setting, args.contenders, args, log)


if __name__ == "__main__":
    sys.exit(main())
