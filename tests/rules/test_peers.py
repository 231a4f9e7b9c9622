"""The rivals against their authors' packages, where these are installed: galore-torch, fira and adam-mini.

    pip install --no-deps galore-torch fira adam-mini
    python tests/rules/test_peers.py > results/parity/rivals.md

The measure is that of `test_parity.py`, ||ours - ref|| / ||ref - start||. Peers are called, never read: bases are taken
from their state at run time. (flora-opt 0.0.3 has no row here: its steps are of full rank, at any rank that it is
given, and so are not the back-projection of the paper's algorithm.)
"""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from test_parity import SHAPES, STEPS, gradients, measure
from test_rivals import galores
from torch import Tensor, nn

from apollo_optim import RuleOptimizer, rules

LIMIT = 1e-5
GROUP = {"rank": 64, "update_proj_gap": 13, "proj_type": "std"}
LR = 1e-2
HEADS = 8
WEIGHTS = {  # what adam-mini knows by name -> a block's rows, of a matrix of 256 rows
    "layers.0.self_attn.q_proj.weight": 256 // HEADS,
    "layers.0.self_attn.k_proj.weight": 256 // HEADS,
    "layers.0.self_attn.v_proj.weight": 1,
    "layers.0.self_attn.o_proj.weight": 1,
    "layers.0.mlp.up_proj.weight": 1,
    "embed_tokens.weight": 1,
    "lm_head.weight": 1,
}


def on_a_given_basis(name: str) -> type[Any]:
    """The rule, on somebody else's basis."""
    own = rules.RULES[name]

    @dataclass(frozen=True)
    class Given(own):  # type: ignore[valid-type, misc]
        name: ClassVar[str] = f"{own.name}-given"
        given: ClassVar[Tensor]

        def basis(self, grad_ck, state, s, place):
            return self.given if self.given.shape[0] == grad_ck.shape[1] else self.given.mT

    return Given


def peer(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(pytest.importorskip(module), name)


def start_of(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02


def of_a_projection(name: str, shape: tuple[int, int]) -> float:
    """50 steps, 4 refreshes. Fira's at alpha 1, where its authors' residual is the paper's (`Fira`'s docstring)."""
    make = peer("galore_torch", "GaLoreAdamW") if name == "galore" else peer("fira", "FiraAdamW")
    theirs_of = {"scale": 0.25} if name == "galore" else {"alpha": 1.0}
    theirs, ours = nn.Parameter(start_of(shape)), nn.Parameter(start_of(shape))
    ref = make([{"params": [theirs], **GROUP, **theirs_of}], lr=LR, no_deprecation_warning=True)
    rule = on_a_given_basis(name)
    with mock.patch.dict(rules.RULES, {rule.name: rule}):
        knobs = {**GROUP, "scale": theirs_of.get("scale", 1.0)}
        opt = RuleOptimizer([{"params": [ours], **knobs}], rule.name, lr=LR, compile=False)
        for grad in gradients(shape):
            theirs.grad, ours.grad = grad.clone(), grad.clone()
            ref.step()
            rule.given = ref.state[theirs]["projector"].ortho_matrix
            opt.step()
    return measure(ours.detach(), theirs.detach(), start_of(shape))


def of_adam_mini(name: str) -> float:
    shape = (256, 256)
    theirs, ours = nn.Parameter(start_of(shape)), nn.Parameter(start_of(shape))
    make = peer("adam_mini", "Adam_mini")
    kwargs = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ref = make([(name, theirs)], dim=256, n_heads=HEADS, verbose=False, **kwargs)
    opt = RuleOptimizer([ours], "adam-mini", block_rows=WEIGHTS[name], **kwargs)
    for grad in gradients(shape):
        theirs.grad, ours.grad = grad.clone(), grad.clone()
        ref.step()
        opt.step()
    return measure(ours.detach(), theirs.detach(), start_of(shape))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", ["galore", "fira"])
def test_the_rules_of_a_projection_are_their_authors(name, shape):
    assert of_a_projection(name, shape) <= LIMIT


def test_firas_authors_leave_less_out_of_the_rest():
    """At their default the rest is G - alpha R P^T, not the paper's, which ours is. (In one basis: no signs.)"""
    make = peer("fira", "FiraAdamW")
    start = torch.zeros(30, 20)
    p, grads = nn.Parameter(start.clone()), [t[:30, :20] for t in gradients(SHAPES["tall"], 6)]
    group = {"params": [p], "rank": 5, "update_proj_gap": 100, "alpha": 0.25, "proj_type": "std"}
    ref = make([group], lr=1.0, no_deprecation_warning=True)
    for grad in grads:
        p.grad = grad.clone()
        ref.step()
    theirs, papers = (-sum(galores(grads, 5, gap=100, kept=kept)) for kept in (0.25, 1.0))
    assert measure(theirs, p.detach(), start) <= LIMIT
    assert measure(papers, p.detach(), start) > 0.01


@pytest.mark.parametrize("name", WEIGHTS)
def test_adam_mini_is_its_authors(name):
    assert of_adam_mini(name) <= LIMIT


if __name__ == "__main__":
    from importlib.metadata import version

    print("# Parity of the rivals with their authors' packages\n")
    print(", ".join(f"{package} {version(package)}" for package in ("torch", "galore-torch", "fira", "adam-mini")))
    print(f"\nMeasure: ||ours - ref|| / ||ref - start|| after {STEPS} steps, fp32; four bases of rank 64, of the peer.")
    print("\n| rule | matrix | difference |\n|---|---|---|")
    for rule in ("galore", "fira"):
        for label, shape in SHAPES.items():
            print(f"| {rule} | {label} {shape} | {of_a_projection(rule, shape):.1e} |")
    for weight, rows in WEIGHTS.items():
        print(f"| adam-mini, blocks of {rows} | {weight} | {of_adam_mini(weight):.1e} |")
