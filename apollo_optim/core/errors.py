"""The exceptions that say: what you gave me is wrong."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what to do.

    The command line prints it as one line and exits with 2.
    """


class Damaged(InputError):
    """A file does not hold what it should: "FILE is damaged: what". Who reads it adds what to go on from."""

    def __init__(self, path: str | os.PathLike[str], what: object, way_out: str = "") -> None:
        self.path, self.what = path, " ".join(str(what).split())[:300]
        super().__init__(f"{path} is damaged: {self.what}{way_out}")


def closest(word: object, known: Iterable[object]) -> str | None:
    """The known word most like this one; None where none is near."""
    return next(iter(difflib.get_close_matches(str(word), list(map(str, known)), n=1)), None)


def nearest(word: object, known: Iterable[object], prefix: str = "") -> str:
    """ " (did you mean ...?)", the word with `prefix` before it, or nothing where none is near."""
    near = closest(word, known)
    return "" if near is None else f" (did you mean {prefix}{near}?)"
