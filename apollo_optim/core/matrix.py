"""Pieces that rules are made of: views, norms, projections, averages, the limit on a step's growth.

Shapes in this file, for a weight of m x n:
    c = max(m, n)   the channels, kept
    k = min(m, n)   the side that is compressed
    r               the rank
A rule of channels sees the *channel view* G_ck of a gradient: a transpose where the weight is wide and never a copy, so
none of them has a left and a right variant. Leading axes (`..`, the experts of a stack) are batches. Every tensor is
this rank's part; a `Place` says where it lies in the whole and sums over ranks.

A basis is dense, P (.., k, r), or a sketch, given by its signs alone, (.., k). All but `svd` satisfy E[P P^T] = I.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.linalg import vector_norm

from apollo_optim.core.blocks import Block, blocks, by_rows, part
from apollo_optim.core.compile import in_memory
from apollo_optim.core.place import Place, lies_across
from apollo_optim.core.random import Key, normal_pairs, signs

Number = float | Tensor  # 0-D where a compiled step must not specialise on the value
Projection = Literal["gaussian", "sketch", "rademacher", "svd"]
PROJECTIONS: tuple[str, ...] = get_args(Projection)
TINY = 1e-8
_PART = 32


def matrix_shape(shape: tuple[int, ...], view: str | None) -> tuple[int, ...]:
    """(.., m, n): 2-D as it is, 3-D a stack of matrices unless viewed as "conv", convolutions (out, the rest)."""
    if len(shape) == 2 or (len(shape) == 3 and view != "conv"):
        return shape
    return shape[0], torch.Size(shape[1:]).numel()


def is_wide(shape: tuple[int, ...]) -> bool:
    """Is (.., m, n) wider than tall? Square matrices keep their rows as channels."""
    return shape[-2] < shape[-1]


# --- averages ---


def lerp(average: Tensor, value: Tensor, weight: Number) -> Tensor:
    """`average + (value - average) * weight` in fp32, whatever they are stored in. Both of one shape."""
    old = average.float()
    return old + (value.float() - old) * weight


def adam_moments(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, new1: Number, new2: Number
) -> tuple[Tensor, Tensor]:
    """Adam's two averages after this gradient, in fp32 whatever they are stored in. All three of one shape.

    `new1 = 1 - beta1` and `new2 = 1 - beta2`, taken on the host: in fp32, 1 - 0.999 is wrong by 5e-5.
    """
    grad, mean, square = grad.float(), exp_avg.float(), exp_avg_sq.float()
    return mean + (grad - mean) * new1, square + (grad * grad - square) * new2


def bias_corrections(step: float, betas: tuple[float, float]) -> tuple[float, float]:
    """(1 - beta1^t, sqrt(1 - beta2^t)): young averages are too small by these factors."""
    return 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)


# --- norms and sums ---


def channel_norms(t: Tensor) -> Tensor:
    """(.., c, k) -> (.., c, 1), fp32, of all entries that are here."""
    if torch.compiler.is_compiling():
        return _channel_sums(t.float().square(), lies_across(t)).sqrt()

    def rows(block: Tensor, _: Block = ()) -> Tensor:
        norms: Tensor = vector_norm(block, dim=-1, keepdim=True, dtype=torch.float32)
        return norms

    return rows(t) if t.dtype is torch.float32 else by_rows(rows, t)  # others are copied for it


def _channel_sums(t: Tensor, across: bool) -> Tensor:
    """(.., c, k) -> (.., c, 1). Of what lies across in parts: the compiled loop goes down a few rows at a time.

    Fewer rows are a little faster and their sums take more memory: 8 of bf16 half of `t`'s bytes, 32 an eighth.
    """
    *batch, k = t.shape
    rows = math.gcd(k, _PART)
    if not across or rows == 1:
        return t.sum(-1, keepdim=True)
    return t.reshape(*batch, k // rows, rows).sum(-1).sum(-1, keepdim=True)


def full_norm(own: Tensor, place: Place) -> Tensor:
    """The norm of all of a tensor of any shape: 0-D, fp32."""
    if torch.compiler.is_compiling():  # row by row: a sum of everything at once is compiled to a slow loop
        square = own.float().square().sum(-1).sum()
    else:
        parts = [vector_norm(part(own, at), dtype=torch.float32) for at in blocks(tuple(own.shape), own.device)]
        norm: Tensor = parts[0] if len(parts) == 1 else vector_norm(torch.stack(parts))
        if place.mesh is None:
            return norm
        square = norm.square()
    return place.total(square).sqrt()


def matrix_norm(norms_c1: Tensor, place: Place) -> Tensor:
    """The norm of a whole matrix from its channels': (.., c, 1) -> (..). `place`: of the channels."""
    norm: Tensor = vector_norm(norms_c1, dim=(-2, -1), keepdim=place.mesh is not None)
    return norm if place.mesh is None else place.sum(norm.square(), -2, -1).sqrt()[..., 0, 0]


