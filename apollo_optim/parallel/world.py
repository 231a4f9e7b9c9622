"""Who writes, who waits, what is summed: the processes of a run. There is one, for now.

Many processes arrive by another `World` with the same three answers; what trains asks them and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T", int, torch.Tensor)


@dataclass(frozen=True)
class World:
    """One process."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the log and the checkpoints' plain parts, and is the one that people see."""
        return self.rank == 0

    def total(self, value: T) -> T:
        """The sum over all processes; every one of them has to ask."""
        return value


ALONE = World()
