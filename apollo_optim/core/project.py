"""Down to r columns: the projections that low-rank rules share.

Shapes in this file, for a weight of m x n:
    c = max(m, n)   the channels, kept
    k = min(m, n)   the side that is compressed
    r               the rank
Rules see the *channel view* G_ck of a gradient: a transpose where the weight is wide and never a copy, so none of them
has a left and a right variant. Leading axes (``..``, the experts of a stack) are batches.

A basis is dense, P (.., k, r), or a sketch, given by its signs alone, (.., k). All but ``svd`` satisfy E[P P^T] = I.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from apollo_optim.core import layout
from apollo_optim.core.blocks import Block, by_rows
from apollo_optim.core.compile import in_memory
from apollo_optim.core.random import Key, normal_pairs, signs
from apollo_optim.core.scaling import channel_norms, channel_sums

Projection = Literal["gaussian", "sketch", "rademacher", "svd"]
PROJECTIONS: tuple[str, ...] = get_args(Projection)
Offsets = tuple[int, ...]  # by name: the compiler of torch 2.6 does not take it inside of a function


def channel_view(t: Tensor) -> Tensor:
    """(.., m, n) longer side first: (.., c, k). Square matrices keep their rows as channels."""
    return t if t.shape[-2] >= t.shape[-1] else layout.transposed(t)


def random_basis(view_ck: Tensor, rank: int, proj: str, key: Key) -> Tensor:
    """The basis of this key for a gradient seen as ``view_ck``, whole on every rank, fp32.

    ``gaussian``: N(0, 1/r), the paper's. ``rademacher``: +-1/sqrt(r). ``sketch`` (CountSketch; Kane & Nelson 2014):
    entry j of the small side goes to column j mod r with a random sign; one pass over G and no matrix product.
    """
    batch, k = view_ck.shape[:-2], view_ck.shape[-1]
    stack = batch.numel()

    def positions(n: int) -> Tensor:
        return torch.arange(stack * n, dtype=torch.int64, device=view_ck.device)

    if proj == "sketch":
        return in_memory(signs(positions(k), key).view(*batch, k))
    if proj == "rademacher":
        return signs(positions(k * rank), key).view(*batch, k, rank) / math.sqrt(rank)
    half = (k * rank + 1) // 2  # each hash pair gives two normals: one for either half of a matrix
    pairs = torch.cat([t.view(stack, half) for t in normal_pairs(positions(half), key)], dim=1)
    return in_memory(pairs[:, : k * rank].reshape(*batch, k, rank) / math.sqrt(rank))


@contextlib.contextmanager
def quick_products() -> Iterator[None]:
    """Products of fp32 matrices on a CPU as ``torch.set_float32_matmul_precision("medium")`` has them, if nobody chose.

    By oneDNN, which is twice as fast as MKL on an AMD CPU, with the same fp32 numbers; with AMX it multiplies operands
    rounded to bf16 and adds up in fp32. That is enough for a random sketch. Process-wide, and put back at the end.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    if matmul is None or matmul.fp32_precision != "none":
        yield
        return
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"


def svd_basis(grad_ck: Tensor, rank: int) -> Tensor:
    """The top r right singular vectors P (.., k, r), each signed so that its largest entry is positive, fp32."""
    finite_ck = layout.whole(grad_ck).float().nan_to_num(0.0, 0.0, 0.0)  # svd raises on others; the step is skipped
    _, _, vh = torch.linalg.svd(finite_ck, full_matrices=False)
    basis: Tensor = vh[..., :rank, :].mT
    peak = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    return basis * peak.sign()


def down(grad_ck: Tensor, basis: Tensor, rank: int) -> Tensor:
    """R = G P, (.., c, k) -> (.., c, r), fp32, split by channels if G is split at all."""
    sketched = basis.ndim < grad_ck.ndim

    def product(part: Tensor, at: Offsets) -> Tensor:
        *starts, _, first = at
        stack = tuple(slice(s, s + n) for s, n in zip(starts, part.shape[:-2], strict=True))
        small = slice(first, first + part.shape[-1])
        own = basis[(*stack, small)]

        def rows(block: Tensor, at: Block) -> Tensor:
            here = own[at[: len(stack)]]
            if sketched:
                return _bucket_sums(block.float() * here.unsqueeze(-2), first, rank)
            return block.float() @ here

        if torch.compiler.is_compiling() and not sketched and part.dtype is not torch.float32:
            # a product wants its operands in memory: the fp32 copy of an eighth at a time
            return torch.cat([rows(block, ()) for block in part.chunk(8, -2)], -2)
        return by_rows(rows, part)

    return layout.projected(grad_ck, rank, product)


def down_and_norms(grad_ck: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """R = G P, the norms of its channels and those of G's: compiled one pass over G where that is possible."""
    sketched = basis.ndim < grad_ck.ndim
    if not torch.compiler.is_compiling() or not (sketched or rank == 1):
        low_cr = down(grad_ck, basis, rank)
        return low_cr, channel_norms(low_cr), channel_norms(grad_ck)
    grad, across = grad_ck.float(), layout.lies_across(grad_ck)
    if sketched:
        low_cr, square = _bucket_sums(grad * basis.unsqueeze(-2), 0, rank), _bucket_sums(grad.square(), 0, rank)
    else:
        low_cr, square = channel_sums(grad * basis.mT, across), grad.square()
    return low_cr, channel_sums(low_cr.square(), across).sqrt(), channel_sums(square, across).sqrt()


def _bucket_sums(signed_ck: Tensor, first: int, rank: int) -> Tensor:
    """Column j, the whole matrix's number ``first + j``, added to bucket number mod r: (.., c, k) -> (.., c, r)."""
    k = signed_ck.shape[-1]
    even = k - k % rank
    sums = signed_ck[..., :even].reshape(*signed_ck.shape[:-1], k // rank, rank).sum(-2)
    if even < k:
        sums = sums + torch.constant_pad_nd(signed_ck[..., even:], (0, rank - k % rank))
    return sums.roll(first % rank, -1) if first % rank else sums