def ratio(direction_norm: Tensor, grad_norm: Tensor) -> Tensor:
    """s = ||N|| / ||R||, per channel or per tensor (APOLLO, eq. 5 and section 4.2)."""
    return direction_norm / (grad_norm + TINY)


def limit_growth(norm: Tensor, prev_norm: Tensor, growth: Number) -> tuple[Tensor, Tensor]:
    """Fira's norm-growth limiter (2410.01623): a step's norm may grow by at most `growth`.

    Returns the factor for the step and the norm to remember, both of `norm`'s shape. A remembered norm of zero
    means "no limit yet"; a step whose norm is zero is not remembered. So neither a zero gradient at the start (torch's
    checkpoint code takes such a step to create the state) nor one in mid-run freezes the tensor or drops the limit.
    The branches are `where`s: no host sync.
    """
    limited, idle = torch.minimum(norm, (prev_norm * growth).masked_fill(prev_norm == 0, math.inf)), norm == 0
    return (limited / norm).masked_fill(idle, 1.0), torch.where(idle, prev_norm, limited)


def sum_blocks(function: Callable[[Tensor, Block], Tensor], own: Tensor, place: Place, *dims: int) -> Tensor:
    """`function(rows, block)` of all of a tensor, summed over `dims` (kept, of size 1): over blocks and ranks."""
    cuts = blocks(tuple(own.shape), own.device, whole=1)
    if len(cuts) == 1:
        return place.sum(function(own, ()).sum(dims, keepdim=True), *dims)
    shape = [1 if d - own.ndim in dims else size for d, size in enumerate(own.shape)]
    total = torch.zeros(shape, dtype=torch.float32, device=own.device)
    for at in cuts:
        part(total, at).add_(function(part(own, at), at).sum(dims, keepdim=True))
    return place.sum(total, *dims)


def weighted_squares(grad: Tensor, weights: Tensor | None, place: Place, dim: int) -> Tensor:
    """`(G * G * weights).sum(dim, keepdim=True)`, fp32, of weights that broadcast to G; None: ones."""

    def squares(block: Tensor, at: Block) -> Tensor:
        square = block.float().square()
        return square if weights is None else square * part(weights, at)

    return in_memory(sum_blocks(squares, grad, place, dim))


def reciprocal(squares: Tensor) -> Tensor:
    """`1 / squares`, and 0 where there is nothing to divide by: an average of zeros goes by way of 1e-40 to 0."""
    return in_memory((1 / squares).masked_fill(squares < 1e-30, 0.0))


def orthogonalise(matrix: Tensor, steps: int, eps: float, precision: str) -> Tensor:
    """Near the orthogonal matrix that is nearest to (.., m, n): Newton-Schulz, of the quintic of Jordan et al. (2024).

    `precision`: "bfloat16" or "float32", of the products and of what comes out. Singular values end in 0.7 .. 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(getattr(torch, precision))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    norm: Tensor = vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=eps)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm  # each sum rounded once
    for _ in range(steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# --- projections ---


def random_basis(place: Place, rank: int, proj: str, key: Key, device: torch.device) -> Tensor:
    """The basis of this key for a gradient (.., c, k) of `place`, whole on every rank, fp32. (Of a batch: one each.)

    `gaussian`: N(0, 1/r), the paper's. `rademacher`: +-1/sqrt(r). `sketch` (CountSketch; Kane & Nelson 2014):
    entry j of the small side goes to column j mod r with a random sign; one pass over G and no matrix product.
    """
    *batch, _, k = place.shape
    stack = math.prod(batch)

    def positions(n: int) -> Tensor:
        return torch.arange(stack * n, dtype=torch.int64, device=device)

    if proj == "sketch":
        sign = signs(positions(k), key)
        return in_memory(sign.reshape(*sign.shape[:-1], *batch, k))
    if proj == "rademacher":
        sign = signs(positions(k * rank), key)
        return sign.reshape(*sign.shape[:-1], *batch, k, rank) / math.sqrt(rank)
    half = (k * rank + 1) // 2  # each hash pair gives two normals: one for either half of a matrix
    normals = [t.reshape(*t.shape[:-1], stack, half) for t in normal_pairs(positions(half), key)]
    pairs = torch.cat(normals, dim=-1)[..., : k * rank]
    return in_memory(pairs.reshape(*pairs.shape[:-2], *batch, k, rank) / math.sqrt(rank))


def svd_basis(grad_ck: Tensor, rank: int) -> Tensor:
    """The top r right singular vectors P (.., k, r) of a whole gradient, each with a positive largest entry, fp32."""
    finite_ck = grad_ck.float().nan_to_num(0.0, 0.0, 0.0)  # svd raises on others; the step is skipped
    _, _, vh = torch.linalg.svd(finite_ck, full_matrices=False)
    basis: Tensor = vh[..., :rank, :].mT
    peak = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    return basis * peak.sign()


def project(grad_ck: Tensor, basis: Tensor, rank: int, place: Place) -> Tensor:
    """R = G P, (.., c, k) -> (.., c, r), fp32: of this rank's channels, if G is split at all."""
    return place.to_channels(_own_products(grad_ck, basis, rank, place))


