"""What rules share that have a rank, and those of them that see a gradient's projection R = G P: where P comes from."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar, cast

import torch
from torch import Tensor

from apollo_optim.core.matrix import PROJECTIONS, random_basis, svd_basis
from apollo_optim.core.place import Place
from apollo_optim.core.random import Key
from apollo_optim.rules.base import Rule, Scalars, Slot, State, knob
from apollo_optim.rules.knobs import SWITCH, count, one_of


@dataclass(frozen=True)
class Ranked(Rule):
    """No rule yet: it has a rank, and is for matrices whose small side is larger."""

    view: ClassVar = "channels"

    rank: int = knob(
        count(1),
        "r, columns of the sketch: a quarter of the small side (the papers' choice; 256 at 7B), or an eighth.",
    )

    def applies(self, shape: tuple[int, ...]) -> bool:
        return shape[-1] > self.rank  # else there is nothing to compress

    def describe(self) -> str:
        return f"{self.title} r={self.rank}"


@dataclass(frozen=True)
class Projected(Ranked):
    """No rule yet: P (.., k, r) is drawn from the parameter's seed, or the gradient's singular vectors."""

    proj: str = knob(
        one_of(*PROJECTIONS),
        '"sketch" (CountSketch: signs and sums, no matrix product), "gaussian" (the paper\'s: the same perplexity in '
        'several times the time), "rademacher", or "svd" (the gradient\'s top singular vectors, kept as state).',
        "sketch",
    )
    update_proj_gap: int = knob(count(1), "Steps between two projections.", 200)
    keep_proj: bool = knob(
        SWITCH,
        "Keep a random projection from one refresh to the next, as state: small side x r fp32 numbers per matrix. "
        "Otherwise every step draws it again, the same numbers.",
        False,
    )

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        *stack, _, k = shape
        if self.proj == "svd":
            # orthonormal from the start, should the first gradient not be finite
            return {"basis": Slot((*stack, k, self.rank), split="whole", start="eye")}
        if self.keep_proj:
            return {"basis": Slot((*stack, k) if self.proj == "sketch" else (*stack, k, self.rank), "drawn", "whole")}
        return {}

    def draws(self, step: int) -> dict[str, int]:
        if self.proj == "svd" or (self.keep_proj and not self.phase(step)):
            return {}
        return {"projection": (step - 1) // self.update_proj_gap}

    def draw_size(self, shape: tuple[int, ...]) -> int:
        *stack, _, k = shape
        return prod(stack) * k * (1 if self.proj == "sketch" else self.rank)

    def draw(self, key: Key, place: Place, device: torch.device) -> Tensor:
        return random_basis(place, self.rank, self.proj, key, device)

    def phase(self, step: int) -> bool:
        """Is a basis that is state made anew?"""
        return (self.keep_proj or self.proj == "svd") and (step - 1) % self.update_proj_gap == 0

    def basis(self, grad_ck: Tensor, state: State, s: Scalars, place: Place) -> Tensor:
        """P: drawn from the parameter's seed and the number of the refresh, or the gradient's singular vectors."""
        if self.proj == "svd":
            return svd_basis(place.whole(grad_ck), self.rank) if s["phase"] else state["basis"]
        if self.keep_proj and not s["phase"]:
            return state["basis"]
        return cast("Tensor", s["projection"])
