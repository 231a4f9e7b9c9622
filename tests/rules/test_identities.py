"""Limits and identities: what must hold whatever the gradient."""

import math
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apollo_optim import AdamW, Apollo, ApolloMini, RuleOptimizer, rules
from apollo_optim.core.matrix import is_wide, limit_growth, project, random_basis, svd_basis
from apollo_optim.core.place import Place
from apollo_optim.core.random import Dither, dither, hash32, key_at, mix_seed, normal_pairs, signs, uniform
from apollo_optim.core.rounding import round_stochastically

KEY = key_at(mix_seed(0, 3), "projection", 2)
CPU = torch.device("cpu")


# ---- the hash: a file format


def test_golden_values_of_the_hash():
    """If this fails, every checkpoint's projections and rounding bits have changed: do not update, undo."""
    assert mix_seed(0, 0) == GOLDEN["mix_seed(0, 0)"]
    assert mix_seed(7, 41) == GOLDEN["mix_seed(7, 41)"]
    for (purpose, counter), words in GOLDEN["keys"].items():
        assert key_at(12345, purpose, counter) == words
    assert hash32(torch.tensor(GOLDEN["index"]), (123456789, -987654321)).tolist() == GOLDEN["hash"]
    assert signs(torch.arange(16), KEY).tolist() == GOLDEN["signs"]
    assert uniform(torch.arange(3), KEY).tolist() == GOLDEN["uniform"]
    first, second = normal_pairs(torch.arange(2), KEY)
    torch.testing.assert_close(torch.stack([first, second]), torch.tensor(GOLDEN["normal"]), rtol=1e-6, atol=1e-6)


def test_the_hash_is_the_one_that_is_written_down():
    """The same in plain Python integers, modulo 2^32."""

    def reference(i: int, k0: int, k1: int) -> int:
        m = 0xFFFFFFFF
        x = (i & m) ^ (k0 & m)
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & m
        x ^= ((i >> 32) * 0x9E3779B) & m
        x ^= k1 & m
        x = ((x ^ (x >> 15)) * 0x846CA68B) & m
        x ^= x >> 16
        return x - (1 << 32) if x >= 1 << 31 else x

    index = torch.tensor([0, 1, 2, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) + 5, 1 << 40])
    for key in (KEY, (0, 0), (-1, 1), (-(1 << 31), (1 << 31) - 1)):
        assert hash32(index, key).tolist() == [reference(i, *key) for i in index.tolist()]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_hash_does_not_depend_on_how_it_is_run(dtype):
    """Compiled and eager, in one piece and in parts, int32 and int64 indices, keys as numbers and as tensors."""
    index = torch.arange(5000, dtype=dtype)
    whole = hash32(index, KEY)
    assert torch.equal(whole, torch.cat([hash32(part, KEY) for part in index.split(700)]))
    assert torch.equal(whole, hash32(index.view(50, 100), KEY).flatten())
    as_tensors = tuple(torch.tensor(word, dtype=torch.int32) for word in KEY)
    assert torch.equal(whole, hash32(index, as_tensors))
    assert torch.equal(whole, torch.compile(hash32, fullgraph=True)(index, as_tensors))
    assert torch.equal(whole, hash32(torch.arange(5000), KEY))


def test_the_hash_looks_random():
    n = 1 << 18
    draws = [hash32(torch.arange(n), key_at(9, "weight", t)) for t in (1, 2)]
    for bit in range(32):
        ones = ((draws[0] >> bit) & 1).double().mean().item()
        assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(n), bit
    both = ((draws[0] ^ draws[1]) & 1).double().mean().item()
    assert abs(both - 0.5) < 5 * 0.5 / math.sqrt(n), "two steps are independent"
    values = torch.cat(normal_pairs(torch.arange(n), KEY)).double()
    assert abs(values.mean()) < 5 / math.sqrt(2 * n)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / (2 * n))
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / (2 * n))
    assert abs((values[:n] * values[n:]).mean()) < 5 / math.sqrt(n), "the two of a pair are independent"


# ---- projections