def _own_products(grad_ck: Tensor, basis: Tensor, rank: int, place: Place) -> Tensor:
    """G P of what this rank has of G: where the compressed side is split, a part of each sum."""
    sketched, own = basis.ndim < grad_ck.ndim, _own_rows(basis, grad_ck, place)

    def rows(block: Tensor, at: Block) -> Tensor:
        here = own[at[: grad_ck.ndim - 2]]
        if sketched:
            return _bucket_sums(block.float() * here.unsqueeze(-2), place.offsets[-1], rank)
        if place.stack:  # one product of all is rounded otherwise
            return torch.stack([one @ of_one for one, of_one in zip(block.float(), here, strict=True)])
        return block.float() @ here

    if torch.compiler.is_compiling() and not sketched and grad_ck.dtype is not torch.float32:
        # a product wants its operands in memory: the fp32 copy of an eighth at a time
        return torch.cat([rows(block, ()) for block in grad_ck.chunk(8, -2)], -2)
    return by_rows(rows, grad_ck)


def project_with_norms(grad_ck: Tensor, basis: Tensor, rank: int, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """R = G P, the norms of its channels and those of G's: compiled one pass over G where that is possible."""
    sketched = basis.ndim < grad_ck.ndim
    if place.mesh is not None or not torch.compiler.is_compiling() or not (sketched or rank == 1):
        low_cr, grad_c1 = _own_products(grad_ck, basis, rank, place), channel_norms(grad_ck)
        if place.splits(-1):  # both in one
            both = place.to_channels(torch.cat([low_cr, grad_c1.square()], -1))
            low_cr, square_c1 = both[..., :rank], both[..., rank:]
            grad_c1 = square_c1.sqrt()
        return low_cr, channel_norms(low_cr), grad_c1
    grad, across = grad_ck.float(), lies_across(grad_ck)
    if sketched:
        low_cr, square = _bucket_sums(grad * basis.unsqueeze(-2), 0, rank), _bucket_sums(grad.square(), 0, rank)
    else:
        low_cr, square = _channel_sums(grad * basis.mT, across), grad.square()
    return low_cr, _channel_sums(low_cr.square(), across).sqrt(), _channel_sums(square, across).sqrt()


def own_matrices(basis: Tensor, place: Place) -> Tensor:
    """A whole basis, of those matrices of a stack that this rank has a part of."""
    return basis[tuple(slice(s, s + n) for s, n in zip(place.offsets[:-2], place.own[:-2], strict=True))]


def _own_rows(basis: Tensor, grad_ck: Tensor, place: Place) -> Tensor:
    """What this rank's part of a gradient meets of a whole basis."""
    if place.mesh is None:
        return basis
    first, dim = place.offsets[-1], grad_ck.ndim - 2
    return own_matrices(basis, place).narrow(dim, first, grad_ck.shape[-1])


def factors(low_cr: Tensor, basis: Tensor, grad_ck: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """The two factors of R P^T, (.., c, 1, r) and (.., 1, k, r), of this rank's part: `projected_back` takes them.

    Each has the gradient's sizes or 1 but for its last one, so that `State.at` cuts it as it cuts the gradient.
    """
    return place.from_channels(low_cr).unsqueeze(-2), _own_rows(basis, grad_ck, place).unsqueeze(-3)


def whole_factors(whole_cr: Tensor, basis: Tensor, grad_ck: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """`factors` of an R (.., c, r) of which every rank has all: nothing is sent."""
    own_cr = own_matrices(whole_cr, place).narrow(-2, place.offsets[-2], grad_ck.shape[-2])
    return own_cr.unsqueeze(-2), _own_rows(basis, grad_ck, place).unsqueeze(-3)


def projected_back(low_c1r: Tensor, basis_1kr: Tensor) -> Tensor:
    """R P^T (.., c, k), of all of `factors` or of a block."""
    return low_c1r.squeeze(-2) @ basis_1kr.squeeze(-3).mT


def _bucket_sums(signed_ck: Tensor, first: int, rank: int) -> Tensor:
    """Column j, the whole matrix's number `first + j`, added to bucket number mod r: (.., c, k) -> (.., c, r)."""
    k = signed_ck.shape[-1]
    even = k - k % rank
    sums = signed_ck[..., :even].reshape(*signed_ck.shape[:-1], k // rank, rank).sum(-2)
    if even < k:
        sums = sums + torch.constant_pad_nd(signed_ck[..., even:], (0, rank - k % rank))
    return sums.roll(first % rank, -1) if first % rank else sums
