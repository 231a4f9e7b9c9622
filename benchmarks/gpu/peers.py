"""Other people's optimizers, called by their public constructors as their READMEs say; those that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.nn import Parameter

Params = Sequence[Parameter]
Build = Callable[[Params, Params, int], torch.optim.Optimizer]
"""(matrices of attention and MLP, everything else, rank) -> the optimizer."""

LR = 1e-4


def _named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _ranked(module: str, name: str, **group: Any) -> Build:
    """One with groups of its own for the matrices: `RANK` in it stands for the rank."""

    def build(matrices: Params, rest: Params, rank: int) -> torch.optim.Optimizer:
        keys = {key: rank if value is RANK else value for key, value in group.items()}
        groups = [{"params": list(matrices), **keys}, *([{"params": list(rest)}] if rest else [])]
        optimizer: torch.optim.Optimizer = _named(module, name)(groups, lr=LR)
        return optimizer

    return build


def _plain(module: str, name: str, **knobs: Any) -> Build:
    def build(matrices: Params, rest: Params, rank: int) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = _named(module, name)([*matrices, *rest], lr=LR, **knobs)
        return optimizer

    return build


RANK = object()
BASELINE = "torch AdamW (fused)"
fused_adamw = _plain("torch.optim", "AdamW", fused=True)

PEERS: dict[str, tuple[str, Build]] = {
    # name -> (distribution, how); what compiles C++ or CUDA by itself, and so may take minutes, comes last
    "apollo-torch": (
        "apollo-torch",
        _ranked(
            "apollo_torch",
            "APOLLOAdamW",
            rank=RANK,
            proj="random",
            scale_type="channel",
            scale=1.0,
            update_proj_gap=200,
            proj_type="std",
        ),
    ),
    "apollo-torch mini": (
        "apollo-torch",
        _ranked(
            "apollo_torch",
            "APOLLOAdamW",
            rank=1,
            proj="random",
            scale_type="tensor",
            scale=128.0,
            update_proj_gap=200,
            proj_type="std",
        ),
    ),
    "bitsandbytes AdamW8bit": ("bitsandbytes", _plain("bitsandbytes.optim", "AdamW8bit")),
    "torch AdamW": ("torch", _plain("torch.optim", "AdamW")),
    "hakuli": ("hakuli", _ranked("hakuli", "Hakuli", rank=RANK, scale=1.0, scale_type="channel", update_proj_gap=200)),
    "flashoptim AdamW": ("flashoptim", _plain("flashoptim", "FlashAdamW")),
    "torchao AdamW8bit": ("torchao", _plain("torchao.optim", "AdamW8bit")),
    "adafactor8bit apollo": ("adafactor8bit", _ranked("adafactor8bit", "Adafactor8Bit", apollo_rank=RANK)),
}


def installed() -> tuple[dict[str, Build], list[str]]:
    """The peers that are there, and the distributions that are not."""
    there: dict[str, Build] = {}
    absent: list[str] = []
    for name, (distribution, build) in PEERS.items():
        try:
            version(distribution)
        except PackageNotFoundError:
            absent += [distribution] * (distribution not in absent)
        else:
            there[name] = build
    return there, absent
