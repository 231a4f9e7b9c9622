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


ALL_LINEAR = "all-linear"
HEAD_NAMES = ("lm_head", "embed_out", "output", "head", "score", "classifier")
_LINEAR = {"Linear", "_ConvNd", "Conv1D", "RNNBase", "MultiheadAttention"}


def is_linear(module: Any, name: str, p: Tensor) -> bool:
    """Is the matrix `p` of this module one that activations are multiplied by? By what it is, not what it is called.

    `nn.Linear`, convolutions, transformers' Conv1D, recurrent and attention layers with weights of their own, what a
    parametrization keeps in the place of such a weight, and fused stacks of experts.
    """
    parametrized = ".parametrizations." in f".{name}." and min(p.shape) > 1
    experts = p.ndim == 3 and "expert" in f"{type(module).__name__} {name}".lower()
    return bool(_classes(module) & _LINEAR) or parametrized or experts


def is_norm(module: Any) -> bool:
    """Does this module normalise? Its weights are scales around one, of whatever shape: decay would shrink them."""
    return any(name.lower().rstrip("_123d").endswith("norm") for name in _classes(module))


def _classes(module: Any) -> set[str]:
    """The names of its class and of those that it is derived from."""
    return {cls.__name__ for cls in type(module).__mro__}


def head_of(model: Any) -> Any:
    """The output layer, or None: as transformers names it, else a last child with one of the customary names."""
    if callable(getattr(model, "get_output_embeddings", None)):
        head = model.get_output_embeddings()
        if hasattr(head, "named_parameters"):
            return head
    by_name = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    return next((by_name[name] for name in HEAD_NAMES if name in by_name), None)


def unmatched(pattern: str, modules: Sequence[str], *, target: bool = True) -> str:
    """The complaint about a pattern, of these names of modules."""
    hint = f'. targets="{ALL_LINEAR}" finds what is linear, whatever it is called' if target else ""
    return f"{pattern!r} matches nothing in this model. Modules with matrices: {summary(modules)}{hint}"


def is_vector(name: str, p: Tensor) -> bool:
    """0-D, 1-D, or the biases of a stack of experts, which are a matrix in shape alone."""
    return p.ndim < 2 or name.rpartition(".")[2].endswith("bias")


def summary(names: Sequence[str], most: int = 60) -> str:
    """The names with their layer numbers as `*`, each once: what there is to choose from."""
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})[:most])


def with_matrices(parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the modules that hold a matrix themselves, from `named_parameters(remove_duplicate=False)`."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, p in parameters if p.ndim >= 2))
