"""The rivals' steps against installed packages, the papers' formulas in fp64, and what must hold in the limit."""

import pytest
import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from apollo_optim import RuleOptimizer, rule_of
from apollo_optim.core import blocks as blocks_module
from apollo_optim.core.matrix import orthogonalise, svd_basis
from apollo_optim.rules import RULES

MATRICES = pytest.mark.parametrize("shape", [(30, 20), (20, 30), (3, 12, 8)], ids=str)
BLOCKS = pytest.mark.parametrize("size", [1 << 20, 64], ids=["whole", "in blocks"])


def gradients(shape: tuple[int, ...], count: int = 5) -> list[Tensor]:
    """Rows and columns of very different sizes, and a row that is zero in the second."""
    draw = torch.Generator().manual_seed(0)
    sizes = 10 ** torch.randn(*shape[:-1], 1, generator=draw) * 10 ** torch.randn(shape[-1], generator=draw)
    grads = [torch.randn(shape, generator=draw) * sizes for _ in range(count)]
    grads[1].select(-2, 0).zero_()
    return grads


def steps_and_states(rule: str, grads: list[Tensor], **knobs) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What each step at lr 1 takes off the weight, in fp64, and the tensors of the state after it."""
    p = nn.Parameter(torch.zeros(grads[0].shape))
    optimizer = RuleOptimizer([p], rule, lr=1.0, compile=False, **knobs)
    taken, states = [], []
    for grad in grads:
        with torch.no_grad():
            p.zero_()
        p.grad = grad.clone()
        optimizer.step()
        taken.append(-p.detach().double())
        states.append({name: t.clone() for name, t in optimizer.state[p].items() if isinstance(t, Tensor)})
    return taken, states


def steps(rule: str, grads: list[Tensor], **knobs) -> list[Tensor]:
    """What each step at lr 1 takes off the weight."""
    return steps_and_states(rule, grads, **knobs)[0]


def norm(t: Tensor, *dims: int) -> Tensor:
    return vector_norm(t, dim=dims, keepdim=True)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("shape", [(30, 20), (7,), ()], ids=str)
def test_sgd_is_torchs(shape, momentum, nesterov):
    """To the last bit or two; torch's weight decay is not decoupled."""
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=draw)
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    kwargs = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov}
    pair = torch.optim.SGD([theirs], **kwargs), RuleOptimizer([ours], "sgd", **kwargs)
    for _ in range(20):
        theirs.grad = torch.randn(shape, generator=draw)
        ours.grad = theirs.grad.clone()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert ("momentum_buffer" in pair[1].state[ours]) == (momentum > 0)


def test_sgds_decay_is_decoupled():
    p = nn.Parameter(torch.ones(4))
    optimizer = RuleOptimizer([p], "sgd", lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(3):
        p.grad = torch.zeros(4)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.95**3))
    assert not optimizer.state[p]["momentum_buffer"].any()


def test_lion_is_the_papers():
    """Program 1 of 2302.06675, entry by entry: +-lr, and the average moves after the sign was taken."""
    grads = gradients((30, 20), 20)
    m = torch.zeros(30, 20, dtype=torch.float64)
    for grad, our in zip(grads, steps("lion", grads, beta1=0.8, beta2=0.95), strict=True):
        g = grad.double()
        assert torch.equal(our, torch.sign(0.8 * m + 0.2 * g))
        m = 0.95 * m + 0.05 * g


