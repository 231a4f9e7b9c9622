"""Time and memory on a device: CUDA by its own events and counters, everything else by the clock."""

from __future__ import annotations

import importlib
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import DoesNotFit
from benchmarks.kit import Line, gb, one_line

Act = Callable[[], object]
LAUNCH = re.compile(r"(cuda|cu|hip)\w*Launch")
"""Calls of the runtime that start a kernel, or a whole graph of them."""
NOT_KERNELS = re.compile(r"Memcpy|Memset|Optimizer\.|ProfilerStep|(Context|Stream|Event) (Sync|Wait)")
"""What else a profiler lists of a GPU: copies, ranges that were named on the host, waits."""


def open_device(name: str) -> torch.device:
    """The device, with its number, made the current one."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:  # without one torch takes no device for the current one
        torch.cuda.set_device(device)
    return torch.device("cuda", torch.cuda.current_device())


def wait(device: torch.device) -> None:
    """Until it has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


@dataclass(frozen=True)
class Taken:
    """Seconds of something."""

    device: float
    """From the beginning of the first kernel's turn to the end of the last one."""
    host: float
    """Until Python had given all of it to the device."""


def timed(act: Act, device: torch.device) -> Taken:
    """Once. The device is idle at the beginning."""
    wait(device)
    if device.type == "cuda":
        events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        events[0].record()
        act()
        events[1].record()
        host = time.perf_counter() - start
        events[1].synchronize()
        return Taken(events[0].elapsed_time(events[1]) / 1e3, host)
    start = time.perf_counter()
    act()
    host = time.perf_counter() - start
    wait(device)
    return Taken(time.perf_counter() - start, host)


def median_seconds(act: Act, device: torch.device, times: int) -> float:
    """Of so many, after one that does not count."""
    act()
    return sorted(timed(act, device).device for _ in range(times))[times // 2]


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second, read and written ones added: a copy of `size` bytes. The ceiling of a step."""
    source, target = (torch.ones(size // 2, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size / median_seconds(lambda: target.copy_(source), device, 11)


# --- memory ---


def free_bytes(device: torch.device) -> int | None:
    """Of the device; None where it does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def must_fit(wanted: int, device: torch.device) -> None:
    """Raises DoesNotFit, saying how much is wanted and how much there is, before anything is allocated."""
    free = free_bytes(device)
    if free is not None and wanted > free:
        raise DoesNotFit(f"wants {gb(wanted)} GB, and {gb(free)} GB are free")


class Peak:
    """The most memory between here and `read`: allocated by tensors, and reserved by the allocator for them."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._counts = device, device.type == "cuda"
        if self._counts:
            wait(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)

    def read(self) -> Line:
        """Bytes: `allocated` and `reserved` at their peaks, and how much that is above the beginning."""
        if not self._counts:
            return {}
        wait(self._device)
        allocated = torch.cuda.max_memory_allocated(self._device)
        reserved = torch.cuda.max_memory_reserved(self._device)
        before, held = self._before
        extra = {"extra_allocated": allocated - before, "extra_reserved": reserved - held}
        return {"allocated": allocated, "reserved": reserved, **extra}


# --- what is done ---


def launches(act: Act, device: torch.device) -> Line:
    """How often the host starts something in it, and how many kernels and copies the device then runs.

    On a CPU: how many operations. The profiler makes it slow: for one act, and not for timing.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    try:
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
            act()
            wait(device)
        # its own list: the public one takes minutes to build
        events: Any = seen.profiler.kineto_results.events()
    except (RuntimeError, AssertionError, AttributeError) as error:
        return {"launches": None, "note": f"the profiler: {one_line(error)}"}
    if not cuda:
        return {"operations": sum(event.name().startswith("aten::") for event in events)}
    there = [event.name() for event in events if str(event.device_type()).endswith("CUDA")]
    started = sum(bool(LAUNCH.match(event.name())) for event in events)
    kernels = sum(not NOT_KERNELS.match(name) for name in there)
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in there)
    note = {} if started or kernels else {"note": "the profiler saw no kernel (no right to the GPU's counters?)"}
    return {"launches": started or None, "kernels": kernels or None, "copies": copies, **note}


def graphs() -> int:
    """How many graphs torch.compile has compiled so far in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0
    return int(importlib.import_module("torch._dynamo.utils").counters["stats"]["unique_graphs"])


def compiler_fault(device: torch.device) -> str | None:
    """Why steps cannot be compiled here; None: they can. Loads the compiler, which is nobody's first step then."""
    from apollo_optim import AdamW

    p = torch.nn.Parameter(torch.zeros(8, 8, device=device))
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            AdamW([p], compile=True).step()
            wait(device)
        except Exception as error:  # whatever a compiler raises: it is the answer
            return f"{type(error).__name__}: {one_line(error)}"
    texts = [str(warning.message) for warning in seen]
    return next((one_line(text) for text in texts if "torch.compile does not work" in text), None)
