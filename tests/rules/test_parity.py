"""Ours against the installed peers: apollo-torch 1.0.3 on matrices, torch.optim.AdamW on everything.

The measure is ||ours - ref|| / ||ref - start|| per tensor. Peers are called, never read: apollo-torch's projections are
taken from its state at run time and injected by a rule that overrides `Apollo.basis`.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from apollo_optim import AdamW, RuleOptimizer, rules

warnings.filterwarnings("ignore", module="bitsandbytes")
STEPS, GAP, LR = 50, 13, 1e-2  # refreshes at steps 1, 14, 27 and 40
SHAPES = {"tall": (320, 128), "wide": (128, 512), "square": (128, 128)}


@dataclass(frozen=True)
class Injected(rules.Apollo):
    """APOLLO on somebody else's basis."""

    name: ClassVar[str] = "apollo-injected"
    given: ClassVar[Tensor]

    def basis(self, grad_ck, state, s, place):
        k = grad_ck.shape[1]
        basis_kr = self.given if self.given.shape[0] == k else self.given.mT
        assert basis_kr.shape == (k, self.rank)
        return basis_kr


def gradients(shape: tuple[int, int], steps: int = STEPS) -> list[Tensor]:
    """A few strong directions under noise, growing and shrinking, so that the limiter works for its living."""
    draw = torch.Generator().manual_seed(sum(shape))
    left, right = torch.randn(shape[0], 4, generator=draw), torch.randn(4, shape[1], generator=draw)
    return [
        (left * torch.randn(4, generator=draw)) @ right * 0.1 * (1 + t % 3) + torch.randn(shape, generator=draw) * 0.1
        for t in range(steps)
    ]


def measure(ours: Tensor, ref: Tensor, start: Tensor) -> float:
    return float((ours - ref).norm() / (ref - start).norm())


@mock.patch.dict(rules.RULES, {Injected.name: Injected})
def run_both(shape, scale_type, proj, *, scale_front=False, decay=0.0, decay_after=0.0) -> tuple[float, float]:
    """(measure at the end, how often the limiter acted) of 50 steps; ``decay_after`` is ours decayed by hand."""
    apollo_torch = pytest.importorskip("apollo_torch")
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    rank, scale = (1, 128.0) if scale_type == "tensor" else (32, 1.0)
    group = {"rank": rank, "scale": scale, "scale_type": scale_type, "proj": proj, "update_proj_gap": GAP}
    group["proj_type"] = "std"
    ref = apollo_torch.APOLLOAdamW(
        [{"params": [theirs], **group}], lr=LR, weight_decay=decay + decay_after, scale_front=scale_front
    )
    opt = RuleOptimizer(
        [{"params": [ours], **group}], Injected.name, lr=LR, weight_decay=decay, scale_front=scale_front, compile=False
    )
    limited = 0
    for grad in gradients(shape):
        theirs.grad, ours.grad = grad.clone(), grad.clone()
        ref.step()
        Injected.given = ref.state[theirs]["projector"].ortho_matrix
        before = opt.state[ours]["prev_norm"].item() if opt.state else 0.0
        opt.step()
        limited += before > 0 and abs(opt.state[ours]["prev_norm"].item() / before - 1.01) < 1e-5
        if decay_after:
            ours.data.mul_(1 - LR * decay_after)
    return measure(ours.detach(), theirs.detach(), start), limited / STEPS


@pytest.mark.parametrize("scale_front", [False, True])
@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_apollo_is_apollo_torchs(shape, scale_type, proj, scale_front):
    difference, limited = run_both(shape, scale_type, proj, scale_front=scale_front)
    assert difference <= 1e-5
    assert 0 < limited < 1, "the limiter must both act and rest, or this says nothing about it"


def test_the_order_of_weight_decay_is_the_whole_difference():
    """apollo-torch decays after the step, we before it: decayed by hand afterwards, ours is theirs."""
    before, _ = run_both(SHAPES["tall"], "channel", "random", decay=0.5)
    by_hand, _ = run_both(SHAPES["tall"], "channel", "random", decay_after=0.5)
    assert by_hand <= 1e-5
    assert before > 1e-5, "at this decay the order shows"


@pytest.mark.parametrize("shape", [*SHAPES.values(), (64,), (8, 3, 3, 3), ()], ids=str)
def test_adamw_is_torchs(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.02
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    kwargs = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ref, opt = torch.optim.AdamW([theirs], **kwargs), AdamW([ours], **kwargs)
    draw = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        theirs.grad = torch.randn(shape, generator=draw)
        ours.grad = theirs.grad.clone()
        ref.step()
        opt.step()
    assert measure(ours.detach(), theirs.detach(), start) <= 1e-6


@pytest.mark.parametrize("size", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_muon_is_torchs_within_its_own_noise(shape, size):
    """With bf16 products no further from torch's than torch's are from fp32's: processors round those differently."""
    shape = tuple(n // 4 for n in shape)  # bf16 products take a CPU long
    start = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 0.02
    ends = {}
    for name in ("torch", "bfloat16", "float32"):
        p = nn.Parameter(start.clone())
        optimizer: torch.optim.Optimizer
        if name == "torch":
            optimizer = torch.optim.Muon([p], lr=1e-2, weight_decay=0.1, adjust_lr_fn=size)
        else:
            knobs = {"size": size, "precision": name, "compile": False}
            optimizer = RuleOptimizer([p], "muon", lr=1e-2, weight_decay=0.1, **knobs)
        draw = torch.Generator().manual_seed(5)
        for _ in range(10):
            p.grad = torch.randn(shape, generator=draw)
            optimizer.step()
        ends[name] = p.detach()
    noise = measure(ends["float32"], ends["torch"], start)
    assert measure(ends["bfloat16"], ends["torch"], start) <= noise < 0.01


def test_defaults_of_adamw_are_torchs():
    ref, opt = torch.optim.AdamW([nn.Parameter(torch.ones(2))]), AdamW([nn.Parameter(torch.ones(2))])
    for key in ("lr", "betas", "eps", "weight_decay"):
        assert opt.defaults[key] == ref.defaults[key]


if __name__ == "__main__":
    print("| shape | scale_type | proj | scale_front | difference | steps limited |\n|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for scale_type in ("channel", "tensor"):
            for proj in ("random", "svd"):
                for front in (False, True):
                    d, limited = run_both(shape, scale_type, proj, scale_front=front)
                    print(f"| {name} {shape} | {scale_type} | {proj} | {front} | {d:.1e} | {limited:.0%} |")
    for label, kwargs in (("decay 0.5", {"decay": 0.5}), ("decay 0.5 after the step, by hand", {"decay_after": 0.5})):
        print(f"{label}: {run_both(SHAPES['tall'], 'channel', 'random', **kwargs)[0]:.1e}")
