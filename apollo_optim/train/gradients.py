"""What the gradients of a run take of memory, and why not less."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from apollo_optim.core.place import local
from apollo_optim.train.config import TrainConfig
from apollo_optim.train.display import in_bytes


@dataclass(frozen=True)
class Gradients:
    """The gradients of a model. (A low-bit weight's has the size of its float weight.)"""

    largest: int
    """Bytes of the largest one."""
    everything: int
    """Bytes of all."""
    together: str
    """Why all of them are in memory at a time; empty if one after the other is set free, by `train.release`."""
    released: bool

    @classmethod
    def of(cls, model: torch.nn.Module, cfg: TrainConfig, *, compiled: bool, processes: int = 1) -> Gradients:
        """Those of a run, in each of its processes; `compiled`: the model is."""
        sizes = [local(p).numel() * p.element_size() for p in model.parameters() if p.requires_grad]
        return cls(max(sizes), sum(sizes), _together(cfg, compiled, processes), cfg.release)

    def most(self) -> int:
        """Bytes at the fullest moment of a step."""
        return self.everything if self.together else self.largest

    def cost_of_release(self) -> str:
        """One line: what the gradients take, and what accumulation makes of that."""
        largest, everything = in_bytes(self.largest), in_bytes(self.everything)
        if self.together:
            why = self.together
            return f"step inside backward: still all gradients at a time, {everything} instead of {largest}: {why}"
        return f"step inside backward: one gradient at a time, {largest} at most instead of {everything}"


def _together(cfg: TrainConfig, compiled: bool, processes: int) -> str:
    count = math.ceil(cfg.batch_size / processes / (cfg.micro_batch or cfg.batch_size))
    if not cfg.release:
        return "they wait for the step"
    if count > 1:
        return f"{count} micro-batches are added up in them (one, without train.micro_batch, would not be)"
    return "torch.compile hands them over at once (without model.compile they come one by one)" * compiled
