"""`apollo-optim optimizers`: the registry, as a table."""

from collections.abc import Sequence

from ..core.printing import say
from ..train.config import plain
from .words import Parser, show


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "apollo-optim optimizers",
        "List the optimizers with their defaults: the names that optim.name takes, and the keys of its section.",
    )
    parser.parse(argv)
    from rich.table import Table
    from rich.text import Text

    from apollo_optim import list_optimizers

    table = Table(box=None, padding=(0, 2, 1, 0), show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for info in list_optimizers():
        defaults = info.defaults
        told = ", ".join(f"{key} {plain(value)}" for key, value in defaults.items())
        table.add_row(info.name, Text.assemble(f"{info.summary}\n{info.paper}\n", (told, "dim")))
    show(table)
    say("a+b, as in muon+adamw: hidden matrices use a; embedding, head and all matrices that a is not for use b.")
    say("d, n: the small and the large side of a matrix; r: the rank. Every key: apollo-optim pretrain --help")
    return 0
