"""Who writes, who waits, what is summed: the processes of a run.

What trains asks a `World` and nothing else, so that one process and many run the same code. The processes are made by
`torchrun` (or by whoever sets its four variables, or has called `init_process_group`); without it a run is `ALONE`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from apollo_optim.core.errors import InputError
from apollo_optim.parallel.meeting import first_line, meet

MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells its processes


class ProcessLost(Exception):
    """Another process of the run has gone, or does not answer: this one cannot go on."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them. Whatever is asked of all has to be asked by every one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number on its own machine: that of its GPU."""
    tensor: int = 1
    """So many processes, one after the other, have parts of the same matrices and see the same rows;
    1: no two do."""

    @property
    def leads(self) -> bool:
        """Whether this process writes the log and the checkpoints, and is the one that people see."""
        return self.rank == 0

    @property
    def shares(self) -> int:
        """How many shares of a batch's rows there are: one a process, or one for `tensor` of them."""
        return self.size // self.tensor

    @property
    def share(self) -> int:
        """This process's, counted from 0."""
        return self.rank // self.tensor

    def mine(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's rows of a batch that all have: each `shares`-th, so that no cut decides who has which."""
        return rows if self.shares == 1 else rows[self.share :: self.shares].contiguous()

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all shares of a small tensor, on its device: one process of a share has its word."""
        return self._sum(value if self.rank % self.tensor == 0 else torch.zeros_like(value))

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return flag if self.size == 1 else bool(self._sum(torch.tensor([int(flag)]))[0])

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def each(self, value: Any) -> list[Any]:
        """What every process says, by rank: small and plain values."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    @contextlib.contextmanager
    def leader_first(self) -> Iterator[None]:
        """One process at first, and then the others, who find what it has made (a tokenizer, files in a cache)."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def draw(self, seed: int, step: int) -> None:
        """Set torch's random numbers (dropout) for this process's part of a step.

        One process draws on and on, and a checkpoint knows where it is. Each share of many begins every step at a place
        of its own that only seed, step and share decide, so that nothing has to be saved of it.
        """
        if self.size > 1:
            torch.manual_seed(seed * 1_000_003 + step * self.shares + self.share)


ALONE = World()


def launched() -> bool:
    """Is this one of several processes, which torchrun (or the like) has told how to meet?"""
    return all(name in os.environ for name in MEETING) and os.environ["WORLD_SIZE"] != "1"


def restarted(timeout: float) -> bool:
    """Has torchrun started these processes again after a failure, on this machine or on another one?

    Every machine's torchrun counts its own failures only, so all are asked; `timeout`, errors: as `joined`.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return False
    with joined(timeout) as world:
        return world.any(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0")


@contextlib.contextmanager
def joined(timeout: float) -> Iterator[World]:
    """The processes of this run, which have met; `ALONE` where nobody has said all that they need to meet.

    Args:
        timeout: Seconds that one waits for the others before the run fails.

    Raises InputError if the others cannot be met, and ProcessLost if one of them goes within it.
    """
    if dist.is_available() and dist.is_initialized():  # somebody else's, who also ends it
        with losing_none():
            yield _this()
        return
    if not launched():
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = meet(timeout)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes have met and cannot talk to each other: {first_line(error)}") from error
    try:
        with losing_none():
            yield _this()
    finally:
        dist.destroy_process_group()


def _this() -> World:
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def losing_none() -> Iterator[None]:
    """Torch's errors of a connection, within it, as ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ProcessLost(first_line(error)) from error


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process does not answer any more."""
    signs = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out", "gloo", "NCCL")
    several = dist.is_available() and dist.is_initialized()
    return several and (isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs))
