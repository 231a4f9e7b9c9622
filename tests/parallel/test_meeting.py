"""Processes that torchrun starts again meet each other, and not what the dead have left in the store."""

from __future__ import annotations

import threading
import time

import pytest
from torch.distributed import HashStore
from torch.distributed.distributed_c10d import Store

from apollo_optim.core.errors import InputError
from apollo_optim.parallel import meeting, world


def meet_in(store: Store, size: int, first_comes_last: bool) -> set[str]:
    """The names of a start that its processes have agreed upon."""
    names: dict[int, str] = {}

    def come(rank: int) -> None:
        names[rank] = meeting.told(store, rank, 20.0) if rank else meeting.named(store, size, 20.0)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(size)]
    for thread in reversed(threads) if first_comes_last else threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert len(names) == size
    return set(names.values())


@pytest.mark.parametrize("first_comes_last", [False, True])
def test_every_start_has_a_name_of_its_own(first_comes_last):
    store = HashStore()
    starts = [meet_in(store, 3, first_comes_last) for _ in range(4)]
    assert [len(names) for names in starts] == [1, 1, 1, 1]
    assert len(set.union(*starts)) == 4


def test_who_does_not_come_is_named():
    with pytest.raises(RuntimeError, match="process 1 of 2 did not come within"):
        meeting.named(HashStore(), 2, 0.1)
    store = HashStore()
    meet_in(store, 2, False)
    with pytest.raises(RuntimeError, match="the first process did not come"):  # though an earlier one's name is there
        meeting.told(store, 1, 0.1)


def test_nobody_there_is_one_line(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"the processes could not meet at 127\.0\.0\.1:1: "), world.joined(1.0):
        pass


@pytest.mark.parametrize(("allowed", "count", "again"), [("0", "1", False), ("3", "0", False), ("3", "1", True)])
def test_a_process_started_again_knows_it(monkeypatch, allowed, count, again):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", allowed)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert world.restarted(1.0) is again
