"""Coordinate search by factors, as a pure function of the losses known so far.

A point counts half steps from the centre on each axis, so that no rounding can make two of one. Axis by axis the upper
neighbour of the best point is tried, the lower one if that is not better, and the next beyond the one that is; a round
without an improvement ends the coarse search (a factor of two), and the fine one (its root) follows with what is left
of the budget. If the best point then lies at the edge of what was tried on an axis, the edge is moved on, `extra` runs
at most.

The function stops with `Needs` where it must know a loss first. It is called again from the start with every new
result, and so gives the same course however many workers there are, and wherever one was killed.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

Point = tuple[int, ...]
COARSE, FINE = 2, 1


class Needs(Exception):
    """The search goes on when these points have a loss."""

    def __init__(self, points: list[Point]) -> None:
        super().__init__(f"{len(points)} points without a loss")
        self.points = points


@dataclass(frozen=True)
class Found:
    """How a search ended."""

    best: Point
    tried: tuple[Point, ...]
    open_axes: tuple[int, ...]
    """Axes on which the best point is the lowest or the highest that was tried: not bracketed."""


def find(losses: Mapping[Point, float], axes: int, budget: int, extra: int = 0) -> Found:
    """The best point on `axes` axes within `budget` losses, and `extra` more at an edge.

    Raises Needs with the points that are wanted next.
    """
    return _Search(losses, axes, budget).find(extra)


class _Search:
    def __init__(self, losses: Mapping[Point, float], axes: int, budget: int) -> None:
        self.losses, self.axes, self.limit = losses, axes, budget
        self.tried: list[Point] = []

    def find(self, extra: int) -> Found:
        self.look([(0,) * self.axes])
        for size in (COARSE, FINE):
            idle = 0  # axes in a row on which nothing was better
            for axis in itertools.cycle(range(self.axes)):
                if idle == self.axes or not self.left:
                    break
                idle = 0 if self.climb(axis, size) else idle + 1
        self.limit += extra
        while self.left and (edges := self.edges()):
            before = len(self.tried)
            for axis, direction in edges:
                self.look([moved(self.best, axis, direction * COARSE)])
            if len(self.tried) == before:
                break
        return Found(self.best, tuple(self.tried), tuple(dict.fromkeys(axis for axis, _ in self.edges())))

    @property
    def left(self) -> int:
        return self.limit - len(self.tried)

    @property
    def best(self) -> Point:
        return min(self.tried, key=lambda point: self.losses[point])  # of equal ones the first

    def look(self, points: list[Point]) -> None:
        """Try these, as far as the budget goes."""
        new = [point for point in points if point not in self.tried][: self.left]
        if missing := [point for point in new if point not in self.losses]:
            raise Needs(missing)
        self.tried += new

    def climb(self, axis: int, size: int) -> bool:
        """A neighbour of the best point, the other one if it is not better, and on where it is; whether one was."""
        start = here = self.best
        for direction in (size, -size):
            self.look([moved(here, axis, direction)])
            while self.best != here and self.left:
                here = self.best
                self.look([moved(here, axis, direction)])
            if self.best != start:
                return True
        return False

    def edges(self) -> list[tuple[int, int]]:
        """Axis and direction in which nothing beyond the best point was tried."""
        found = []
        for axis in range(self.axes):
            values = [point[axis] for point in self.tried]
            found += [(axis, 1)] * (self.best[axis] == max(values)) + [(axis, -1)] * (self.best[axis] == min(values))
        return found


def moved(point: Point, axis: int, by: int) -> Point:
    """So many half steps along one axis."""
    return (*point[:axis], point[axis] + by, *point[axis + 1 :])
