"""Is it the same optimizer on the device? Every registered one, eager, beside the CPU's numbers; and the goldens.

The difference of two runs is ||device - cpu|| / ||cpu - start||, the largest of all parameters: by how much the two
have parted, in units of the way they went. bf16 and low-bit weights are rounded stochastically with the same bits on
both sides, so they part where the numbers before the rounding differ in their last place and that place decides.
"""

from __future__ import annotations

import contextlib
import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from apollo_optim import Recipe, build_optimizer, list_optimizers, quantize_weights, release
from apollo_optim.core.random import dither, hash32, normal_pairs, signs, uniform
from apollo_optim.core.rounding import round_stochastically
from benchmarks.cases import Running
from benchmarks.gpu.device import open_device, wait
from benchmarks.kit import ROOT, Line, one_line

LIMITS = {"float32": 1e-3, "bfloat16": 2e-2, "low-bit": 5e-2}
"""The difference that is still the same optimizer."""
DECOMPOSED = 1e-2
"""And of rules with singular vectors, which every device's library finds by its own way (fp32)."""
BY_VECTORS = ("apollo-svd", "galore", "fira")
SMALL = 4096  # entries
KEY = (123456789, -987654321)
GOLDEN = [61553638, -60433231, -1008713568, 912257769]
"""hash32(0 .. 3, KEY): part of a file format, see `apollo_optim.core.random`."""


# --- the hash and the rounding ---


def golden(case: Running) -> None:
    """Bit for bit the CPU's, and the ones that are written down."""
    device = open_device(case.config["device"])
    cpu = torch.device("cpu")
    known = hash32(torch.arange(4), KEY).tolist(), hash32(torch.arange(4, device=device), KEY).tolist()
    same = known == (GOLDEN, GOLDEN)
    case.write(what="golden hash", status="ok" if same else "differs", equal=same, found=known[1])
    for name, here, there in ((name, draws(cpu)[name], draws(device)[name].cpu()) for name in draws(cpu)):
        equal = torch.equal(here, there)
        part = float((here.double() - there.double()).abs().max())
        bitwise = name != "normal"  # a device's own logarithm and cosine
        status = "ok" if equal or (not bitwise and part < 1e-5) else "differs"
        case.write(what=name, status=status, equal=equal, largest_difference=part)


def draws(device: torch.device) -> dict[str, Tensor]:
    """Some of everything that is drawn, and values rounded with it, on this device."""
    index = torch.arange(1 << 16, device=device) * 65_537  # beyond 2^32, too
    rows, columns = (torch.arange(size, dtype=torch.int32, device=device) for size in (257, 513))
    value = torch.arange(257 * 513, dtype=torch.float32, device=device).view(257, 513)
    value = (value - 65_000.0) * 2.0**-13
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42, 3.4e38], device=device)
    value[0, : len(special)] = special
    noise = dither(rows, columns, KEY)
    return {
        "hash32": hash32(index, KEY),
        "hash32 of int32": hash32(index.to(torch.int32) & 0x7FFFFFFF, KEY),
        "signs": signs(index, KEY),
        "uniform": uniform(index, KEY),
        "dither": noise.uniform(),
        "round_stochastically": bits(round_stochastically(value, noise)),
        "normal": torch.stack(normal_pairs(index[: 1 << 12], KEY)),
    }


def bits(rounded: Tensor) -> Tensor:
    """Of numbers rounded to bf16; which NaN it is, a device may choose."""
    return torch.where(rounded.isnan(), 0, rounded.to(torch.bfloat16).view(torch.int16))


# --- every optimizer ---


class Shapes(nn.Module):
    """Tall, wide, square, uneven, a bias, a convolution, a stack of matrices, an embedding, a head, a scalar."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.tall, self.mlp.wide = nn.Linear(width, 3 * width), nn.Linear(3 * width, width, bias=False)
        self.mlp.square, self.mlp.uneven = nn.Linear(width, width), nn.Linear(width, 2 * width + 5)
        self.mlp.conv = nn.Conv1d(width, width + 8, 3)
        self.mlp.experts = nn.Parameter(torch.randn(3, width, 2 * width) / width**0.5)
        self.embedding, self.norm = nn.Embedding(5 * width + 3, width), nn.LayerNorm(width)
        self.gain = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(width, 5 * width + 3, bias=False)


class Perceptron(nn.Module):
    """What has a backward, and nothing in it whose order of sums may change from run to run."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out.float().square().mean()


def eager(case: Running) -> None:
    """Every optimizer with every kind of weights: its numbers, then whether it waits for the device."""
    device = open_device(case.config["device"])
    width, steps = case.config["width"], case.config["steps"]
    for info, kind in kinds():
        torch.manual_seed(0)
        start = prepared(Shapes(width), info, kind)
        about = {"optimizer": info.name, "weights": kind}
        with case.attempt(what="numbers", **about) as line:
            line.update(numbers(info, kind, start, device, steps))
        with case.attempt(what="release", **about) as line:
            line.update(inside_backward(info, kind, device, width))
        if device.type == "cuda":
            with case.attempt(what="no sync", **about) as line:
                line.update(no_sync(info, start, device))


