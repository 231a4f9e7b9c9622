"""Patterns over the names of modules and parameters."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from torch import Tensor


def as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(pattern: str, name: str) -> bool:
    """A plain word is a substring, one with ``* ? [`` a glob over the whole name, ``re:...`` a regular expression."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern in name


def summary(names: Sequence[str], most: int = 60) -> str:
    """The names with their layer numbers as ``*``, each once: what there is to choose from."""
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})[:most])


def with_matrices(parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the modules that hold a matrix themselves, from ``named_parameters(remove_duplicate=False)``."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, p in parameters if p.ndim >= 2))
