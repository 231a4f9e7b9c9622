"""How much of the machine other processes take meanwhile: what figures of time are worth."""

from __future__ import annotations

import os

BUSY = 0.1  # of the processors' time: from here on a person is told


def processor_seconds() -> tuple[float, float] | None:
    """Seconds of the processors that this process may use, since the system started, and how many of them went to
    other processes. None where Linux's account of it is not there.
    """
    try:
        mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        with open("/proc/stat", encoding="ascii") as stat:
            rows = [[int(ticks) for ticks in line.split()[1:9]] for line in stat if line.split()[0] in mine]
    except (OSError, ValueError, AttributeError):
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = (sum(column) for column in zip(*rows, strict=True))
    busy, tick = user + nice + system + irq + softirq + steal, os.sysconf("SC_CLK_TCK")
    return (busy + idle + iowait) / tick, busy / tick - sum(os.times()[:4])


class Others:
    """The share of the processors' time that other processes take."""

    def __init__(self) -> None:
        self._first = self._last = processor_seconds()

    def since(self) -> float | None:
        """Since the last call; None where it is not known."""
        before, self._last = self._last, processor_seconds()
        return _share(before, self._last)

    def altogether(self) -> float | None:
        """From the beginning to the last call of `since`."""
        return _share(self._first, self._last)


def _share(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    if before is None or after is None or after[0] <= before[0]:
        return None
    # Children count as this process when they have ended: until then they are others.
    return min(1.0, max(0.0, (after[1] - before[1]) / (after[0] - before[0])))
