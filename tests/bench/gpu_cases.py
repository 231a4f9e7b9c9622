"""Cases for test_bench_gpu.py, run by the processes that it starts: without torch, so that they start at once."""

import time

from benchmarks.cases import DoesNotFit, Running


def slow(case: Running) -> None:
    """A figure, and then nothing for ever."""
    case.write(what="first", figure=1)
    time.sleep(600)


def crash(case: Running) -> None:
    """A figure, and then a process that is gone."""
    import os
    import signal

    case.write(what="first", figure=1)
    os.kill(os.getpid(), signal.SIGKILL)


def measurements(case: Running) -> None:
    """Some that go wrong, and what comes after them."""
    with case.attempt(what="memory"):
        raise MemoryError("cannot have 54 GB")
    with case.attempt(what="device memory"):
        raise RuntimeError("CUDA error: out of memory")
    with case.attempt(what="too large"):
        raise DoesNotFit("wants 54.00 GB, and 23.00 GB are free")
    with case.attempt(what="broken"):
        raise ValueError("no such thing\nat all")
    with case.attempt(what="fine") as line:
        line["figure"] = float("nan")


def fine(case: Running) -> None:
    """A figure."""
    case.write(what="fine", left=case.left())