@BLOCKS
@MATRICES
def test_normuon_is_muon_with_its_rows_normalised(monkeypatch, shape, size):
    """Equation by equation, with Muon's direction (torch.optim.Muon's: test_parity.py), and of Muon's norm."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = gradients(shape)
    of_muon = steps("muon", grads)
    m, v = torch.zeros(shape), torch.zeros(*shape[:-1], 1)
    for grad, muon, our in zip(grads, of_muon, steps("normuon", grads, beta2=0.9), strict=True):
        m = 0.95 * m + 0.05 * grad
        o = orthogonalise(0.95 * m + 0.05 * grad, 5, 1e-7, "float32")
        v = 0.9 * v + 0.1 * o.square().mean(-1, keepdim=True)
        expected = (o / v.sqrt()).double()
        torch.testing.assert_close(our / norm(our, -2, -1), expected / norm(expected, -2, -1), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(norm(our, -2, -1), norm(muon, -2, -1), rtol=1e-5, atol=0)
    first = steps("normuon", grads[:1], beta2=0.0)[0]
    alike = norm(first, -2, -1).expand(*shape[:-1], 1) / shape[-2] ** 0.5
    torch.testing.assert_close(norm(first, -1), alike, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rule", ["muon", "normuon"])
@BLOCKS
@MATRICES
def test_a_stateless_muon_steps_each_gradient_as_the_first(monkeypatch, shape, size, rule):
    """Of one gradient its average is a multiple, and the orthogonal matrix the same; no tensor of a weight is kept."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = gradients(shape)
    taken, states = steps_and_states(rule, grads, stateless=True, **({"beta2": 0.0} if rule == "normuon" else {}))
    for grad, our in zip(grads, taken, strict=True):
        expected = steps(rule, [grad], nesterov=False, **({"beta2": 0.0} if rule == "normuon" else {}))[0]
        torch.testing.assert_close(our, expected, rtol=1e-3, atol=1e-4)
    for state in states:
        assert "exp_avg" not in state
        assert all(t.numel() < grads[0].numel() for t in state.values())


