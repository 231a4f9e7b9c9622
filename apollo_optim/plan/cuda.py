"""What a GPU holds besides tensors: what PyTorch's caching allocator rounds up, and the context of the process.

The allocator's own constants (`c10/core/AllocatorConfig.h`), as its documentation tells them: a tensor takes a multiple
of 512 bytes. What is of 1 MiB or less lies in segments of 2 MiB, what is below 10 MiB in segments of 20 MiB, and
everything larger has a segment of its own, a multiple of 2 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from apollo_optim.core.errors import InputError

MIB = 1 << 20
ROUND = 512
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
MIDDLE, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB
LARGE_ROUND = 2 * MIB

CONTEXT = 500_000_000
"""Bytes of the context of a process: kernels, cuBLAS and its workspaces. NOT MEASURED HERE: public figures for PyTorch
lie between 0.3 and 0.6 GB, by card and version; a log of `benchmarks.gpu` in results/gpu replaces it."""


def kind_of(device: str | torch.device) -> str:
    """ "cpu" or "cuda" of a device or its name, "cuda:0" as well. Raises InputError for what is not planned."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise InputError(f'device={str(device)!r}: a plan is of "cpu" or of "cuda"')
    return kind


def up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def pools(sizes: Iterable[int]) -> tuple[int, int, list[int]]:
    """Bytes of the small tensors together, of the middle ones together, and of each large one; of 0 there are none."""
    tensors = [up(size, ROUND) for size in sizes]
    small = sum(size for size in tensors if size <= SMALL)
    middle = sum(size for size in tensors if SMALL < size < MIDDLE)
    return small, middle, [size for size in tensors if size >= MIDDLE]


def reserved(sizes: Iterable[int]) -> int:
    """Bytes of the segments that hold tensors of these sizes, where none has holes: what the allocator takes at least.

    `up(small, 2 MiB) + up(middle, 20 MiB) + sum(up(each large one, 2 MiB))`.
    """
    small, middle, large = pools(sizes)
    return up(small, SMALL_SEGMENT) + up(middle, MIDDLE_SEGMENT) + sum(up(size, LARGE_ROUND) for size in large)


def reserved_expandable(sizes: Iterable[int]) -> int:
    """The same with `expandable_segments:True`: one segment a pool, that grows by pages of 2 and of 20 MiB.

    `up(small, 2 MiB) + up(middle + large, 20 MiB)`.
    """
    small, middle, large = pools(sizes)
    return up(small, SMALL_SEGMENT) + up(middle + sum(large), MIDDLE_SEGMENT)


def overhead(sizes: list[int]) -> dict[str, int]:
    """The rows of a plan that are no tensors."""
    return {"allocator": reserved(sizes) - sum(sizes), "context": CONTEXT}


def advice(sizes: Sequence[int]) -> str:
    """One line: is `expandable_segments` worth it?"""
    saved = reserved(sizes) - reserved_expandable(sizes)
    words = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    if saved > sum(sizes) / 100:
        return (
            f"{words} takes {saved / 1e9:.2f} GB less at this peak, and leaves no holes between tensors of many sizes."
        )
    return (
        f"{words} saves next to nothing of this peak; set it where batches differ in length, or if a run ends out of "
        "memory with much of it reserved and not allocated: holes are not in a plan."
    )
