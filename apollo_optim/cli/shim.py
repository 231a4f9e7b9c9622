"""`apollo-optim shim`: a folder for PYTHONPATH that holds a package `apollo_torch`, made of this library."""

from collections.abc import Sequence
from pathlib import Path

from ..core.printing import say
from .words import Parser

FOLDER = Path(__file__).resolve().parent.parent / "integrations" / "drop_in"


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "apollo-optim shim",
        "Print a folder that holds a package apollo_torch on this library, for tools that want that one:\n"
        "  PYTHONPATH=$(apollo-optim shim) llamafactory-cli train run.yaml",
    )
    parser.parse(argv)
    say(FOLDER)
    return 0