@pytest.mark.parametrize("proj", ["gaussian", "sketch", "rademacher"])
@pytest.mark.parametrize(("k", "rank"), [(12, 4), (13, 4), (12, 1), (7, 5)])
def test_random_bases_are_isotropic(proj, k, rank):
    """E[P P^T] = I, so E||x P||^2 = ||x||^2: over 1,000 keys, each entry within five standard errors."""
    view, eye = torch.empty(20, k), torch.eye(k)
    total = torch.zeros(k, k)
    draws = 1000
    for refresh in range(draws):
        basis = random_basis(Place.of(view), rank, proj, key_at(5, "projection", refresh), CPU)
        low = project(eye, basis, rank, Place.of(eye))  # P itself, row by row
        total += low @ low.mT
    spread = math.sqrt(2 / rank) if proj == "gaussian" else 1.0
    assert (total / draws - eye).abs().max() < 5 * spread / math.sqrt(draws)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (3, 20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_the_sketch_is_signed_sums_of_every_rth_column(shape, rank):
    grad_ck = torch.randn(shape)
    grad_ck = grad_ck.mT if is_wide(shape) else grad_ck
    basis = random_basis(Place.of(grad_ck), rank, "sketch", KEY, CPU)
    k = grad_ck.shape[-1]
    dense = torch.zeros(*grad_ck.shape[:-2], k, rank)
    dense[..., torch.arange(k), torch.arange(k) % rank] = basis
    torch.testing.assert_close(project(grad_ck, basis, rank, Place.of(grad_ck)), grad_ck @ dense)


def test_every_expert_has_its_own_projection():
    for proj in ("gaussian", "sketch", "rademacher"):
        basis = random_basis(Place.of(torch.empty(3, 20, 12)), 4, proj, KEY, CPU)
        assert basis.shape[0] == 3
        assert not torch.equal(basis[0], basis[1])


def test_svd_basis_is_orthonormal_and_its_signs_are_fixed():
    grad = torch.randn(30, 12)
    basis = svd_basis(grad, 4)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(svd_basis(-grad, 4), basis, atol=1e-4, rtol=0)
    assert (grad @ basis).norm() >= (grad @ torch.linalg.qr(torch.randn(12, 4)).Q).norm()


# ---- the step


def one_step(cls, shape, grads, **kwargs):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = cls([p], lr=1.0, **kwargs)
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad.clone()
        optimizer.step()
    return before - p.detach(), optimizer


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_a_step_is_parallel_to_the_gradient_channel_by_channel(shape):
    torch.manual_seed(0)
    grads = [torch.randn(shape) for _ in range(3)]
    for cls, kwargs in ((Apollo, {"rank": 4}), (ApolloMini, {"rank": 1})):
        step, _ = one_step(cls, shape, grads, **kwargs)
        dim = 1 if shape[0] >= shape[1] else 0  # channels lie along the longer side
        cosine = torch.nn.functional.cosine_similarity(step, grads[-1], dim=dim)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
        assert torch.linalg.matrix_rank(step) == min(shape), "a full-rank step from a rank-r state"
        stretch = step / grads[-1]
        if cls is ApolloMini:
            assert stretch.max() / stretch.min() < 1 + 1e-4


def test_with_an_identity_basis_of_full_rank_the_ratio_is_adams():
    """s = ||adam(G)_c|| / ||G_c||: with nothing projected away, a channel moves exactly as far as Adam moves it."""

    class Whole(Apollo):
        @classmethod
        def basis(cls, grad_ck, state, n, spec):
            return torch.eye(grad_ck.shape[1])[:, : spec.rank]

    torch.manual_seed(0)
    grads = [torch.cat([torch.randn(20, 11), torch.zeros(20, 1)], 1) for _ in range(4)]  # rank 11 of 12 holds it all
    step, _ = one_step(Whole, (20, 12), grads, rank=11, norm_growth=None, eps=1e-12)
    adam, _ = one_step(AdamW, (20, 12), grads, weight_decay=0.0, eps=1e-12)
    torch.testing.assert_close(step.norm(dim=1), adam.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_scale_enters_as_its_square_root_and_auto_is_d_over_r():
    torch.manual_seed(0)
    grads = [torch.randn(20, 12) for _ in range(3)]
    base, _ = one_step(Apollo, (20, 12), grads, rank=4)
    four, _ = one_step(Apollo, (20, 12), grads, rank=4, scale=4.0)
    auto, _ = one_step(Apollo, (20, 12), grads, rank=4, scale="auto")
    torch.testing.assert_close(four, 2 * base)
    torch.testing.assert_close(auto, math.sqrt(12 / 4) * base)


def test_a_transposed_weight_takes_the_transposed_step():
    torch.manual_seed(0)
    grads = [torch.randn(20, 12) for _ in range(5)]
    for proj in ("gaussian", "sketch", "rademacher", "svd"):
        tall, _ = one_step(Apollo, (20, 12), grads, rank=4, proj=proj, update_proj_gap=2)
        wide, _ = one_step(Apollo, (12, 20), [g.mT for g in grads], rank=4, proj=proj, update_proj_gap=2)
        torch.testing.assert_close(wide.mT, tall, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("proj", "dtype", "shapes", "compile"),
    [
        ("gaussian", torch.float32, [(20, 12), (12, 20)], False),
        ("gaussian", torch.bfloat16, [(20, 12), (12, 20)], False),
        ("sketch", torch.float32, [(20, 12), (12, 20)], False),
        ("sketch", torch.bfloat16, [(20, 12), (12, 20)], False),
        pytest.param("sketch", torch.bfloat16, [(12, 20)], True, marks=pytest.mark.slow),
        pytest.param("gaussian", torch.bfloat16, [(20, 12), (12, 20)], True, marks=pytest.mark.slow),
        pytest.param("gaussian", torch.float32, [(20, 12), (12, 20)], True, marks=pytest.mark.slow),
        pytest.param("sketch", torch.float32, [(20, 12), (12, 20)], True, marks=pytest.mark.slow),
    ],
)
def test_a_kept_projection_is_the_one_that_is_drawn_again(proj, dtype, shapes, compile):
    """Through refreshes, one of them with a gradient that cannot be used; its bytes are state."""
    torch.manual_seed(0)
    grads = [torch.randn(20, 12).to(dtype) for _ in range(6)]
    grads[2] = torch.full_like(grads[2], torch.inf)
    knobs = {"rank": 4, "proj": proj, "update_proj_gap": 2, "compile": compile}
    for shape in shapes:
        ends = []
        for keep in (False, True):
            p = nn.Parameter(torch.ones(shape, dtype=dtype))
            optimizer = Apollo([p], lr=1e-2, keep_proj=keep, **knobs)
            for grad in grads:
                p.grad = grad if grad.shape == shape else grad.mT.contiguous()
                optimizer.step()
            ends.append((p.detach(), optimizer.state[p]))
        (drawn, without), (kept, state) = ends
        assert torch.equal(kept, drawn)
        assert state["skipped"] == 1
        assert set(state) - set(without) == {"basis"}
        assert state["basis"].shape == ((12,) if proj == "sketch" else (12, 4))
        assert state["basis"].dtype is torch.float32


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has one setting for all")
@pytest.mark.parametrize("chosen", ["none", "ieee", "tf32"])
def test_no_switch_of_the_process_is_flipped_by_a_step(chosen):
    """fp32 products are what the user has chosen: not faster by a setting that depends on the processor."""
    seen = []

    @dataclass(frozen=True)
    class Watched(rules.Apollo):
        name: ClassVar[str] = "watched"

        def observe(self, *args):
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return super().observe(*args)

    p = nn.Parameter(torch.ones(20, 12))
    p.grad = torch.randn(20, 12)
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        with mock.patch.dict(rules.RULES, {"watched": Watched}):
            torch.backends.mkldnn.matmul.fp32_precision = chosen
            RuleOptimizer([p], "watched", rank=4).step()
        assert [*seen, torch.backends.mkldnn.matmul.fp32_precision] == [chosen, chosen]
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_a_state_lies_as_its_gradient_does_also_after_loading():
    """A compiled step passes over both at once; a checkpoint's tensors are contiguous."""
    p = nn.Parameter(torch.zeros(12, 20))
    optimizer = Apollo([p], rank=4)
    p.grad = torch.randn(12, 20)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (20, 4)
    assert optimizer.state[p]["exp_avg"].mT.is_contiguous()
    saved = optimizer.state_dict()
    saved["state"][0] = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in saved["state"][0].items()}
    other = Apollo([nn.Parameter(torch.zeros(12, 20))], rank=4)
    other.load_state_dict(saved)
    (state,) = other.state.values()
    assert torch.equal(state["exp_avg"], optimizer.state[p]["exp_avg"])
    assert state["exp_avg"].mT.is_contiguous()


def test_a_conv_weight_is_a_matrix_and_a_stack_is_its_matrices():
    torch.manual_seed(0)
    grads = [torch.randn(8, 3, 3, 3) for _ in range(4)]
    conv, _ = one_step(Apollo, (8, 3, 3, 3), grads, rank=2)
    flat, _ = one_step(Apollo, (8, 27), [g.flatten(1) for g in grads], rank=2)
    torch.testing.assert_close(conv.flatten(1), flat)
    as_conv, optimizer = one_step(Apollo, (8, 3, 9), [g.flatten(2) for g in grads], rank=2, view="conv")
    torch.testing.assert_close(as_conv.flatten(1), flat)
    assert next(iter(optimizer.state.values()))["exp_avg"].shape == (27, 2)
    _, optimizer = one_step(Apollo, (8, 3, 9), [g.flatten(2) for g in grads], rank=2)
    assert next(iter(optimizer.state.values()))["exp_avg"].shape == (8, 9, 2)

    p = nn.Parameter(torch.zeros(8, 3, 3, 3).to(memory_format=torch.channels_last))
    optimizer = Apollo([p], lr=1.0, rank=2)
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad.to(memory_format=torch.channels_last)
        optimizer.step()
    torch.testing.assert_close(before - p.detach(), conv)


def test_weight_decay_is_decoupled_and_before_the_step():
    p = nn.Parameter(torch.full((6, 4), 2.0))
    optimizer = Apollo([p], lr=0.1, rank=2, weight_decay=0.5)
    p.grad = torch.zeros(6, 4)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((6, 4), 2.0 * (1 - 0.1 * 0.5)))


