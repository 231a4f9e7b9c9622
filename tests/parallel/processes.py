"""Runs of two processes for test_processes.py: `find` starts them, `work` is what each of them does."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from apollo_optim.train.config import load_config
from apollo_optim.train.pretrain import pretrain


def work(rank: int, size: int, port: int, jobs: Sequence[tuple[Path, bool]]) -> None:
    """One process of `size`, which has them all join once and then trains one run file after the other."""
    torch.set_num_threads(1)
    meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in meeting.items()}
    torch.distributed.init_process_group("gloo")
    for file, resume in jobs:
        pretrain(load_config(file), resume=resume)
    torch.distributed.destroy_process_group()


def train(size: int, *jobs: tuple[Path, bool]) -> None:
    """Train run files (and whether to resume) in `size` processes. An exception in one of them is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(size, port, jobs), nprocs=size)