@BLOCKS
@MATRICES
def test_racs_is_the_papers(monkeypatch, shape, size):
    """Five rounds, averages from the first value, the limiter: in plain fp64."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = gradients(shape)
    q = s = previous = None
    for grad, our in zip(grads, steps("racs", grads, alpha=0.5), strict=True):
        g = grad.double()
        new_q = torch.ones(*shape[:-1], 1, dtype=torch.float64)
        for _ in range(5):
            new_s = (g**2 * new_q).sum(-2, keepdim=True) / norm(new_q, -2) ** 2
            new_q = (g**2 * new_s).sum(-1, keepdim=True) / norm(new_s, -1) ** 2
        q, s = (new if old is None else 0.9 * old + 0.1 * new for old, new in ((q, new_q), (s, new_s)))
        x = g / q.sqrt() / s.sqrt()
        size_x = norm(x, -2, -1)
        limited = size_x if previous is None else torch.minimum(size_x, 1.01 * previous)
        torch.testing.assert_close(our, 0.5 * x * limited / size_x, rtol=1e-4, atol=1e-6)
        previous = limited


def test_racs_finds_the_best_approximation_of_rank_one():
    """The fixed point: q s^T is the first term of the singular value decomposition of G * G."""
    (grad,) = gradients((30, 20), 2)[:1]
    p = nn.Parameter(torch.zeros(30, 20))
    optimizer = RuleOptimizer([p], "racs", rounds=50)
    p.grad = grad
    optimizer.step()
    state = optimizer.state[p]
    u, sigma, vh = torch.linalg.svd(grad.double() ** 2)
    best = sigma[0] * u[:, :1] @ vh[:1]
    found = state["row"].double() @ state["col"].double()
    assert (found - best).norm() <= 1e-5 * best.norm()


@pytest.mark.parametrize("rule", ["racs", "sinkgd"])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e6])
def test_the_gradients_size_does_not_matter(rule, size):
    """Not even where the square of its square is no number of fp32."""
    draw = torch.Generator().manual_seed(2)
    grad = torch.randn(30, 20, generator=draw)
    torch.testing.assert_close(*(steps(rule, [g])[0] for g in (grad * size, grad)), rtol=1e-4, atol=1e-6)


def test_a_zero_gradient_leaves_racs_averages_alone():
    """At the start, as torch's checkpoint code steps once with it, and in mid-run."""
    grads = gradients((30, 20), 4)
    grads = [grads[0], *grads[2:]]
    zero = torch.zeros(30, 20)
    plain = steps("racs", grads)
    with_zeros = steps("racs", [zero, grads[0], zero, zero, *grads[1:]])
    assert not with_zeros[0].any()
    for a, b in zip(plain, [with_zeros[1], *with_zeros[4:]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["racs", "sinkgd"])
def test_what_has_no_gradient_for_long_stands_still(rule):
    """Rows of an embedding whose tokens do not come: their average goes by way of 1e-40 to 0, and 0 / 0 is no step."""
    grads = gradients((30, 20), 50)
    for grad in grads[1:-1]:
        grad[:, 5], grad[3] = 1e-20, 0.0
    taken = steps(rule, grads, **({"beta": 0.1} if rule == "racs" else {}))
    assert all(step.isfinite().all() for step in taken)
    assert not any(step[3].any() for step in taken[1:-1])
    assert taken[-1][3].all()


@BLOCKS
@MATRICES
@pytest.mark.parametrize("rounds", [1, 5])
def test_sinkgd_is_the_papers(monkeypatch, shape, size, rounds):
    """Rows to sqrt(n), columns to sqrt(m), in turns, on the matrix itself; rows of zeros stay zero."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = gradients(shape, 2)
    *_, m, n = shape
    for grad, our in zip(grads, steps("sinkgd", grads, rounds=rounds), strict=True):
        x = grad.double()
        for _ in range(rounds):
            x = (x * n**0.5 / norm(x, -1)).nan_to_num(0.0)
            x = x * m**0.5 / norm(x, -2)
        torch.testing.assert_close(our, 0.05 * x, rtol=1e-4, atol=1e-7)


@MATRICES
def test_many_rounds_of_sinkgd_bring_rows_and_columns_to_one_size(shape):
    (x,) = steps("sinkgd", gradients(shape, 2)[:1], rounds=200, alpha=1.0)
    *_, m, n = shape
    torch.testing.assert_close(norm(x, -2), torch.full_like(norm(x, -2), m**0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm(x, -1), torch.full_like(norm(x, -1), n**0.5), rtol=1e-4, atol=0)


def test_the_width_rule_of_axolotls_sinkgd():
    """The rate of a matrix falls with its inputs, from the width that it was found at."""
    grads = gradients((30, 20), 2)
    for ours, papers in zip(steps("sinkgd", grads, base_width=5), steps("sinkgd", grads), strict=True):
        torch.testing.assert_close(ours, papers * 5 / 20)


@BLOCKS
@MATRICES
@pytest.mark.parametrize("nesterov", [False, True])
def test_rmnp_is_the_papers(monkeypatch, shape, size, nesterov):
    """Rows of the momentum, of norm 1 or of RMS 0.2; a row of zeros stays."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = gradients(shape)
    grads[0].select(-2, 1).zero_()
    m = torch.zeros(shape, dtype=torch.float64)
    pairs = (steps("rmnp", grads, nesterov=nesterov, size=of) for of in ("original", "match_rms_adamw"))
    for grad, papers, matched in zip(grads, *pairs, strict=True):
        g = grad.double()
        m = 0.95 * m + 0.05 * g
        d = 0.95 * m + 0.05 * g if nesterov else m
        torch.testing.assert_close(papers, (d / norm(d, -1)).nan_to_num(0.0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(matched, papers * 0.2 * shape[-1] ** 0.5, rtol=1e-5, atol=0)


def test_rmnp_is_scale_with_a_momentum_and_muon_of_orthogonal_rows():
    grads = gradients((30, 20))
    for rmnp, scale in zip(steps("rmnp", grads, momentum=0.9), steps("scale", grads, momentum=0.9), strict=True):
        torch.testing.assert_close(rmnp, 0.2 * scale)
    rows = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(3)))[0]
    ours = steps("rmnp", [rows], size="original")[0]
    torch.testing.assert_close(ours, rows.double(), rtol=1e-5, atol=1e-6)  # the nearest orthogonal matrix is itself


def lying_tall(t: Tensor) -> Tensor:
    return t.mT if t.shape[-2] < t.shape[-1] else t


def galores(
    grads: list[Tensor], rank: int, gap: int = 3, scale: float = 0.25, eps: float = 1e-6, kept: float | None = None
) -> list[Tensor]:
    """The steps of 2403.03507 in dense fp64; with 2410.01623's rest, G - kept R P^T, where `kept` is said.

    Signs of singular vectors are ours (`svd_basis`, on the gradients in fp32): the moments outlive a basis.
    """
    m = v = previous = None
    taken = []
    for t, grad in enumerate(grads, 1):
        g = lying_tall(grad.double())
        if (t - 1) % gap == 0:
            p = svd_basis(lying_tall(grad), rank).double()
        r = g @ p
        m, v = (0.1 * r, 1e-3 * r**2) if m is None else (0.9 * m + 0.1 * r, 0.999 * v + 1e-3 * r**2)
        n = m / (v.sqrt() + eps)
        step = scale * n @ p.mT
        if kept is not None:
            rest = norm(n, -1) / (norm(r, -1) + 1e-8) * (g - kept * r @ p.mT)
            size = norm(rest, -2, -1)
            limited = size if previous is None else torch.minimum(size, 1.01 * previous)
            step, previous = step + rest * limited / size, limited
        step = step * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        taken.append(step.mT if grad.shape[-2] < grad.shape[-1] else step)
    return taken


@BLOCKS
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 16), (3, 12, 8)], ids=str)
@pytest.mark.parametrize("rule", ["galore", "fira"])
def test_galore_and_fira_are_the_papers(monkeypatch, rule, shape, size):
    """Over three bases, tall, wide, square and of a stack."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    draw = torch.Generator().manual_seed(4)
    grads = [torch.randn(shape, generator=draw) * (1 + t % 3) for t in range(8)]
    ours = steps(rule, grads, rank=5, update_proj_gap=3)
    for our, papers in zip(ours, galores(grads, 5, kept=1.0 if rule == "fira" else None), strict=True):
        assert (our - papers).norm() <= 1e-5 * papers.norm()


@pytest.mark.parametrize("rule", ["galore", "fira"])
def test_galore_in_a_basis_that_holds_everything_is_adamw(monkeypatch, rule):
    """Columns of an identity, and gradients that lie within: Adam's step; Fira has nothing to add to GaLore's."""
    monkeypatch.setattr(RULES[rule], "basis", lambda self, grad, *_: torch.eye(grad.shape[-1])[:, : self.rank])
    grads = gradients((30, 20))
    for grad in grads:
        grad[:, 7:] = 0
    adam = steps("adamw", grads, eps=0.0)
    for our, full in zip(steps(rule, grads, rank=7, scale=1.0, eps=0.0), adam, strict=True):
        torch.testing.assert_close(our[:, :7].nan_to_num(0.0), full[:, :7].nan_to_num(0.0), rtol=1e-5, atol=1e-6)


def test_firas_rest_is_what_galore_leaves_out():
    """Without a limit, and past Adam's correction, which multiplies all: channel by channel phi (G - G P P^T)."""
    (grad,) = gradients((30, 20))[:1]
    fira, galore = (steps(rule, [grad], rank=4, eps=0.0)[0] for rule in ("fira", "galore"))
    p = svd_basis(grad, 4).double()
    rest = fira - galore
    assert (rest @ p).norm() <= 1e-5 * rest.norm(), "orthogonal to the subspace"
    g = grad.double()
    papers = (g - g @ p @ p.mT) * 4**0.5 / norm(g @ p, -1)  # of one step: N of signs, ||N|| = sqrt(r)
    assert (rest - papers).norm() <= 1e-5 * papers.norm()


