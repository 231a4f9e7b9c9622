"""What is stepped, and who fits into memory together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from apollo_optim.optim.groups import param_groups
from apollo_optim.train.config import ModelConfig
from apollo_optim.train.measure import tensor_bytes
from apollo_optim.train.models import DTYPES, SIZES, skeleton
from benchmarks.kit import gb
from benchmarks.step.contenders import BASELINE, CONTENDERS, Contender

HALVES = ("matrices", "rest")
SAMPLE = 4096
"""Entries of each tensor that are looked at to see whether a step has written there."""


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
        """In words; "" for a whole model."""
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
        """The matrices, then the rest."""
        return [p for half in HALVES for p in self.halves[half]]

    @property
    def gradients(self) -> list[Tensor]:
        """In the same order."""
        return [p.grad for p in self.all if p.grad is not None]

    def fill_gradients(self) -> None:
        """With what they had."""
        for i, grad in enumerate(self.gradients):
            self.fill(grad, -1 - i, 1e-3)

    def fill(self, t: Tensor, shift: int, size: float) -> None:
        """Noise, the same each time, at the speed of a copy."""
        noise = self.noise.roll(shift * 7919) * size
        for part in torch.split(t.view(-1), noise.numel()):
            part.copy_(noise[: part.numel()])

    def bytes_of(self, half: str) -> int:
        """Of its weights, or of its gradients."""
        return tensor_bytes(self.halves[half])


def samples(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The first entries of each: views."""
    return [t.detach().view(-1)[:SAMPLE] for t in tensors]


class Needs(NamedTuple):
    """Bytes that a batch takes."""

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
            refused[name] = f"does not fit: needs {gb(base + own, '.1f')} GB, there are {gb(limit, '.1f')}"
            continue
        if own > free:
            batches.append([BASELINE])
            free = limit - base
        if name != BASELINE:
            batches[-1].append(name)
            free -= own
    return batches, refused
