"""What is measured: an optimizer of ours, or a peer's in its place."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apollo_optim import param_groups
from apollo_optim.data.config import DataConfig
from apollo_optim.train.config import LogConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

Peer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Case:
    """What is measured: an optimizer of ours, or a peer's in its place."""

    optim: str = "adamw"
    """Of ours; for a peer only the form of the weights."""
    release: bool = False
    package: str = ""
    """A peer's, as it is imported."""
    peer: Peer | None = None


def matrices(model: nn.Module, **rule: Any) -> list[dict[str, Any]]:
    """Groups as the peers of the low-rank family want them: the matrices that use the rule, and the rest."""
    groups = param_groups(model, rank=rule["rank"])
    follows = [p for group in groups if "rank" in group for p in group["params"]]
    others = [p for group in groups if "rank" not in group for p in group["params"]]
    return [{"params": follows, **rule}, {"params": others}]


def quarter(model: nn.Module) -> int:
    """The papers' rank, a quarter of the hidden size, as `rank: auto` here."""
    return int(model.config.hidden_size) // 4  # type: ignore[union-attr, arg-type]


def imported(package: str, name: str) -> Any:
    """A class of a peer, which is loaded in the process of its case alone."""
    return getattr(importlib.import_module(package), name)


def apollo_torch(model: nn.Module, rank: int, scale: float, scale_type: str) -> torch.optim.Optimizer:
    rule = {"scale": scale, "scale_type": scale_type, "proj": "random", "proj_type": "std", "update_proj_gap": 200}
    made: torch.optim.Optimizer = imported("apollo_torch", "APOLLOAdamW")(matrices(model, rank=rank, **rule), lr=1e-3)
    return made


def galore_torch(model: nn.Module) -> torch.optim.Optimizer:
    groups = matrices(model, rank=quarter(model), scale=0.25, proj_type="std", update_proj_gap=200)
    made: torch.optim.Optimizer = imported("galore_torch", "GaLoreAdamW")(groups, lr=1e-3)
    return made


CASES = {
    "torch-adamw": Case(package="torch", peer=lambda model: torch.optim.AdamW(model.parameters())),
    "bitsandbytes-adamw8bit": Case(
        package="bitsandbytes", peer=lambda model: imported("bitsandbytes.optim", "AdamW8bit")(model.parameters())
    ),
    "torchao-adamw8bit": Case(
        package="torchao", peer=lambda model: imported("torchao.optim", "AdamW8bit")(model.parameters())
    ),
    "galore-torch": Case(package="galore_torch", peer=galore_torch),
    "apollo-torch": Case(
        package="apollo_torch", peer=lambda model: apollo_torch(model, quarter(model), 1.0, "channel")
    ),
    "apollo-torch-mini": Case(package="apollo_torch", peer=lambda model: apollo_torch(model, 1, 128.0, "tensor")),
    **{
        name + tail: Case(name, release)
        for name in ("adamw", "apollo", "apollo-mini")
        for tail, release in (("", False), ("-release", True))
    },
    "q-apollo-mini-release": Case("q-apollo-mini", True),
}


def config_of(
    case: Case,
    size: str,
    *,
    dtype: str = "bfloat16",
    batch: int = 1,
    seq: int = 256,
    steps: int = 2,
    checkpointing: bool = False,
    threads: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The run that is measured, and planned."""
    return RunConfig(
        model=ModelConfig(size, dtype=dtype, gradient_checkpointing=checkpointing, config=dict(config or {})),  # type: ignore[arg-type]
        data=DataConfig(seq_len=seq),
        optim=OptimConfig(case.optim, lr=1e-4),
        train=TrainConfig(steps=steps, batch_size=batch, release=case.release, threads=threads, device="cpu"),
        log=LogConfig(display="none"),
    )