def test_galore_draws_its_basis_where_it_is_told_to():
    """At random, from the seed alone: a step is of the basis' rank."""
    grads = gradients((30, 20), 7)
    taken = [steps("galore", grads, rank=4, proj="gaussian", update_proj_gap=3, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(taken[0][6], taken[1][6])
    assert not torch.equal(taken[0][6], taken[2][6])
    ranks = [int(torch.linalg.matrix_rank(step, rtol=1e-4)) for step in taken[0]]
    assert max(ranks) <= 4


@BLOCKS
@MATRICES
@pytest.mark.parametrize("rows", [1, 2])
def test_adam_mini_is_the_papers(monkeypatch, shape, size, rows):
    """One second moment for each row, or for two neighbours, in plain fp64."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = gradients(shape)
    m = v = torch.zeros(shape, dtype=torch.float64)
    for t, (grad, our) in enumerate(zip(grads, steps("adam-mini", grads, block_rows=rows), strict=True), 1):
        g = grad.double()
        blocks = g.square().unflatten(-2, (-1, rows)).mean((-2, -1), keepdim=True)
        square = blocks.expand(*blocks.shape[:-2], rows, g.shape[-1]).flatten(-3, -2)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 1e-3 * square
        papers = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(our, papers, rtol=1e-4, atol=1e-6)


def test_adam_mini_of_rows_of_one_entry_is_adamw():
    grads = gradients((30, 1))
    for mini, adamw in zip(steps("adam-mini", grads), steps("adamw", grads), strict=True):
        torch.testing.assert_close(mini, adamw, rtol=1e-5, atol=1e-7)


@BLOCKS
@MATRICES
@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize(("share", "dim"), [("rows", -1), ("columns", -2)])
def test_slimadam_is_the_papers(monkeypatch, shape, size, share, dim, averaged):
    """One second moment for each row or column, in plain fp64; without an average no state of the weight's size."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = gradients(shape)
    m = v = torch.zeros(shape, dtype=torch.float64)
    for t, (grad, our) in enumerate(
        zip(grads, steps("slimadam", grads, share=share, averaged=averaged), strict=True), 1
    ):
        g = grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 1e-3 * g.square().mean(dim, keepdim=True)
        stepped = m / (1 - 0.9**t) if averaged else g
        torch.testing.assert_close(our, stepped / ((v / (1 - 0.999**t)).sqrt() + 1e-8), rtol=1e-4, atol=1e-6)


def test_slimadam_of_rows_is_adam_mini():
    grads = gradients((30, 20))
    for slim, mini in zip(steps("slimadam", grads), steps("adam-mini", grads), strict=True):
        assert torch.equal(slim, mini)


def test_slimadam_without_an_average_keeps_a_number_a_row():
    p = nn.Parameter(torch.zeros(12, 8))
    optimizer = RuleOptimizer([p], "slimadam", averaged=False)
    p.grad = torch.ones(12, 8)
    optimizer.step()
    assert {name: state.shape for name, state in optimizer.state[p].items() if name.startswith("exp_")} == {
        "exp_avg_sq_shared": (12, 1)
    }


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (3, 12, 8)], ids=str)
def test_swan_is_the_papers(shape):
    """Singular vectors of the standardised gradient, singular values nearly one, its norm: RMS 1."""
    draw = torch.Generator().manual_seed(0)
    sizes, means = torch.randn(shape[-2], 1, generator=draw).exp(), torch.randn(shape[-2], 1, generator=draw)
    grads = [torch.randn(shape, generator=draw) * sizes + means for _ in range(3)]
    for grad, our in zip(grads, steps("swan", grads), strict=True):
        g = grad.double()
        standard = (g - g.mean(-1, keepdim=True)) / g.std(-1, correction=0, keepdim=True)
        u, values, vh = torch.linalg.svd(standard, full_matrices=False)
        inside = u.mT @ our @ vh.mT
        own = inside.diagonal(dim1=-2, dim2=-1) / norm(our, -2, -1).squeeze(-1) * values.shape[-1] ** 0.5
        rank = values > 1e-6 * values[..., :1]  # rows without their mean may leave a dimension out
        assert ((own > 0.5) & (own < 1.5))[rank].all(), own  # 0.7 to 1.2 over their RMS
        torch.testing.assert_close(inside, torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)
        torch.testing.assert_close(norm(our, -2, -1), norm(standard, -2, -1), rtol=1e-5, atol=0)


