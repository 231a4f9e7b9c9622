"""The optimizer of a run, from its section of the run file."""

from __future__ import annotations

from typing import Any

import torch

from apollo_optim import build_optimizer
from apollo_optim.optim.compiled import Graphs
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.train.config import OptimConfig


def make_optimizer(cfg: OptimConfig, model: torch.nn.Module, graphs: Graphs | None = None) -> RuleOptimizer:
    """By its name in the registry; keys that are None are left to its defaults. `graphs`: steps compiled already."""
    asked = {key: value for key, value in cfg.flat().items() if value is not None and key != "name"}
    optimizer = build_optimizer(cfg.name, model, **asked)
    optimizer.graphs.update(graphs or {})
    return optimizer


def learning_rates(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Of the matrices, and of the rest (the same where all parameters are in one group), as they are now."""
    matrices, rest = _two_groups(optimizer)
    return float(matrices["lr"]), float(rest["lr"])


def peak_rates(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """The same two before the schedule: what is configured."""
    matrices, rest = _two_groups(optimizer)
    return float(matrices.get("initial_lr", matrices["lr"])), float(rest.get("initial_lr", rest["lr"]))


def _two_groups(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    groups = optimizer.param_groups
    matrices = next((g for g in groups if g.get("name") == "matrices"), groups[0])
    return matrices, next((g for g in groups if g is not matrices), matrices)
