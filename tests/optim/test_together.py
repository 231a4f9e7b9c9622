"""Parameters that are alike are stepped together: the numbers of single steps, in far fewer launches."""

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

import pytest
import torch
from torch import nn

from apollo_optim import AdamW, ApolloMini, RuleOptimizer
from apollo_optim.core.matrix import project
from apollo_optim.core.place import Place
from apollo_optim.optim import together as together_module
from apollo_optim.optim.apply import apply_update
from apollo_optim.quant.weight import LowBitWeight
from apollo_optim.rules import RULES
from benchmarks.launches import counted, measure, model_of


class Alike(nn.Module):
    """Three of each: tall, wide, stacks, convolutions, vectors, scalars; and one of a kind."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = [(80, 24), (24, 80), (2, 40, 32), (24, 6, 3, 3), (300,), (), (64, 64)]
        tensors = [torch.randn(shape, generator=draw) for shape in shapes for _ in range(3 - 2 * (shape == (64, 64)))]
        self.weights = nn.ParameterList([nn.Parameter(t.to(dtype)) for t in tensors])

    def set_gradients(self, step: int) -> None:
        draw = torch.Generator().manual_seed(step)
        for number, p in enumerate(self.weights):
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
            if step == 2 and number in (1, 13):
                p.grad.view(-1)[0] = torch.inf


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "codec", "block"),
    [
        (torch.float32, "float32", together_module.CPU_BLOCK),
        (torch.float32, "float32", 700),  # stacks of two, of 300 entries each
        (torch.bfloat16, "bfloat16", 700),
        (torch.bfloat16, "8bit", 700),
    ],
    ids=["fp32", "fp32-blocks", "bf16", "8bit"],
)
def test_together_is_one_by_one_bit_for_bit(rule, dtype, codec, block, monkeypatch):
    """Also where a gradient is not finite: its parameter alone is skipped."""
    monkeypatch.setattr(together_module, "CPU_BLOCK", block)
    if codec == "8bit":  # of small tensors, too
        monkeypatch.setattr("apollo_optim.core.codecs.LEAST_ENTRIES", 64)
    ends = []
    for one_by_one in (False, True):
        model = Alike(dtype)
        rank = {"rank": 4} if "rank" in RULES[rule].knobs() else {}
        optimizer = RuleOptimizer(model.parameters(), rule, 1e-2, state_dtype=codec, compile=False, **rank)
        for step in range(1, 4):
            model.set_gradients(step)
            if one_by_one:
                for p in model.parameters():
                    optimizer.step_one(p, optimizer.locate(p)[0])
            else:
                optimizer.step()
        ends.append((model, optimizer))
    (model, optimizer), (other_model, other) = ends
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][key])), key
    assert sum(int(state["skipped"].sum()) for state in optimizer.state.values()) == 2


@pytest.mark.parametrize(("c", "k"), [(160, 72), (67, 48), (96, 64), (33, 32)])
def test_a_stack_is_projected_as_its_members_are(c, k):
    """One product of all of them is rounded otherwise: of 76 shapes that were looked at, 8 differed."""
    draw = torch.Generator().manual_seed(0)
    for rank in (1, 2, 4, 8, 16):
        for shape in ((7, c, k), (7, k, c)):
            grads = torch.randn(shape, generator=draw)
            grads = grads if shape[-1] == k else grads.mT
            basis = torch.randn(7, k, rank, generator=draw)
            each = [project(g, b, rank, Place.plain((c, k))) for g, b in zip(grads, basis, strict=True)]
            assert torch.equal(project(grads, basis, rank, Place.plain((7, c, k), stack=True)), torch.stack(each))


@pytest.mark.parametrize(
    ("rule", "shape", "calls"),
    [
        ("apollo-mini", (64, 96), 1), ("apollo", (64, 96), 1), ("scale", (64, 96), 1),
        ("muon", (64, 96), 9),  # products
        ("apollo-mini", (256, 128), 9),  # as large as what several threads sum up
        ("apollo-mini", (63, 65), 9),  # whose members would begin elsewhere than at 64 bytes
    ],
)  # fmt: skip
def test_small_matrices_are_one_stack_on_a_cpu(rule, shape, calls, monkeypatch):
    called = []

    def note(*args):
        called.append(args)
        apply_update(*args)

    monkeypatch.setattr(together_module, "apply_update", note)
    params = [nn.Parameter(torch.randn(shape)) for _ in range(9)]
    for p in params:
        p.grad = torch.randn(shape)
    knobs = {"rank": 1} if rule.startswith("apollo") else {}
    RuleOptimizer(params, rule, compile=False, **knobs).step()
    assert len(called) == calls


def test_a_group_of_vectors_is_one_step():
    def launches(n: int) -> int:
        model = nn.ParameterList([nn.Parameter(torch.empty(2048, device="meta")) for _ in range(n)])
        for p in model:
            p.grad = torch.empty_like(p)
        return counted(RuleOptimizer(model, "adamw").step).total()

    assert launches(50) == launches(2) <= 60


@pytest.mark.parametrize(("name", "most"), [("apollo-mini", 10_000), ("adamw", 6_000)])
def test_launches_of_a_step_of_llama_1b(name, most):
    """On an accelerator, without a compiler (`python -m benchmarks.launches`): its 24 layers take the same each."""
    two, three = (measure(name, model_of("llama-1b", "bfloat16", None, layers))["launches"] for layers in (2, 3))
    assert two + 22 * (three - two) <= most


@pytest.mark.parametrize(("bits", "most", "more"), [(8, 35, 23), (4, 40, 28)])
def test_launches_of_a_low_bit_write(bits, most, more):
    weight = LowBitWeight.from_float(torch.empty(256, 512, dtype=torch.bfloat16, device="meta"), bits, 128)
    update, finite = torch.empty_like(weight), torch.ones(1, 1, dtype=torch.bool, device="meta")
    factor, noise = torch.ones((), device="meta"), Place.of(update).noise((1, 2), update.device)
    count = counted(lambda: weight._write_rows_((), update, factor, finite, 0.1, 0.0, noise))
    assert 20 < count.total() <= most

    def launches(of: int | None) -> int:
        return int(measure("apollo-mini", model_of("llama-1b", "bfloat16", of, layers=3))["launches"])

    assert (launches(bits) - launches(None)) / 21 <= more, "more than a float weight's write, of each matrix"


@pytest.mark.parametrize(("make", "calls", "files"), [(partial(ApolloMini, rank=1), 80, 14), (AdamW, 47, 11)])
def test_the_walk_of_a_gradient_is_short(make: Callable[..., torch.optim.Optimizer], calls: int, files: int) -> None:
    # From `step` to the write, of one matrix: what somebody reads who wants to know what happens to a gradient.
    p = nn.Parameter(torch.randn(64, 96))
    optimizer = make([p], compile=False)
    walked: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "apollo_optim" in frame.f_code.co_filename:
            walked.append(frame.f_code.co_filename)

    for _ in range(2):  # in the first one the state is made
        p.grad = torch.randn(64, 96)
        walked.clear()
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            optimizer.step()
        finally:
            sys.setprofile(before)
    assert 20 < len(walked) <= calls, "calls"
    assert len(set(walked)) <= files, "files"
