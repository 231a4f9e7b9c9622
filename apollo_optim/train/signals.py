"""Ctrl-C and SIGTERM ask a run to stop, and it does when it has saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Stop:
    """Whether somebody asked to stop, and how."""

    requested: str = ""


@contextlib.contextmanager
def stop_signals(*, several: bool = False) -> Iterator[Stop]:
    """The first Ctrl-C or SIGTERM only asks: the step is finished and saved. A second one acts as it always does.

    `several` processes: `torchrun` hands on to each what the terminal has told it already, so all of them only ask.
    (It kills what has not ended after 30 seconds.)
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may listen
        return
    names = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
    before = {number: signal.getsignal(number) for number in names}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: Any) -> None:
        stop.requested = names[signal.Signals(number)]
        if not several:
            put_back()

    for number in names:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        put_back()
