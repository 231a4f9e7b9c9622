"""Where the processes of a run meet: in a part of torchrun's store that no earlier start of them has written to.

After a failure `torchrun --max-restarts` starts all of them again with the same store (since torch 2.5), and what the
dead have left in it is read as the address of a process that is about to come: "Connection refused", now and then
(https://github.com/pytorch/pytorch/issues/135712). The count of restarts does not tell the starts apart, as every
machine has a count of its own; so the first process names each start, and the others make sure that it is alive.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

from apollo_optim.core.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

NAME = "apollo_optim/start"
PAUSE = 0.01  # seconds between two looks


def meet(timeout: float) -> tuple[Store, int, int]:
    """The store of this start, this process's rank, and how many there are.

    Args:
        timeout: Seconds that one waits for the others.

    Raises InputError if the others do not come.
    """
    from torch.distributed.distributed_c10d import PrefixStore  # a torch without processes does not have them
    from torch.distributed.rendezvous import rendezvous

    at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        name = named(store, size, timeout) if rank == 0 else told(store, rank, timeout)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"the processes could not meet at {at}: {first_line(error)}") from error
    return PrefixStore(f"{NAME}/{name}", store), rank, size


def named(store: Store, size: int, timeout: float) -> str:
    """The first process's part: a new name for this start, once all others have answered to it."""
    name, end = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(NAME, name)
    for rank in range(1, size):
        while not store.check([hello(name, rank)]):
            if time.monotonic() > end:
                raise RuntimeError(f"process {rank} of {size} did not come within {timeout:g} s")
            time.sleep(PAUSE)
        store.set(hello(name, rank) + "/seen", store.get(hello(name, rank)).decode())
    return name


def told(store: Store, rank: int, timeout: float) -> str:
    """Another's part: the name to which the first process answers, now."""
    me, end, said = uuid.uuid4().hex, time.monotonic() + timeout, ""
    while time.monotonic() < end:
        name = store.get(NAME).decode() if store.check([NAME]) else ""
        if name and name != said:
            store.set(hello(name, rank), me)
            said = name
        seen = hello(name, rank) + "/seen"
        if name and store.check([seen]) and store.get(seen).decode() == me:  # an earlier start's is not this process
            return name
        time.sleep(PAUSE)
    raise RuntimeError(f"the first process did not come within {timeout:g} s")


def hello(name: str, rank: int) -> str:
    """The key under which a process answers to the name of a start."""
    return f"{NAME}/{name}/{rank}"


def first_line(error: BaseException) -> str:
    """Of its message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
