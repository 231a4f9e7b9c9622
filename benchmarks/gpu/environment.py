"""What is there: the GPU, its driver and torch's, a compiler; and the two ceilings, bytes and products a second."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import Any

import torch

from benchmarks.cases import Running
from benchmarks.gpu.device import compiler_fault, copy_bandwidth, median_seconds, open_device
from benchmarks.kit import Line, one_line


def measure(case: Running) -> None:
    """A line as soon as each is known: a device, its ceilings, a compiler."""
    name = case.config["device"]
    reason = unusable(name)
    if reason:
        case.write(what="device", usable=False, reason=reason, torch=about_torch())
        return
    device = open_device(name)
    case.write(what="device", usable=True, torch=about_torch(), **about(device))
    with case.attempt(what="copy") as line:
        line["bytes_per_s"] = copy_bandwidth(device, case.config["copy_bytes"])
    with case.attempt(what="matmul") as line:
        n = case.config["matmul"]
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        line |= {"n": n, "flops": 2 * n**3 / median_seconds(lambda: a @ b, device, 11)}
    if not case.config["compiler"]:
        return
    with case.attempt(what="compiler") as line:
        start = time.perf_counter()
        fault = compiler_fault(device)
        compilers = {name: shutil.which(name) for name in ("cc", "gcc", "clang", "nvcc")}
        line |= {"works": fault is None, "fault": fault, "seconds": time.perf_counter() - start}
        line["found"] = [name for name, path in compilers.items() if path]


def unusable(name: str) -> str | None:
    """Why this device cannot be used, in one line; None: it can."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            torch.cuda.init()  # type: ignore[no-untyped-call]  # says why: no driver, one too old, torch without CUDA
        torch.zeros(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError) as error:
        return one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
    return None


def about_torch() -> Line:
    """What this torch was built for."""
    return {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}


def about(device: torch.device) -> Line:
    """The device, in its own words."""
    found: Line = {"threads": torch.get_num_threads(), "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF")}
    if device.type != "cuda":
        return found | {"name": str(device)}
    properties: Any = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return found | {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "total_bytes": total,
        "free_bytes": free,
        "driver": driver(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def driver() -> str | None:
    """Its version, as nvidia-smi says, and the clocks."""
    words = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