# ---- the limiter


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=30))
def test_a_norm_grows_by_at_most_one_percent(norms):
    prev = torch.zeros(())
    for norm in map(torch.tensor, norms):
        factor, now = limit_growth(norm, prev, 1.01)
        assert now == prev if norm == 0 else torch.isclose(now, factor * norm, rtol=1e-5)
        if prev > 0:
            assert now <= prev * 1.01 * (1 + 1e-6)
        elif norm > 0:
            assert now == norm, "no limit yet"
        prev = now


def test_without_growth_there_is_no_limit():
    torch.manual_seed(0)
    grads = [torch.randn(20, 12) * 10**t for t in (0, 3)]
    free, _ = one_step(Apollo, (20, 12), grads, rank=4, norm_growth=None)
    infinite, _ = one_step(Apollo, (20, 12), grads, rank=4, norm_growth=1e30)
    limited, _ = one_step(Apollo, (20, 12), grads, rank=4)
    torch.testing.assert_close(free, infinite)
    assert limited.norm() < free.norm()


# ---- rounding


def test_the_mean_of_stochastic_rounding_is_the_number():
    n = 1 << 16
    for value in (1.001, -3.1415927, 1e-3, 2.0**-20 * 1.3):
        x = torch.full((1, n), value)
        rounded = round_stochastically(x, noise(1, n))
        assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
        neighbours = rounded.float().unique()
        assert len(neighbours) == 2
        ulp = (neighbours[1] - neighbours[0]).item()
        assert abs(rounded.double().mean().item() - x[0, 0].double().item()) < 5 * 0.5 * ulp / math.sqrt(n)


