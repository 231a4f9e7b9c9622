"""The largest micro-batch that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apollo_optim.plan.budget import Budget
    from apollo_optim.plan.trace import Traces


def largest_batch(
    budget: Budget, traces: Traces, limit: float, told: Callable[[int, int], None] | None = None
) -> int | None:
    """The largest micro-batch within the limit; None if not even one row is.

    What was traced for another optimizer is where the search begins. A total is almost linear in the batch, so that the
    line through its neighbours says where to look; now and then the middle is taken, so that no bend costs many traces.
    `told(rows, bytes)` hears of every micro-batch that is looked at.
    """

    def beyond(batch: int) -> float:
        total = budget.at(traces.at(batch)).total
        if told is not None:
            told(batch, total)
        return total - limit

    points = {batch: beyond(batch) for batch in sorted({1, *traces.made})}
    turn = 0
    while True:
        turn += 1
        high = min((batch for batch in points if points[batch] > 0), default=None)
        low = max((batch for batch in points if high is None or batch < high), default=0)
        if high is not None and high <= low + 1:
            return low or None
        left, right = (low, high) if high else (max([0, *(batch for batch in points if batch < low)]), low)
        middle = (low + high) // 2 if high else 2 * low
        rise = (points[right] - points[left]) / (right - left) if left else 0
        line = left - points[left] / rise if rise > 0 and turn % 7 else middle
        guess = max(low + 1, min(math.floor(line), high - 1 if high else 16 * low))
        points[guess] = beyond(guess)
