"""`apollo-optim bench`: measurements behind the claims. They are in a checkout's `benchmarks/`, not in the wheel."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import InputError, nearest
from ..core.printing import say

CHECKOUT = Path(__file__).resolve().parents[2]
"""Where the package lies: a checkout, if it was installed in place."""
BENCHES = {
    "race": "the same small LLaMA trained by every optimizer, learning rates searched with the same budget",
    "step": "the time of a step of ours, of the installed peers and of fused AdamW, interleaved in one process",
    "loop": "what pretrain costs compared with forward, backward and step, and tokens a second with each optimizer",
    "stall": "how long steps wait for text, with it made ahead in a thread and without",
    "pace": "whether a step's time is a fixed cost and one of each token: two batches predict others",
    "instructions": "an instruction set made by rules, and models scored on it by exact match",
    "company": "tokens a second alone and next to a busy process, by how threads wait for each other",
    "memory": "peak memory, a fresh process for every optimizer, compared with its plan",
    "low-bit": "what low-bit weights cost by the piece, and other formats for them",
    "kill": "runs killed with kill -9 and resumed, compared bitwise",
    "long-log": "memory that a long metrics.jsonl takes when it is read",
    "processes": "the same run in one process and in several, DDP and FSDP2",
    "meshes": "every rule's step in one process and on meshes of several",
    "collectives": "what one step sends to other processes, of every rule",
    "kill-processes": "processes of a run killed with kill -9, which torchrun brings back, compared bitwise",
    "soak": "a long run of several processes: memory, files, processes and sockets",
    "corruptions": "newest checkpoints damaged, found, and the one before used",
    "saves": "how long processes stand still for a checkpoint, beside torch's asynchronous one",
    "host": "the host time of a step where tensors are small, and of an import",
    "launches": "how many kernels a step of a whole model asks a GPU for, counted without one",
    "gpu": "what a GPU is measured with, in eight minutes",
}

HELP = f"""usage: apollo-optim bench NAME [...]

Measure, and keep the log: what the documentation says of speed, memory and quality comes from these.
They are not installed with the library: run this in a checkout of the repository.

benches:
{"".join(f"  {name:<16}{summary}{chr(10)}" for name, summary in BENCHES.items())}
  apollo-optim bench NAME --help says more; python -m benchmarks.NAME is the same.
"""


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        say(HELP.rstrip())
        return 0 if argv else 2
    name, *rest = argv
    if name not in BENCHES:
        raise InputError(f"unknown bench {name}{nearest(name, BENCHES)}; there are {', '.join(BENCHES)}")
    module = f"benchmarks.{name.replace('-', '_')}"
    if holds_benchmarks(CHECKOUT):
        return call(module, rest)
    if holds_benchmarks(Path.cwd()):
        # The package is installed elsewhere: a fresh Python takes the checkout's, so that all is of one commit.
        os.execv(sys.executable, [sys.executable, "-m", module, *rest])
    raise InputError(
        f"bench {name}: the benchmarks are not installed with the library; clone the repository and run this there"
    )


def holds_benchmarks(folder: Path) -> bool:
    """Is it a checkout of this repository?"""
    return all((folder / name).is_file() for name in ("benchmarks/kit.py", "apollo_optim/__init__.py"))


def call(module: str, argv: Sequence[str]) -> int:
    """Its `main`, in this process. Returns the exit code."""
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    found = importlib.util.find_spec(module)
    package = found is not None and found.submodule_search_locations is not None
    code: int = importlib.import_module(f"{module}.__main__" if package else module).main(argv)
    return code