def kinds() -> Iterator[tuple[Recipe, str]]:
    """(optimizer, kind of weights), the second one of LIMITS; those for low-bit weights have no other."""
    for info in list_optimizers():
        for kind in ("bfloat16", "float32") if info.bits is None else ("low-bit",):
            yield info, kind


def prepared(model: nn.Module, info: Recipe, kind: str) -> nn.Module:
    """The model in these weights."""
    model = model.to(torch.float32 if kind == "float32" else torch.bfloat16)
    if info.bits is not None:
        quantize_weights(model, info.bits, targets="mlp")
    return model


def made(info: Recipe, model: nn.Module, compile: bool | None = False) -> torch.optim.Optimizer:
    """The optimizer as registered, for the matrices of `mlp`."""
    return build_optimizer(info.name, model, targets="mlp", compile=compile)


def set_gradients(model: nn.Module, step: int, device: torch.device) -> None:
    """Drawn on the CPU, from the number of the step."""
    draw = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw).to(device, p.dtype)


def plain(model: nn.Module) -> dict[str, Tensor]:
    """The weights as floats, on the CPU; low-bit ones are read."""
    return {name: (p.detach() + 0).float().cpu() for name, p in model.named_parameters()}


def parted(here: dict[str, Tensor], there: dict[str, Tensor], start: dict[str, Tensor]) -> Line:
    """By how much two runs from the same start differ: the worst parameter, and the share of unequal entries.

    Small parameters are one: a vector differs in nothing but one bf16 that was rounded the other way, a scalar may stay
    where it is for many steps.
    """
    small = [name for name in here if here[name].numel() < SMALL]
    members = {name: [name] for name in here if name not in small} | ({"small ones": small} if small else {})
    ways = {name: distance(here, start, some) for name, some in members.items()}
    gaps = {name: distance(here, there, some) / max(ways[name], 1e-30) for name, some in members.items()}
    worst = max(gaps, key=lambda name: math.inf if math.isnan(gaps[name]) else gaps[name])
    unequal = sum(int((here[name] != there[name]).sum()) for name in here)
    share = unequal / sum(t.numel() for t in here.values())
    still = [name for name, way in ways.items() if way == 0.0]
    return {"difference": gaps[worst], "worst": worst, "unequal": share, "not_moved": still}


def distance(here: dict[str, Tensor], there: dict[str, Tensor], names: list[str]) -> float:
    """Of these parameters together: the norm of all differences."""
    return math.sqrt(sum(float((here[name] - there[name]).square().sum()) for name in names))


def judged(line: Line, limit: float) -> Line:
    """With a status: too far apart (NaN is), or a parameter that no step has moved."""
    near = line["difference"] <= limit and not line.get("not_moved")
    return {**line, "limit": limit, "status": "ok" if near else "differs"}


def numbers(info: Recipe, kind: str, start: nn.Module, device: torch.device, steps: int) -> Line:
    """So many steps on the device against the same on the CPU."""
    after = []
    for where in (torch.device("cpu"), device):
        model = copy.deepcopy(start).to(where)
        optimizer = made(info, model)
        for step in range(steps):
            set_gradients(model, step, where)
            optimizer.step()
        after.append(plain(model))
    limit = max(LIMITS[kind], DECOMPOSED if info.name in BY_VECTORS else 0.0)
    return judged(parted(after[0], after[1], plain(start)), limit)


def inside_backward(info: Recipe, kind: str, device: torch.device, width: int) -> Line:
    """Three steps inside backward against three beside it, both on the device: bitwise."""
    after = []
    for inside in (False, True):
        torch.manual_seed(1)
        model = prepared(Perceptron(width), info, kind)
        start = plain(model)
        model = model.to(device)
        optimizer = made(info, model)
        with release(model, optimizer) if inside else contextlib.nullcontext():
            for step in range(3):
                x = torch.randn(32, width, generator=torch.Generator().manual_seed(step))
                model(x.to(device, torch.float32 if kind == "float32" else torch.bfloat16)).backward()
                optimizer.step()
                optimizer.zero_grad()
        after.append(plain(model))
    return judged(parted(after[0], after[1], start), 0.0)


def no_sync(info: Recipe, start: nn.Module, device: torch.device) -> Line:
    """Steps 2 and 3 with torch's alarm for whatever makes the host wait for the device."""
    model = copy.deepcopy(start).to(device)
    optimizer = made(info, model)
    set_gradients(model, 0, device)
    optimizer.step()
    set_gradients(model, 1, device)
    wait(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.step()
    except RuntimeError as error:
        return {"syncs": one_line(error), "status": "differs"}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"syncs": None}


# --- the suite ---


def full(case: Running) -> None:
    """`pytest -m gpu`, if there is a pytest."""
    if find_spec("pytest") is None:
        case.skipped("pytest is not installed")
        return
    # all others may need more than is installed beside a GPU
    files = [str(file) for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in file.read_text("utf-8")]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *sorted(files)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout, done.stderr)
    said = [text for text in done.stdout.splitlines() if text.strip()] or [""]
    nothing = done.returncode == 5  # no test is marked
    status = "ok" if done.returncode == 0 else "skipped" if nothing else "failed"
    case.write(what="pytest -m gpu", status=status, reason=one_line(said[-1]))
