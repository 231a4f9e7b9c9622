"""What a step sends to other processes, counted where torch is asked for it."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from apollo_optim.core import lockstep
from apollo_optim.core.collectives import Counter
from apollo_optim.rules import RULES
from apollo_optim.train.skips import clip_each, total_norm
from benchmarks.collectives import Model, counted, line_of, with_gradients

MATRICES = 7  # of a layer
SENT = {"sumo": 8}  # of a layer: a wide matrix's projection is reduced, and its average gathered as every other one's


@pytest.fixture(scope="module", autouse=True)
def one_of_two():
    """A process that believes there is another one, which sends nothing and hears nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_sums_are_as_many_whatever_the_depth(rule):
    """All small ones of a step go together; besides, a matrix is reduced once or gathered once, if at all (`SENT`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        two, four = counted(rule, layers=2), counted(rule, layers=4)
    sums, others = ([line["kinds"].get("all_reduce", 0) for line in (two, four)], [])
    assert sums[0] == sums[1] <= 20, (two, four)
    others = [line["collectives"] - line["kinds"].get("all_reduce", 0) for line in (two, four)]
    assert others[1] == 2 * others[0] <= 4 * SENT.get(rule, MATRICES), (two, four)


def test_adamw_sums_once():
    assert counted("adamw", layers=3)["kinds"] == {"all_reduce": 1}


def test_apollo_reduces_one_wide_matrix_a_layer():
    kinds = counted("apollo", layers=3)["kinds"]
    assert kinds.pop("all_reduce") <= 4
    assert kinds == {"reduce_scatter_tensor": 3}


def test_every_step_for_itself_is_noticed(monkeypatch):
    """The mutant: what the tests above count is what `side_by_side` puts together."""
    monkeypatch.setattr("apollo_optim.optim.together.MEMBERS", 1)
    assert counted("adamw", layers=3)["kinds"]["all_reduce"] == 3 * (MATRICES + 2) + 3


@pytest.mark.parametrize("norm", [total_norm, lambda gradients: clip_each(gradients, 1.0)])
def test_norms_are_one_sum(norm):
    from torch.distributed.fsdp import fully_shard

    model = Model(2)
    fully_shard(model)
    with_gradients(model)
    with Counter() as counter:
        norm([p.grad for p in model.parameters()])
    assert line_of(counter.sent)["kinds"] == {"all_reduce": 1}


def test_each_is_clipped_as_torch_clips_one():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.zeros(4, 3)) for _ in range(3)]
    for scale, p in zip((0.1, 1.0, torch.inf), ours, strict=True):
        p.grad = torch.randn(4, 3) * scale
    theirs = [p.grad.clone() for p in ours]
    for p, grad in zip(ours, theirs, strict=True):
        other = nn.Parameter(p.detach().clone())
        other.grad = grad
        torch.nn.utils.clip_grad_norm_([other], 0.5)
    clip_each([p.grad for p in ours], 0.5)
    for p, grad in zip(ours, theirs, strict=True):
        assert torch.equal(p.grad, grad) or (p.grad.isnan() == grad.isnan()).all()


def test_what_one_raises_ends_all():
    """The others, which wait for a sum, are unwound, and nothing of them is left."""
    ended = []

    def waits() -> None:
        try:
            lockstep.summed(torch.ones(2), "nobody")
        finally:
            ended.append(1)

    def fails() -> None:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        lockstep.side_by_side([waits, waits, fails], torch.device("cpu"))
    assert len(ended) == 2


def test_what_is_asked_for_is_answered_in_order():
    group = dist.distributed_c10d._get_default_group().group_name
    found = []

    def step(value: float) -> None:
        first = lockstep.summed(torch.full((2,), value), group)
        second = lockstep.sent(lambda: first * 2)
        found.append(float(lockstep.summed(second, group).sum()))

    lockstep.side_by_side([lambda value=value: step(value) for value in (1.0, 2.0, 3.0)], torch.device("cpu"))
    assert found == [4.0, 8.0, 12.0]  # this group sums nothing
