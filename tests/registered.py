"""What tests of all registered optimizers share: models, capability flags, ways to make, run and compare them."""

from __future__ import annotations

import io

import pytest
import torch
from low_bit import prepare
from torch import Tensor, nn

from apollo_optim import RuleOptimizer, build_optimizer, list_optimizers
from apollo_optim.optim.recipes import find_optimizer
from apollo_optim.rules import Rule

NAMES = [info.name for info in list_optimizers()]
COMPOSED = ("full", "lite")
"""Recipes whose rules are all tested by themselves: `nano` stands for them, `make test-all` has them."""
every_optimizer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in COMPOSED)) for name in NAMES]
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHORT_GAP = {"update_proj_gap": 3}  # several refreshes in few steps


class Block(nn.Module):
    """Tall, wide, square, uneven, a bias, a conv and a stack of experts: a model of every shape there is."""

    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide, self.square = nn.Linear(8, 20), nn.Linear(20, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.uneven = nn.Linear(8, 13, bias=False)
        self.conv = nn.Conv1d(4, 6, 3)
        self.experts = nn.Parameter(torch.randn(3, 8, 12) / 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.mlp = Block()
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(8, 11, bias=False)


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().to(dtype)


def rule_named(name: str) -> type[Rule]:
    return find_optimizer(name).cls


def has(name: str, knob: str) -> bool:
    return knob in rule_named(name).knobs()


def rank_of(name: str, rank: int) -> dict[str, int]:
    """A rule that has a rank needs one, and APOLLO-Mini's is 1."""
    return {"rank": rule_named(name).defaults().get("rank", rank)} if has(name, "rank") else {}


def decomposes(name: str) -> bool:
    """Does it take singular vectors, which are state?"""
    return rule_named(name).defaults().get("proj") == "svd"


def limits(name: str) -> bool:
    return has(name, "norm_growth")


def by_matrix(name: str) -> bool:
    """Does the rule see matrices: one skip for each of a stack?"""
    return rule_named(name).view != "any"


def bare(name: str, params, rank: int = 1, **knobs) -> torch.optim.Optimizer:
    """On these parameters alone, every one of them in one group of the rule."""
    return RuleOptimizer([{"params": params, "rule": rule_named(name).name, **rank_of(name, rank)}], lr=1e-2, **knobs)


def make(name: str, model: nn.Module, **knobs) -> torch.optim.Optimizer:
    prepare(name, model)
    gap = SHORT_GAP if has(name, "update_proj_gap") else {}
    knobs = {**rank_of(name, 2), **gap, **knobs}
    return build_optimizer(name, model, targets="mlp", **{"lr": 1e-2, **knobs})


def set_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=draw) * scale).to(p.dtype)


def run(model: nn.Module, optimizer, steps) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()


def reloaded(model: nn.Module, optimizer, again: nn.Module, resumed) -> None:
    """Save the first two, and load the others from that file, with `weights_only`."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def flat_state(optimizer) -> dict[tuple[int, str], object]:
    return {
        (i, key): value.clone() if isinstance(value, Tensor) else value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, Tensor):
            assert value.dtype == b[key].dtype
            assert torch.equal(value, b[key]), f"{key}: {(value.float() - b[key].float()).abs().max()}"
        else:
            assert value == b[key], key
