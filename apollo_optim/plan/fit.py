"""What fits on a card: for an optimizer the largest micro-batch, and what its step then has on all cards."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from apollo_optim.plan.budget import Budget, Plan
from apollo_optim.plan.largest import largest_batch
from apollo_optim.plan.shards import held_weights
from apollo_optim.plan.trace import Traces


class Fit(NamedTuple):
    """An optimizer on cards of one size.

    Attributes:
        optimizer: Its name.
        batch: The largest micro-batch on each card; None: not even one row fits.
        plan: Of that micro-batch, or of one row.
    """

    optimizer: str
    batch: int | None
    plan: Plan

    def tokens(self, seq: int, cards: int) -> int:
        """Of a step on all cards, each with one micro-batch."""
        return (self.batch or 0) * seq * cards


def fit(budget: Budget, traces: Traces, limit: float, told: Callable[[int, int], None] | None = None) -> Fit:
    """The largest micro-batch of `budget` within `limit` bytes of a card.

    `told(rows, bytes)` is called for every micro-batch that was looked at.
    """
    batch = largest_batch(budget, traces, limit, told)
    return Fit(budget.name, batch, budget.at(traces.at(batch or 1)))


def cards_for(model: nn.Module, limit: float, most: int = 1024) -> int | None:
    """How many cards, a power of two, are the fewest whose part of the weights is within the limit.

    None if `most` are too few.
    """
    cards = 1
    while cards <= most and held_weights(model, cards) > limit:
        cards *= 2
    return cards if cards <= most else None
