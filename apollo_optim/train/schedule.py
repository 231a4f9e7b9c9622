"""The learning rate over a run: a factor of each group's own peak."""

from __future__ import annotations

import math

import torch

from apollo_optim.train.config import ScheduleConfig


def factor(step: int, steps: int, cfg: ScheduleConfig) -> float:
    """The factor of step 1 ... `steps`: up in a straight line over the warm-up, then down as `cfg.kind` says.

    The last step of the warm-up has the factor 1; the last step of the run has exactly `min_lr` (but for "constant").
    """
    warmup = warmup_steps(steps, cfg)
    if step <= warmup:
        return step / warmup
    if cfg.kind == "constant":
        return 1.0
    start = steps - round(cfg.decay * steps) if cfg.kind == "wsd" else warmup
    start = max(start, warmup)
    if step <= start:
        return 1.0
    progress = min((step - start) / (steps - start), 1.0) if steps > start else 1.0
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.kind == "cosine" else 1 - progress
    return cfg.min_lr + (1 - cfg.min_lr) * shape


def warmup_steps(steps: int, cfg: ScheduleConfig) -> int:
    """Below 1 a fraction of the run, else a number of steps."""
    return round(cfg.warmup * steps) if cfg.warmup < 1 else round(cfg.warmup)


def set_lr(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set every group to its own peak times `value`; the peak is kept as `initial_lr`, as by torch's schedulers."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * value
