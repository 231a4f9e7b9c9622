"""The exceptions that say: what you gave me is wrong."""

from __future__ import annotations

import os


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what to do.

    The command line prints it as one line and exits with 2.
    """


class Damaged(InputError):
    """A file does not hold what it should: "FILE is damaged: what". Who reads it adds what to go on from."""

    def __init__(self, path: str | os.PathLike[str], what: object, way_out: str = "") -> None:
        self.path, self.what = path, " ".join(str(what).split())[:300]
        super().__init__(f"{path} is damaged: {self.what}{way_out}")