def test_what_needs_no_rounding_is_not_rounded():
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, math.inf, -math.inf, 2.0**-130, 3.3895314e38]).view(1, -1)
    most = constant_noise(0xFFFF)
    assert torch.equal(round_stochastically(exact, most), exact.to(torch.bfloat16).float())
    nan = torch.tensor([math.nan]), torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for x in nan:
        assert round_stochastically(x, most).isnan().all()


def test_compiled_rounding_is_the_same_rounding():
    """Compiled for a CPU it works on numbers instead of bits: the same for every number a weight can be."""
    draw = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 90, (100_000,), generator=draw)
    random = torch.randn(100_000, generator=draw) * 2.0**exponents
    powers = 2.0 ** torch.arange(-110, 96)
    edges = [t for power in (powers, -powers) for t in (power, power * (1 - 2.0**-24), power * (1 + 2.0**-23))]
    x = torch.cat([random, *edges, torch.tensor([0.0, math.inf, -math.inf, 2.0**127])])
    x = x.view(1, -1)
    noises = noise(1, x.shape[1]), constant_noise(0), constant_noise(0xFFFF)
    compiled = torch.compile(round_stochastically, fullgraph=True)
    for u in noises:
        assert torch.equal(compiled(x, u), round_stochastically(x, u))
    assert compiled(torch.full((1, 4), math.nan), constant_noise(0)).isnan().all()


