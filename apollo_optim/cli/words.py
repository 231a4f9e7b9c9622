"""Reading a command line: what is wrong with it, said in one line, and what was probably meant."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..core.errors import InputError, nearest
from ..core.printing import printable, say
from ..core.sizes import size_of

if TYPE_CHECKING:
    from rich.console import Console

CONSENT = "--trust-remote-code"  # never a key of a file: files come from anywhere
CONSENT_HELP = "run the Python code that a model or tokenizer brings along; only if you have read it"


def memory_of(flag: str, text: str | None) -> float | None:
    """Bytes of what a flag says: "24GB", "24" (GB, too) or "80 GiB"; None where it is not given."""
    return None if text is None else size_of(flag, text)


def home(path: str) -> Path:
    """The path, whose `~` no shell has replaced (`--out=~/x`)."""
    return Path(os.path.expanduser(path))


def complain(error: object, code: int) -> int:
    """Say what is wrong, and with which exit code the command ends.

    Of several processes the first says what all have found, for `torchrun` ends the others when one has ended.
    """
    several = "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0"
    if several:
        time.sleep(5.0)
    who = f"process {os.environ['RANK']}: " if several else ""
    say(f"error: {who}{printable(error)}", error=True)
    return code


def console() -> "Console":
    """rich, which takes what it is given for text."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def show(what: Any, **how: Any) -> None:
    """Print a table or a text by rich, without markup."""
    console().print(printable(what) if isinstance(what, str) else what, **how)


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as `InputError`: the command prints all of them in one way."""

    def __init__(self, prog: str, description: str, epilog: str | None = None, *, add_help: bool = True) -> None:
        super().__init__(
            prog,
            description=description,
            epilog=epilog,
            add_help=add_help,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, rest = self.parse_known_args(argv)
        if rest:
            raise self._unknown(rest[0])
        return args

    def parse_beside_keys(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """This command's own words, and those that change keys of a run file (`--section.key VALUE`)."""
        args, rest = self.parse_known_args(argv)
        for word in rest:
            if word.startswith("--") and "." not in word.partition("=")[0]:
                raise self._unknown(word)
        return args, rest

    def _unknown(self, word: str) -> InputError:
        flag = word.partition("=")[0]
        near = nearest(flag, self._option_string_actions)
        return InputError(f"unknown argument {flag}{near}; see {self.prog} --help")
