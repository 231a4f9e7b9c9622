"""The steps of the later rivals: the papers' formulas in fp64, and what must hold in the limit."""

import math

import pytest
import torch
from test_rivals import MATRICES, gradients, norm, steps, steps_and_states
from torch import Tensor, nn

from apollo_optim import RuleOptimizer
from apollo_optim.rules.dct_adamw import cosines

FULL = [(30, 20), (20, 30)]


def channels(t: Tensor, like: tuple[int, ...]) -> Tensor:
    """The longer side of a matrix of shape `like` first; and back."""
    return t.mT if like[-2] < like[-1] else t


def smooth(shape: tuple[int, ...], count: int = 5) -> list[Tensor]:
    """Gradients whose singular values lie far apart, so that roundings turn no basis."""
    draw = torch.Generator().manual_seed(3)
    short = min(shape[-2:])
    decay = 0.7 ** torch.arange(short, dtype=torch.float64)
    grads = []
    for _ in range(count):
        u, v = (torch.linalg.qr(torch.randn(*shape[:-2], n, short, generator=draw).double())[0] for n in shape[-2:])
        grads.append(((u * decay) @ v.mT).float())
    return grads


@MATRICES
def test_sumo_is_the_papers(shape):
    """The momentum moves into the new basis, and is orthogonalised exactly; a quarter of it is stepped."""
    rank, gap, grads = 3, 2, smooth(shape)
    momentum = basis = torch.zeros(())
    for t, (grad, our) in enumerate(zip(grads, steps("sumo", grads, rank=rank, update_proj_gap=gap), strict=True)):
        g = channels(grad.double(), shape)
        if t % gap == 0:
            new = torch.linalg.svd(g, full_matrices=False).Vh[..., :rank, :].mT
            momentum, basis = momentum @ (basis.mT @ new) if t else momentum, new
        momentum = 0.95 * momentum + g @ basis  # the paper's sum: the same direction as an average
        u, _, vh = torch.linalg.svd(momentum, full_matrices=False)
        torch.testing.assert_close(our, channels(0.25 * u @ vh @ basis.mT, shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", FULL, ids=str)
def test_sumo_with_a_basis_of_all_is_exact_muon(shape):
    grads = smooth(shape)
    momentum = torch.zeros(shape, dtype=torch.float64)
    for grad, our in zip(grads, steps("sumo", grads, rank=19, update_proj_gap=99, scale=1.0), strict=True):
        momentum = 0.95 * momentum + 0.05 * grad.double()
        u, _, vh = torch.linalg.svd(momentum, full_matrices=False)
        overlap = (our * (u @ vh)).sum() / norm(our, -2, -1).squeeze() / math.sqrt(20)
        assert overlap > 0.9, overlap  # one of 20 directions is not in the basis


def test_sumo_steps_nothing_where_there_was_no_gradient():
    assert not steps("sumo", [torch.zeros(12, 8)], rank=4)[0].any()


def test_cosines_are_the_orthonormal_transform():
    """DCT-II by its formula in fp64, at a size at which fp32 products of indices are wrong."""
    k = 5000
    columns = torch.tensor([0.0, 1.0, 17.0, 2499.0, 4999.0])
    j = torch.arange(k, dtype=torch.float64)[:, None]
    exact = math.sqrt(2 / k) * torch.cos(math.pi * (2 * j + 1) * columns.double() / (2 * k))
    exact[:, 0] = math.sqrt(1 / k)
    torch.testing.assert_close(cosines(columns, k).double(), exact, rtol=0, atol=1e-8)
    every = cosines(torch.arange(64, dtype=torch.float32), 64).double()
    torch.testing.assert_close(every.mT @ every, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-6)


@MATRICES
def test_dct_adamw_is_the_papers(shape):
    rank, gap, grads = 3, 2, smooth(shape)
    k = min(shape[-2:])
    every = cosines(torch.arange(k, dtype=torch.float32), k).double()
    m = v = old = torch.zeros(())
    ours = steps("dct-adamw", grads, rank=rank, update_proj_gap=gap)
    for t, (grad, our) in enumerate(zip(grads, ours, strict=True)):
        g = channels(grad.double(), shape)
        if t % gap == 0:
            chosen = norm(g @ every, -2).squeeze(-2).topk(rank).indices.sort().values
            basis = torch.stack([every[:, one] for one in chosen.reshape(-1, rank)]).reshape(*g.shape[:-2], k, rank)
            if t:
                m, v = m @ (old.mT @ basis), (v @ (old.mT @ basis)).abs()
            old = basis
        low = g @ basis
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 1e-3 * low.square()
        stepped = m / (1 - 0.9 ** (t + 1)) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        expected = channels(stepped @ basis.mT, shape)  # entries beside zero are roundings, and Adam stretches them
        assert norm(our - expected, -2, -1).max() < 1e-3 * norm(expected, -2, -1).max()


def test_dct_adamw_keeps_the_numbers_of_its_columns():
    p = nn.Parameter(torch.zeros(64, 48))
    optimizer = RuleOptimizer([p], "dct-adamw", rank=8)
    p.grad = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    state = optimizer.state[p]
    assert {name: tuple(t.shape) for name, t in state.items() if isinstance(t, Tensor) and t.ndim} == {
        "exp_avg": (64, 8), "exp_avg_sq": (64, 8), "columns": (1, 8),
    }  # fmt: skip
    assert len(set(state["columns"].flatten().tolist())) == 8


@MATRICES
def test_sage_is_the_papers(shape):
    grads = gradients(shape, 8)
    m, size = torch.zeros(shape, dtype=torch.float64), 0.0
    for t, (grad, our) in enumerate(zip(grads, steps("sage", grads), strict=True), 1):
        g = grad.double()
        now = g.abs().mean(-2, keepdim=True)
        size = 0.99 * size + 0.01 * now
        dampers = [s.square().mean(-1, keepdim=True).sqrt() / (s + 1e-8) for s in (size / (1 - 0.99**t), now)]
        expected = (0.9 * m + 0.1 * g).sign() * torch.minimum(*dampers).clamp(max=1.0)
        torch.testing.assert_close(our, expected, rtol=1e-4, atol=1e-6)
        assert our.abs().max() <= 1
        m = 0.99 * m + 0.01 * g


def test_sage_of_columns_alike_is_lion():
    signs = [torch.randn(30, 20, generator=torch.Generator().manual_seed(i)).sign() for i in range(5)]
    for sage, lion in zip(steps("sage", signs), steps("lion", signs), strict=True):
        torch.testing.assert_close(sage, lion, rtol=1e-6, atol=0)


@MATRICES
def test_lora_pre_is_the_papers(shape):
    rank, grads = 3, gradients(shape, 6)
    c, k = max(shape[-2:]), min(shape[-2:])
    start = torch.eye(k, rank).double().expand(*shape[:-2], k, rank)
    pairs = [(torch.zeros(*shape[:-2], c, rank).double(), start), (torch.zeros(*shape[:-2], c, rank).double(), start)]
    rates = 1 - 0.9**0.5, 1 - 0.999**0.25

    def inverse(t: Tensor) -> Tensor:
        gram = t.mT @ t
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        return t @ torch.linalg.inv(gram + torch.eye(rank).double() * (1e-6 * mean + 1e-30))

    for t, (grad, our) in enumerate(zip(grads, steps("lora-pre", grads, rank=rank), strict=True), 1):
        g = channels(grad.double(), shape)
        for i, (target, rate) in enumerate(zip((g, g.abs()), rates, strict=True)):
            b, a = pairs[i]
            pairs[i] = (
                (1 - rate) * b + rate * target @ inverse(a),
                (1 - rate) * a + rate * target.mT @ inverse(b),
            )
        (b1, a1), (b2, a2) = pairs
        m = 0.9 * b1 @ a1.mT + 0.1 * g
        v = 0.999 * (b2 @ a2.mT).square() + 1e-3 * g.square()
        expected = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        expected = channels(expected, shape)
        assert norm(our - expected, -2, -1).max() < 2e-3 * norm(expected, -2, -1).max()


def test_lora_pre_finds_a_gradient_of_low_rank():
    """It stays the same; after a while both moments hold all of it, and a step is sign(G), as Adam's."""
    draw = torch.Generator().manual_seed(0)
    grad = torch.randn(30, 1, generator=draw) @ torch.randn(1, 20, generator=draw)
    last = steps("lora-pre", [grad] * 200, rank=2, betas=(0.9, 0.9))[-1]
    torch.testing.assert_close(last, grad.sign().double(), rtol=0, atol=0.05)


def test_q_galore_is_galore_but_for_roundings():
    """A code is a seventh of the largest of 64 entries: a quarter of a step is noise, whose mean is zero."""
    draw = torch.Generator().manual_seed(1)
    grads = [grad + 0.02 * torch.randn(grad.shape, generator=draw) for grad in smooth((128, 96), 6)]
    galore = steps("galore", grads, rank=64, update_proj_gap=3)
    ours, states = steps_and_states("q-galore", grads, rank=64, update_proj_gap=3)
    for our, their in zip(ours, galore, strict=True):
        assert norm(our - their, -2, -1) < 0.35 * norm(their, -2, -1)
    state = states[-1]
    assert (state["basis"].dtype, state["exp_avg"].dtype) == (torch.uint8, torch.int8)
    assert state["basis"].shape == (96, 32)


def test_q_galore_of_small_matrices_is_galore():
    """Nothing of it fits the codes: the very numbers."""
    grads = smooth((30, 20), 6)
    for our, their in zip(*(steps(n, grads, rank=3, update_proj_gap=2) for n in ("q-galore", "galore")), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-7)


def test_a_subspace_that_stays_is_refreshed_less_and_less():
    """At 1, then 2 (alike), 4, 8, ...: after each that is like the one before the wait doubles."""
    grad = smooth((30, 20), 1)[0]
    _, states = steps_and_states("q-galore", [grad] * 16, rank=3, update_proj_gap=1)
    assert [int(state["doublings"]) for state in states] == [0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4]
    changing = smooth((30, 20), 8)
    _, states = steps_and_states("q-galore", changing, rank=3, update_proj_gap=1, threshold=0.9)
    assert not states[-1]["doublings"].any()
    _, states = steps_and_states("q-galore", [grad] * 8, rank=3, update_proj_gap=1, alike=3)
    assert [int(state["doublings"]) for state in states] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_q_galore_takes_no_decomposition_that_is_not_due(monkeypatch):
    made = []
    monkeypatch.setattr(
        "apollo_optim.rules.q_galore.svd_basis", lambda g, r: made.append(1) or torch.eye(g.shape[-1])[:, :r]
    )
    steps_and_states("q-galore", [smooth((30, 20), 1)[0]] * 8, rank=3, update_proj_gap=1)
    assert len(made) == 4  # steps 1, 2, 4 and 8
