"""Printing: names are data. The only file of the package that prints, but for rich, which is told to take names
for names where it is used (tests/house/test_printed.py walks the sources).

A name comes from a command line, a file, a log or a model, and is shown as it is: to a terminal without what that would
obey, to rich without markup, to matplotlib without mathematics, to Markdown without markup and HTML.
"""

from __future__ import annotations

import html
import logging
import re
import sys


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: the name of a file may hold bytes that are none."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def printable(text: object) -> str:
    """A name without what a terminal would obey: escape codes and other control characters are spelt out."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in str(text)
    )


def lines(text: object) -> str:
    """The same of several lines, which stay lines."""
    return "\n".join(printable(line).replace("\\t", "\t") for line in str(text).split("\n"))


def say(text: object = "", *, error: bool = False) -> None:
    """Print a text and a newline; `error`: where errors and notes go."""
    print(lines(text), file=sys.stderr if error else sys.stdout, flush=error)


def say_on(text: str) -> None:
    """Print a piece of a text that a model wrote: a terminal gets what it can show, a file or a pipe all of it."""
    print(lines(text) if sys.stdout.isatty() else text, end="", flush=True)


def literal(text: str) -> str:
    """A name for a picture: matplotlib reads mathematics between dollars."""
    return printable(text).replace("$", r"\$")


def plain_markdown(text: str) -> str:
    """A name for Markdown: neither markup nor another cell nor HTML."""
    return html.escape(re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", printable(text)), quote=False)


class Notes(logging.Handler):
    """What the library notes while a command runs: its words on stderr, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        say(printable(record.getMessage()), error=True)