def test_adam_mini_takes_whole_blocks_only():
    """A matrix whose rows a head does not divide uses AdamW, and the state is dn + m."""
    even, odd = nn.Parameter(torch.zeros(12, 8)), nn.Parameter(torch.zeros(10, 8))
    optimizer = RuleOptimizer([even, odd], "adam-mini", block_rows=4)
    assert [rule_of(p, optimizer.param_groups[0]) for p in (even, odd)] == ["adam-mini", "adamw"]
    even.grad = torch.ones(12, 8)
    optimizer.step()
    assert optimizer.state[even]["exp_avg_sq_row"].shape == (12, 1)


@BLOCKS
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 16), (3, 12, 8)], ids=str)
def test_flora_is_the_papers(monkeypatch, shape, keep, size):
    """The momentum moves from P to P, and Adafactor of its back-projection: dense, in fp64, with the bases it drew."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    drawn = {}
    draw_of = RULES["flora"].draw

    def draw(self, key, *args):
        return drawn.setdefault(key, draw_of(self, key, *args))

    monkeypatch.setattr(RULES["flora"], "draw", draw)
    grads = gradients(shape, 8)
    ours = steps("flora", grads, rank=5, update_proj_gap=3, keep_proj=keep)
    bases = [p.double() for p in drawn.values()]
    bases = bases if keep else [p for p in bases if p is not bases[1]]  # at the start, that of before it, too
    assert len(bases) == 3
    c, k = sorted(shape[-2:], reverse=True)
    m, row, col = (torch.zeros(*shape[:-2], *size, dtype=torch.float64) for size in ((c, 5), (c, 1), (1, k)))
    for t, (grad, our) in enumerate(zip(grads, ours, strict=True), 1):
        p = bases[(t - 1) // 3]
        if t in (4, 7):
            m = m @ bases[(t - 1) // 3 - 1].mT @ p
        m = 0.9 * m + 0.1 * lying_tall(grad.double()) @ p
        u = m @ p.mT
        row, col = (old + (u.square().mean(dim, keepdim=True) - old) * t**-0.8 for old, dim in ((row, -1), (col, -2)))
        u = u / (row * col / row.mean(-2, keepdim=True)).sqrt()
        u = u / (norm(u, -2, -1) / (c * k) ** 0.5).clamp(min=1.0)
        torch.testing.assert_close(lying_tall(our), u, rtol=1e-3, atol=1e-4)


def test_flora_in_a_basis_that_holds_everything_is_adafactor_on_a_momentum(monkeypatch):
    monkeypatch.setattr(RULES["flora"], "basis", lambda self, grad, *_: torch.eye(grad.shape[-1])[:, : self.rank])
    monkeypatch.setattr(RULES["flora"], "phase", lambda *_: False)
    grads, averages = gradients((30, 20)), []
    for grad in grads:
        grad[:, 7:] = 0
        averages.append(grad * 0.1 + (averages[-1] * 0.9 if averages else 0.0))
    for flora, adafactor in zip(steps("flora", grads, rank=7), steps("adafactor", averages), strict=True):
        torch.testing.assert_close(flora, adafactor, rtol=1e-3, atol=1e-4)


@BLOCKS
@pytest.mark.parametrize("shape", [(30, 20), (20, 32), (16, 16), (3, 12, 8)], ids=str)
@pytest.mark.parametrize("level", [0, 2])
def test_foam_is_the_papers(monkeypatch, shape, size, level):
    """Means of neighbours by the paper's matrices A and E, in fp64; at level 0 it is Adam without a correction."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = gradients(shape)
    unfold = torch.eye(shape[-1] >> level, dtype=torch.float64).repeat_interleave(1 << level, -1)
    fold = unfold.mT / (1 << level)
    m = v = torch.zeros(*shape[:-1], shape[-1] >> level, dtype=torch.float64)
    for grad, our in zip(grads, steps("foam", grads, level=level), strict=True):
        g = grad.double()
        m, v = 0.9 * m + 0.1 * g @ fold, 0.999 * v + 1e-3 * (g @ fold) ** 2
        rest = g - g @ fold @ unfold
        assert level or not rest.any()
        papers = 0.25 * (m @ unfold + rest) / ((v @ unfold + rest**2).sqrt() + 1e-6)
        torch.testing.assert_close(our, papers, rtol=1e-3, atol=1e-5)


def test_foam_folds_rows_that_blocks_divide():
    even, odd = nn.Parameter(torch.zeros(6, 8)), nn.Parameter(torch.zeros(4, 10))
    optimizer = RuleOptimizer([even, odd], "foam")
    assert [rule_of(p, optimizer.param_groups[0]) for p in (even, odd)] == ["foam", "adamw"]
    even.grad = torch.ones(6, 8)
    optimizer.step()
    assert optimizer.state[even]["exp_avg"].shape == (6, 2)
