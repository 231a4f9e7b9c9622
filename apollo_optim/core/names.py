"""Patterns over the names of modules and parameters."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def as_tuple(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(pattern: str, name: str) -> bool:
    """A plain word is a substring, one with `* ? [` a glob over the whole name, `re:...` a regular expression."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    if is_pattern(pattern):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern in name


WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def unwrapped(name: str) -> str:
    """A parameter's name without what `torch.compile`, DDP and checkpoint wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_pattern(target: str) -> bool:
    """Is it a glob or a regular expression, and not a plain word?"""
    return target.startswith("re:") or any(c in target for c in "*?[")


ROUTERS = ("gate", "router", "shared_expert_gate")


def is_router(module: Any, name: str, model: Any) -> bool:
    """Does this module of `model` choose among experts? A plain word never targets it: it decides for all others."""
    parent, _, own = name.rpartition(".")
    if "router" in type(module).__name__.lower():
        return True
    return own in ROUTERS and any("expert" in child for child, _ in model.get_submodule(parent).named_children())


def is_vector(name: str, p: Tensor) -> bool:
    """0-D, 1-D, or the biases of a stack of experts, which are a matrix in shape alone."""
    return p.ndim < 2 or name.rpartition(".")[2].endswith("bias")


def summary(names: Sequence[str], most: int = 60) -> str:
    """The names with their layer numbers as `*`, each once: what there is to choose from."""
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})[:most])


def with_matrices(parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the modules that hold a matrix themselves, from `named_parameters(remove_duplicate=False)`."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, p in parameters if p.ndim >= 2))
