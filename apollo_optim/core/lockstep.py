"""Sums over processes of many steps at a time: each of them is small, and a process waits for each that it asks for.

A step is a plain function, which asks for a sum where it needs one and goes on with it. Here many are called side by
side, each in a thread of its own, of which one runs at a time: it runs until it asks, then the next one does, and what
all have asked for is summed as one. A step that is called alone sums by itself. The order is that of the calls, so that
every process asks for the same.

What they would ask for is known without other processes, too (`rounds_of`, `put_together`): a plan of it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MEMBERS = 256  # most steps side by side: a thread each

_here = threading.local()


class _Abandoned(BaseException):
    """Another of the steps has failed: what waits is unwound."""


class _Member:
    """One of the steps, in its thread."""

    def __init__(self, function: Callable[[], None], turns: _Turns) -> None:
        self._function, self._turns = function, turns
        self._go = threading.Semaphore(0)
        self.asked: Tensor | Callable[[], Tensor] | None = None
        self.where: tuple[str, str] = "", ""
        self.answer: Tensor | None = None
        self.error: BaseException | None = None
        self.over = self.abandoned = False
        threading.Thread(target=self._run, daemon=True).start()

    def resume(self) -> None:
        """Let it run until it asks for something or is over. Raises what it raised."""
        if callable(self.asked) and not self.abandoned:
            self.answer = self.asked()  # not earlier: it may be large
        self.asked = None
        self._turns.running = self
        self._go.release()
        self._turns.back.acquire()
        self._turns.running = None
        if self.error is not None and not self.abandoned:
            raise self.error

    def ask(self, asked: Tensor | Callable[[], Tensor], where: tuple[str, str] = ("", "")) -> Tensor:
        """From its thread: what was asked for, once it is there."""
        self.asked, self.where = asked, where
        self._wait()
        if self.abandoned:
            raise _Abandoned
        answer, self.answer = self.answer, None
        assert answer is not None
        return answer

    def _wait(self) -> None:
        self._turns.back.release()
        self._go.acquire()

    def _run(self) -> None:
        self._go.acquire()
        _here.member = self
        try:
            if not self.abandoned:
                with torch.no_grad(), self._turns.on_device():
                    self._function()
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self.over = True
        self._turns.back.release()


class _Turns:
    """Whose turn it is, of all of them."""

    def __init__(self, device: torch.device) -> None:
        self.back = threading.Semaphore(0)
        self.running: _Member | None = None
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """A thread begins with a device and a stream of its own."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def side_by_side(functions: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Call all of them, what they ask for by `summed` and `sent` put together. Raises what one of them raises."""
    if len(functions) == 1:
        functions[0]()
        return
    turns = _Turns(device)
    members = [_Member(function, turns) for function in functions]
    waiting = members
    try:
        while waiting:
            for member in waiting:
                member.resume()
            waiting = [member for member in waiting if not member.over]
            _sum(waiting)
    finally:
        if turns.running is not None:  # whoever waited for it was interrupted
            turns.back.acquire()
        for member in members:
            if not member.over:
                member.abandoned = True
                member.resume()


def _sum(waiting: list[_Member]) -> None:
    """All tensors that go to the same processes in one."""
    alike: defaultdict[tuple[Any, ...], list[_Member]] = defaultdict(list)
    for member in waiting:
        if isinstance(member.asked, Tensor):
            alike[(*member.where, member.asked.dtype)].append(member)
    for (group, operation, _), members in alike.items():
        tensors = [member.asked for member in members if isinstance(member.asked, Tensor)]
        flat = _all_reduce(torch.cat([t.reshape(-1) for t in tensors]), group, operation)
        for member, t, own in zip(members, tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            member.answer = own.view(t.shape)


def _all_reduce(own: Tensor, group: str, operation: str) -> Tensor:
    ops = torch.ops._c10d_functional
    result: Tensor = ops.wait_tensor(ops.all_reduce(own, operation, group))
    return result


def summed(own: Tensor, group: str, operation: str = "sum") -> Tensor:
    """The sum of `own` over the processes of a group, by its name."""
    if torch.compiler.is_compiling():
        result: Tensor = _compiled_sum(own, group, operation)
        return result
    member: _Member | _Listener | None = getattr(_here, "member", None)
    return _all_reduce(own, group, operation) if member is None else member.ask(own, (group, operation))


def sent(function: Callable[[], Tensor]) -> Tensor:
    """What a function returns that sends something else to other processes: it is called alone, in its turn."""
    member: _Member | _Listener | None = getattr(_here, "member", None)
    return function() if member is None or torch.compiler.is_compiling() else member.ask(function)


@torch.library.custom_op("apollo_optim::sum_over_processes", mutates_args=())
def _compiled_sum(own: Tensor, group: str, operation: str) -> Tensor:
    """Of a compiled step, which comes back here for it."""
    return summed(own, group, operation).clone()


@_compiled_sum.register_fake
def _(own: Tensor, group: str, operation: str) -> Tensor:
    return torch.empty_like(own, memory_format=torch.contiguous_format)


# --- for a planner ---


class Sum(NamedTuple):
    """A sum that steps ask for. (The operation may be another one.)"""

    group: str
    operation: str
    dtype: torch.dtype
    nbytes: int


class _Listener:
    """In the place of the other processes: it answers at once, and knows what it was asked for."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self.rounds: list[Sum | None] = []

    def ask(self, asked: Tensor | Callable[[], Tensor], where: tuple[str, str] = ("", "")) -> Tensor:
        if isinstance(asked, Tensor):
            self.rounds.append(Sum(*where, asked.dtype, asked.nbytes))
            return asked.clone(memory_format=torch.contiguous_format)
        if not self.compiled:
            self.rounds.append(None)
        return asked()


def is_traced() -> bool:
    """Is a compiler at work, or somebody who wants to know what it would make?"""
    return torch.compiler.is_compiling() or getattr(getattr(_here, "member", None), "compiled", False)


def rounds_of(function: Callable[[], None], *, compiled: bool) -> list[Sum | None]:
    """What a step asks for, round after round, on tensors that hold nothing: a sum, or None where it sends otherwise.

    What it sends otherwise is sent. (On the meta device torch has nothing to send, and says so to nobody.)

    Args:
        compiled: As it would, were it compiled: what it sends otherwise is then part of it, and takes no round.
    """
    listener = _here.member = _Listener(compiled)
    try:
        with torch.no_grad():
            function()
    finally:
        del _here.member
    return listener.rounds


def put_together(steps: Sequence[Sequence[Sum | None]]) -> list[Sum]:
    """The sums that `side_by_side` makes of what these steps ask for."""
    found: list[Sum] = []
    for asked in itertools.zip_longest(*steps):
        sums: dict[Any, Sum] = {}
        for own in (own for own in asked if own is not None):
            before = sums.get(own[:-1])
            sums[own[:-1]] = own if before is None else own._replace(nbytes=before.nbytes + own.nbytes)
        found += sums.values()
    return found
