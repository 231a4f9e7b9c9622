"""What is really there: bytes of weights, gradients and optimizer state, peak memory, the machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from apollo_optim.core.place import local
from apollo_optim.core.storage import nbytes


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all of them in this process, each counted once (tied weights share their memory)."""
    return sum(nbytes(local(t)) for t in {id(t): t for t in tensors}.values())


def memory(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that exist at this moment. Gradients and state appear with the first step."""
    parameters = list(model.parameters())
    return {
        "weights": tensor_bytes(parameters),
        "gradients": tensor_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer": tensor_bytes(
            t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, torch.Tensor)
        ),
    }


def inner_tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Plain tensors, those behind a tensor subclass (torchao's) included."""
    for leaf in tree_leaves(tree):
        if hasattr(leaf, "__tensor_flatten__"):
            yield from inner_tensors([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif isinstance(leaf, torch.Tensor):
            yield leaf


def give_back_memory(size: int = 2_000_000) -> bool:
    """Have glibc give blocks of `size` bytes back to the system as soon as they are free; whether it could be asked.

    By itself it learns to keep blocks of up to 32 MB for later, where they fragment: a 350M run in 8 bits peaked at
    1.54 GB instead of 1.26 after two steps, and grew. What a step in blocks works with stays in the heap: to fetch it
    from the system every time would take longer than the step.
    """
    import ctypes

    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
    libc = ctypes.CDLL(None)
    return hasattr(libc, "mallopt") and bool(
        libc.mallopt(mmap_threshold, size)
        & libc.mallopt(trim_threshold, 4 * size)
        & libc.mallopt(arena_max, 1)  # one heap, not one for each thread that had to wait for another
    )


def free_heap() -> int | None:
    """Bytes that the program has set free and glibc keeps for later; None where it can't be asked (before 2.33)."""
    import ctypes

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # malloc.h
    kind = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields.split()]})
    libc.mallinfo2.restype = kind
    return int(libc.mallinfo2().fordblks)


def peak_memory() -> int:
    """The most memory this process ever had resident, in bytes (VmHWM on Linux)."""
    return process_status("VmHWM") or _most_so_far()


def resident_memory() -> int:
    """The memory this process has resident now, in bytes (VmRSS on Linux; elsewhere the most it had so far)."""
    return process_status("VmRSS") or _most_so_far()


def process_status(key: str) -> int | None:
    """A line of Linux's account of this process (VmRSS, RssFile, ...), in bytes; None elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith(f"{key}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return None


def _most_so_far() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory(device: torch.device) -> int | None:
    """The most memory torch ever had allocated on this GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def versions() -> dict[str, str | None]:
    """Versions of everything that a figure may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "apollo-optim"):
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            found[package.replace("-", "_")] = None
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine, in the few words that a reader of a log needs."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            found["cpu"] = next(
                (line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), found["cpu"]
            )
    except OSError:
        pass  # not Linux
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    if device.type == "cpu":
        found["bfloat16"] = multiplies_bfloat16()
    return found


def multiplies_bfloat16() -> bool:
    """Whether torch has products of bfloat16 for this CPU; of processors that are not x86 nothing is known: yes.

    Without AVX-512 it goes entry by entry: a seventh of fp32's speed for x W^T, a fortieth for x W.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # what torch itself asks
    return platform.machine().lower() not in ("x86_64", "amd64") or supported is None or bool(supported())


def advice_on_dtype(dtype: torch.dtype, device: torch.device) -> str | None:
    """A line where this processor multiplies in `dtype` far slower than in float32."""
    if dtype != torch.bfloat16 or device.type != "cpu" or multiplies_bfloat16():
        return None
    return (
        "this processor has no matmuls in bfloat16: they take seven to forty times as long as in float32. "
        "model.dtype float32 is faster wherever it fits (docs/troubleshooting.md)"
    )
