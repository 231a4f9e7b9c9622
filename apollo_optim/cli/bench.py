"""`apollo-optim bench`: measurements behind the claims, each a module of `apollo_optim.bench` with its own --help."""

import importlib
from collections.abc import Sequence

from ..core.errors import InputError
from .words import nearest

BENCHES = {
    "race": "the same small LLaMA trained by every optimizer, learning rates searched with the same budget",
    "low-bit": "what low-bit weights cost by the piece, and other formats for them",
    "kill": "runs killed with kill -9 and resumed, compared to the bit",
    "step": "the time of a step of ours, of the installed peers and of fused AdamW, interleaved in one process",
    "loop": "what pretrain costs beside forward, backward and step, and tokens a second with each optimizer",
    "memory": "peak memory, a fresh process for every optimizer, beside its plan",
}

HELP = f"""usage: apollo-optim bench NAME [...]

Measure, and keep the log: what the documentation says of speed, memory and quality comes from these.

benches:
{"".join(f"  {name:<10}{summary}{chr(10)}" for name, summary in BENCHES.items())}
  apollo-optim bench NAME --help says more.
"""


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    name, *rest = argv
    if name not in BENCHES:
        raise InputError(f"unknown bench {name}{nearest(name, BENCHES)}; there are {', '.join(BENCHES)}")
    code: int = importlib.import_module(f"apollo_optim.bench.{name.replace('-', '_')}").main(rest)
    return code
