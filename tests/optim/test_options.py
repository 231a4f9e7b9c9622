"""Options of any rule: the power of a gradient's entries, and a decay that does not work against the step."""

import pytest
import torch
from registered import every_optimizer, make, make_model, rank_of, set_gradients
from torch import nn

from apollo_optim import AdamW, InputError, RuleOptimizer, quantize_weights
from apollo_optim.core import blocks as blocks_module
from apollo_optim.optim import build_optimizer
from apollo_optim.train.config import from_dict


@every_optimizer
def test_a_power_is_that_of_the_gradient(name):
    """Of every rule: as if it had been given |g|^2 sign(g). (A power of 1.2 has other last bits in another layout.)"""
    (ours, our), (theirs, their) = ((m := make_model(), make(name, m, lr=1e-2, grad_power=p)) for p in (2.0, 1.0))
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for p in theirs.parameters():
            if p.grad is not None:
                p.grad = p.grad.square().copysign(p.grad)
        our.step()
        their.step()
    for p, q in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def stepped(rule: str, start: torch.Tensor, grads: list[torch.Tensor], **knobs) -> list[torch.Tensor]:
    p = nn.Parameter(start.clone())
    optimizer = RuleOptimizer([p], rule, lr=0.1, **rank_of(rule, 4), **knobs)
    seen = []
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


def test_a_power_need_not_be_whole():
    grad = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    (end,) = stepped("sgd", torch.zeros_like(grad), [grad], momentum=0.0, grad_power=1.2)
    torch.testing.assert_close(end, -0.1 * grad.double().abs().pow(1.2).copysign(grad.double()).float())


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rule", ["adamw", "apollo", "muon"])
def test_a_cautious_decay_works_with_the_step(rule, compile):
    """The papers' indicator, entry by entry, against a step without decay."""
    draw = torch.Generator().manual_seed(0)
    start, grad = torch.randn(20, 12, generator=draw), torch.randn(20, 12, generator=draw)
    start[0] = 0.0
    plain, cautious, full = (
        stepped(rule, start, [grad], compile=compile, weight_decay=wd, cautious_decay=c)[0]
        for wd, c in ((0.0, False), (0.5, True), (0.5, False))
    )
    step = start - plain
    with_it = step * start >= 0
    assert 0.3 < with_it.double().mean() < 0.7
    torch.testing.assert_close(cautious, start - step - 0.1 * 0.5 * with_it * start)
    torch.testing.assert_close(full, start - step - 0.1 * 0.5 * start)


def test_a_cautious_decay_does_not_know_blocks(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    start, grad = torch.randn(64, 48, generator=draw).bfloat16(), torch.randn(64, 48, generator=draw).bfloat16()
    whole = stepped("apollo", start, [grad] * 3, weight_decay=0.5, cautious_decay=True, compile=False)
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", 200)
    in_blocks = stepped("apollo", start, [grad] * 3, weight_decay=0.5, cautious_decay=True, compile=False)
    assert all(torch.equal(a, b) for a, b in zip(whole, in_blocks, strict=True))


def test_a_decay_that_comes_later_is_cautious_too():
    p = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0, cautious_decay=True)
    p.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 1.0
    before = p.detach().clone()
    optimizer.step()
    moved = (before - p.detach()).tolist()
    assert moved == pytest.approx([0.1 + 0.1 * before[0].item(), -0.1], rel=1e-4)


def test_what_cannot_be_is_said():
    p = nn.Parameter(torch.ones(4, 4))
    for wrong in ({"grad_power": 0}, {"grad_power": True}, {"cautious_decay": 1.5}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            AdamW([p], **wrong)
    model = make_model()
    quantize_weights(model, bits=8, targets="mlp", group_size=4)
    optimizer = build_optimizer("apollo-mini", model, targets="mlp", weight_decay=0.1, cautious_decay=True)
    set_gradients(model, 0)
    with pytest.raises(InputError, match="cautious_decay has no step for low-bit weights"):
        optimizer.step()


def test_a_run_file_has_them():
    cfg = from_dict({"out": "x", "optim": {"name": "muon", "cautious_decay": True, "grad_power": 1.2}})
    assert (cfg.optim.cautious_decay, cfg.optim.grad_power) == (True, 1.2)
