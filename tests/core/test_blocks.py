"""A step in blocks is the same step, and computes with nothing large."""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.profiler import ProfilerActivity, profile

from apollo_optim import AdamW, Apollo, ApolloMini, RuleOptimizer
from apollo_optim.core import blocks as blocks_module
from apollo_optim.core.blocks import blocks, part

SHAPES = [(), (300,), (40, 24), (24, 40), (3, 20, 12), (2, 12, 20), (8, 3, 3, 3), (0, 4), (2, 150)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", 64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("whole", [0, 1])
def test_blocks_cover_a_tensor_once(small_blocks: None, shape: tuple[int, ...], whole: int) -> None:
    times, covered = torch.zeros(shape), []
    for at in blocks(shape, torch.device("cpu"), whole):
        part(times, at).add_(1)
        covered.append(part(torch.arange(times.numel()).view(shape), at).flatten())
        if len(shape) > whole:
            assert part(times, at).numel() <= max(64, times.shape[-1] if whole else 0)
            assert not whole or part(times, at).shape[-1] == times.shape[-1]
    assert (times == 1).all()
    assert torch.equal(torch.cat(covered), torch.arange(times.numel())), "in order of memory"


def steps(cls: type, shape: tuple[int, ...], dtype: torch.dtype, **knobs: object) -> Iterator[tuple[Tensor, dict]]:
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=draw).to(dtype))
    if len(shape) == 4:
        p = nn.Parameter(p.detach().to(memory_format=torch.channels_last))
    optimizer = cls([p], lr=1e-2, **knobs)
    for _ in range(3):
        p.grad = torch.randn(shape, generator=draw).to(dtype)
        optimizer.step()
    yield p.detach(), optimizer.state[p]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_adamw_in_blocks_is_adamw_to_the_bit(monkeypatch, shape, dtype):
    """Rounding bits included: they belong to the position in the whole tensor."""
    ((whole, state),) = steps(AdamW, shape, dtype, state_dtype=dtype)
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", 64)
    ((cut, cut_state),) = steps(AdamW, shape, dtype, state_dtype=dtype)
    assert torch.equal(whole, cut)
    assert all(torch.equal(state[key], cut_state[key]) for key in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("proj", ["gaussian", "sketch"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1 and 0 not in shape], ids=str)
def test_apollo_in_blocks_is_apollo(monkeypatch, shape, proj):
    """But for the order in which a product may sum (2e-6 seen; a step moves entries by 1e-2)."""
    runs = []
    for size in (1 << 20, 64):
        monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
        for cls, rank in ((Apollo, 1), (Apollo, 5), (ApolloMini, 1)):
            runs += [p for p, _ in steps(cls, shape, torch.float32, rank=rank, proj=proj, weight_decay=0.1)]
    for whole, cut in zip(runs[:3], runs[3:], strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-5, atol=1e-5)


def largest_allocation(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the largest tensor that a step allocates, temporaries inside of torch's own operations included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        optimizer.step()
    sizes = (e.nbytes() for e in watched.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(sizes, default=0)


LARGE = [
    pytest.param(AdamW, {}, id="adamw"),
    *(pytest.param(AdamW, {"state_dtype": codec}, id=codec) for codec in ("8bit", "4bit")),
    *(pytest.param(AdamW, {"rule": rule}, id=rule) for rule in ("adafactor", "scale")),
    pytest.param(ApolloMini, {"rank": 1}, id="apollo-mini"),
    pytest.param(Apollo, {"rank": 64}, id="apollo"),
    pytest.param(Apollo, {"rank": 512, "proj": "sketch"}, id="apollo sketch at d/4"),
]


@pytest.mark.parametrize(
    ("cls", "knobs", "shape"),
    [
        pytest.param(*one.values, shape, id=f"{one.id}-{shape}", marks=[pytest.mark.slow] * ((i + j) % 3 > 0))
        for i, one in enumerate(LARGE)
        for j, shape in enumerate([(4096, 2048), (2048, 4096), (2, 2048, 2048)])
    ],
)
def test_no_temporary_of_a_step_is_large(cls, knobs, shape):
    """At most a quarter of the fp32 weight: a bf16 weight of 8.4 million entries, its gradient and state apart."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    p.grad = torch.randn(shape, dtype=torch.bfloat16)
    group = {"params": [p], **knobs} | ({"momentum": 0.9} if knobs.get("rule") == "scale" else {})
    optimizer = cls([group], compile=False)
    optimizer.step()  # makes the state
    assert 0 < largest_allocation(optimizer) <= p.numel() * 4 // 4


@pytest.mark.parametrize(
    ("rule", "knobs"),
    [
        ("apollo", {"rank": 16}),
        pytest.param("apollo", {"rank": 16, "proj": "gaussian"}, marks=pytest.mark.slow),
        pytest.param("apollo-mini", {"rank": 1}, marks=pytest.mark.slow),
        pytest.param("adamw", {}, marks=pytest.mark.slow),
        pytest.param("adafactor", {}, marks=pytest.mark.slow),
        pytest.param("scale", {"momentum": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_no_temporary_of_a_compiled_step_is_large(rule, knobs):
    """Nothing of the weight's size, not even the fp32 copy that a product needs: at most a sixteenth of that."""
    p = nn.Parameter(torch.zeros(2048, 4096, dtype=torch.bfloat16))
    p.grad = torch.randn(p.shape, dtype=torch.bfloat16)
    optimizer = RuleOptimizer([p], rule, compile=True, **knobs)
    optimizer.step()
    largest = largest_allocation(optimizer)
    assert largest > 0 or rule == "adamw"  # which looks at nothing before it writes
    assert largest <= p.numel() * 4 * (1 / 8 if "proj" in knobs else 1 / 16)


@pytest.mark.parametrize("parts", [pytest.param(4, marks=pytest.mark.slow), 16])
def test_a_compiled_sketch_is_never_whole_in_memory(parts):
    """R is added up wherever it is needed, at 350M (4 columns of the gradient for one of R) as at 7B (16)."""
    p = nn.Parameter(torch.zeros(1024, 2048, dtype=torch.bfloat16))
    p.grad = torch.randn(p.shape, dtype=torch.bfloat16)
    optimizer = Apollo([p], rank=1024 // parts, compile=True)
    optimizer.step()
    assert 0 < largest_allocation(optimizer) < 2048 * 1024 // parts * 4 // 2


@pytest.mark.parametrize("cls", [AdamW, pytest.param(Apollo, marks=pytest.mark.slow)])
def test_a_compiled_step_takes_bf16_by_whole_vectors(cls):
    """Halves of them are masked loads and stores, which took a third of AdamW's time."""
    vector = pick_vec_isa().nelements(dtype=torch.bfloat16)
    p = nn.Parameter(torch.zeros(4 * vector, 2 * vector, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    keys = {"rank": vector} if cls is Apollo else {}
    with fresh_cache():
        _, codes = run_and_get_code(cls([p], compile=True, **keys).step)
    taken = re.findall(r"BFloat16>::loadu\(.*, static_cast<int64_t>\((\d+)\)\)", "".join(codes))
    assert taken
    assert {int(entries) for entries in taken} == {vector}


def test_the_measure_sees_a_large_temporary(monkeypatch):
    """It would fail without blocks."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", 1 << 40)
    p = nn.Parameter(torch.zeros(4096, 2048, dtype=torch.bfloat16))
    p.grad = torch.randn(p.shape, dtype=torch.bfloat16)
    optimizer = AdamW([p], compile=False)
    optimizer.step()
    assert largest_allocation(optimizer) >= p.numel() * 4
