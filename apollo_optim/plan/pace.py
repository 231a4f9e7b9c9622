"""Seconds of a step by a stated model: a cost that every step has, and one for each token."""

from __future__ import annotations

import math
from typing import NamedTuple

from apollo_optim.core.errors import InputError


class Pace(NamedTuple):
    """`seconds = fixed + per_token * tokens`, of one card.

    Attributes:
        fixed: Seconds of what does not grow with the batch: the optimizer's step, launches, gradients on their way.
        per_token: Seconds of forward and backward. A card that is not full yet has smaller ones for more tokens.
    """

    fixed: float
    per_token: float

    @classmethod
    def of(cls, first: tuple[int, float], second: tuple[int, float]) -> Pace:
        """From two steps that were timed, each (tokens of a card, seconds).

        Raises InputError where they are of as many tokens, or the larger one took no longer.
        """
        (few, short), (many, long) = sorted((first, second))
        if not (few > 0 and short > 0 and math.isfinite(long)):
            raise InputError("two timed steps: tokens and seconds must be greater than 0")
        if few == many or long <= short:
            raise InputError(
                f"{few} tokens in {short:g} s and {many} in {long:g}: no cost of a token follows; time two batches, "
                "one twice the other or more"
            )
        per_token = (long - short) / (many - few)
        return cls(short - per_token * few, per_token)

    def seconds(self, tokens: int) -> float:
        """Of a step with so many tokens on each card."""
        return self.fixed + self.per_token * tokens
