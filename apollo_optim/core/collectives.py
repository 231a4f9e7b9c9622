"""Collectives: what a process asks torch to send, as one line each, and a hook that writes them down.

The bytes of one are those of the larger of what goes in and what comes out, whatever an algorithm makes of it on the
wire; `sent` is what leaves a process where that is a ring, which sends each byte no oftener than it must.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What torch's engines ask for by an older name.
_NAMES = {
    "_allgather_base": "all_gather_into_tensor",
    "_reduce_scatter_base": "reduce_scatter_tensor",
    "allreduce": "all_reduce",
}


class Collective(NamedTuple):
    """One of them.

    Attributes:
        kind: "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", ..., as torch calls it.
        nbytes: Of the larger of what goes in and what comes out.
        group: The processes that take part, by torch's name for them; "" where it was not said by name.
        processes: How many these are; 0 where that is not known.
    """

    kind: str
    nbytes: int
    group: str = ""
    processes: int = 0

    @property
    def sent(self) -> int:
        """Bytes that leave each process in a ring; an all-reduce goes around it twice."""
        n = max(self.processes, 1)
        return (2 if self.kind == "all_reduce" else 1) * self.nbytes * (n - 1) // n


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the collectives that this thread asks torch for, within it. (No step is compiled meanwhile.)

    >>> with Counter() as counter:
    ...     optimizer.step()
    >>> counter.sent
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "placements") for kind in types):
            return NotImplemented  # what a DTensor makes of it comes back here
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0].removesuffix("_")
        if func.namespace in ("_c10d_functional", "c10d", "_dtensor") and "wait" not in name and "wrap" not in name:
            group = next((arg for arg in reversed(args) if isinstance(arg, str)), "")
            size = max((t.nbytes for t in _tensors((*args, result))), default=0)
            self.sent.append(Collective(_NAMES.get(name, name), size, group))
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