def noise(m: int, n: int, key: tuple[int, int] = KEY) -> Dither:
    return dither(torch.arange(m, dtype=torch.int32), torch.arange(n, dtype=torch.int32), key)


def constant_noise(bits: int) -> Dither:
    return Dither(*(torch.tensor([[number]], dtype=torch.int32) for number in (0, 1, bits)))


def test_dither_is_uniform_and_entries_are_independent_in_pairs():
    """Over 4,000 keys: each entry's mean and variance, and the correlation of neighbours in row, column and across."""
    draws = torch.stack([noise(4, 5, key_at(3, "weight", t)).uniform() for t in range(4000)]).double()
    assert draws.min() >= 0
    assert draws.max() < 1
    assert torch.equal(draws, (draws * 2**16).round() / 2**16)
    centred = draws - 0.5
    assert (centred.mean(0).abs() < 5 * math.sqrt(1 / 12 / 4000)).all()
    assert ((centred**2).mean(0) - 1 / 12).abs().max() < 5 * math.sqrt(1 / 180 / 4000)
    flat = centred.flatten(1)
    correlation = (flat.T @ flat / 4000 * 12).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(4000)


def test_dither_belongs_to_the_position():
    """In parts and compiled: the same."""
    drawn = noise(40, 70)
    whole = drawn.uniform()
    rows, columns = torch.arange(40, dtype=torch.int32), torch.arange(70, dtype=torch.int32)
    assert torch.equal(dither(rows[10:20], columns[30:], KEY).uniform(), whole[10:20, 30:])
    assert torch.equal(drawn.part((slice(10, 20), slice(30, 70))).uniform(), whole[10:20, 30:])
    uniform = torch.compile(lambda *arguments: dither(*arguments).uniform(), fullgraph=True)
    assert torch.equal(uniform(rows, columns, KEY), whole)
    as_tensors = tuple(torch.tensor(word, dtype=torch.int32) for word in KEY)
    assert torch.equal(dither(rows, columns, as_tensors).uniform(), whole)
    assert whole[:2, :3].tolist() == GOLDEN["dither"]


def test_small_updates_reach_a_bf16_weight():
    """A step of a hundredth of an ulp: rounding to nearest loses all of them, stochastic rounding none on average."""
    moved = {}
    for stochastic in (True, False):
        p = nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=2.0**-7 / 100, weight_decay=0.0, stochastic_rounding=stochastic)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[stochastic] = (1 - p.detach().float().mean()).item()
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(50 * 2.0**-7 / 100, rel=0.1)


def test_bf16_moments_decay():
    """In bf16, 0.999 v rounds back to v: only stochastic rounding lets a second moment fall."""
    p = nn.Parameter(torch.zeros(64, 32))
    optimizer = AdamW([p], lr=0.0, state_dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["exp_avg_sq"].fill_(1.0)
    for _ in range(300):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].float().mean().item() == pytest.approx(0.999**300, rel=0.02)


GOLDEN = {
    "dither": [
        [0.1177825927734375, 0.52520751953125, 0.7568206787109375],
        [0.1781768798828125, 0.573150634765625, 0.2918243408203125],
    ],
    "mix_seed(0, 0)": 6017775124710473527,
    "mix_seed(7, 41)": 507207032534846950,
    "keys": {
        ("projection", 0): (-59306570, -1443133777),
        ("projection", 1): (1332103291, 1801781152),
        ("weight", 1): (-1511395022, 836760195),
        ("exp_avg", 1): (412111965, 1827384600),
        ("exp_avg_sq", 1): (-1227251667, -789725023),
    },
    "index": [0, 1, 2, 3, 1000, 2147483648, 4294967297],
    "hash": [61553638, -60433231, -1008713568, 912257769, -828181963, -1722601699, 1883195732],
    "signs": [1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0],
    "uniform": [0.08365947008132935, 0.9589167237281799, 0.4487684369087219],
    "normal": [[2.153751850128174, 0.7892612814903259], [-0.5686424970626831, -0.9897288084030151]],
}
