"""`apollo-optim env`: what a bug report needs, and nothing that says who or where you are."""

import os
import platform
import shutil
from collections.abc import Iterator, Sequence

from .. import __version__
from ..core.printing import say
from .words import Parser

PACKAGES = (
    "torch", "numpy", "transformers", "datasets", "tokenizers", "safetensors", "accelerate", "trl", "peft", "lightning",
    "axolotl", "llamafactory", "litgpt", "apollo-torch", "bitsandbytes", "torchao", "triton",
)  # fmt: skip
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF",
             "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "THP_MEM_ALLOC_ENABLE", "WORLD_SIZE")  # fmt: skip


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "apollo-optim env",
        "Print versions, processor, GPU and what else a bug report needs: no paths, no names of machines or people.",
    )
    parser.parse(argv)
    found = dict(lines())
    wide = max(map(len, found))
    for name, value in found.items():
        say(f"{name:<{wide}}  {value}")
    return 0


def lines() -> Iterator[tuple[str, str]]:
    """What there is to say: a name, a value."""
    from importlib.metadata import PackageNotFoundError, version

    yield "apollo-optim", __version__
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
    yield from machine()
    compilers = [name for name in ("c++", "g++", "clang++", "cl") if shutil.which(name)]
    yield "C++ compiler", ", ".join(compilers) or "none: steps run eagerly"
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def machine() -> Iterator[tuple[str, str]]:
    """Processor, memory and GPUs, as torch sees them."""
    import torch

    from ..train.measure import hardware

    of_cpu = hardware(torch.device("cpu"))
    yield "processor", f"{of_cpu['cpu']}, {of_cpu['cores']} cores, {of_cpu['threads']} threads"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield "memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
    yield "torch built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU or another device"
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield f"GPU {number}", f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB, capability {gpu.major}.{gpu.minor}"
