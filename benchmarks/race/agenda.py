"""Which trials are wanted next, in which order: a pure function of the lines there are."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from apollo_optim.core.errors import InputError
from benchmarks.race.methods import AXES, METHODS, Method
from benchmarks.race.protocol import (
    CLOSE,
    LEADERS,
    NORM_LR,
    SETTINGS,
    STAGES,
    Setting,
    Stage,
    Trial,
    fingerprint,
    round_rate,
    search_steps,
)
from benchmarks.race.search import Found, Needs, Point, find

Row = dict[str, Any]
Rates = dict[str, float]
"""Axis -> value, all of `AXES`."""


@dataclass(frozen=True)
class Searched:
    """Where a method's search stands in a setting."""

    rates: Rates | None
    """The best there are: final if `wanted` is empty; None: the search cannot begin yet, or has no result."""
    wanted: tuple[Trial, ...] = ()
    """What it needs next."""
    tried: tuple[Trial, ...] = ()
    open_axes: tuple[str, ...] = ()
    """Axes on which the best lies at the edge of what was tried."""

    @property
    def finished(self) -> bool:
        return self.rates is not None and not self.wanted


@dataclass
class Board:
    """The lines, and what follows from them."""

    rows: dict[Trial, Row]
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    _searched: dict[tuple[str, str], Searched] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: list[Row], methods: Mapping[str, Method] = METHODS) -> "Board":
        """From the lines of a results file; those of methods that are not raced (any more) are left out.

        Raises InputError for a line of another protocol: a method's definition has changed under its name.
        """
        rows = {}
        for line in lines:
            trial = Trial(**{key: line[key] for key in Trial.__dataclass_fields__})
            if trial.method not in methods or trial.setting not in SETTINGS:
                continue
            if line["fingerprint"] != fingerprint(trial, methods):
                raise InputError(
                    f"{trial.name} was run by another protocol (or another definition of {trial.method}) than this "
                    "checkout's: give what has changed a new name, or start new --results"
                )
            rows[trial] = line
        return cls(rows, methods)

    def loss(self, trial: Trial) -> float:
        """At the end; infinite for a run that was stopped or diverged."""
        loss = self.rows[trial]["loss"]
        return math.inf if loss is None else float(loss)

    def searched(self, setting: Setting, name: str) -> Searched:
        """The search of one method in one setting, replayed over the lines."""
        if (setting.name, name) not in self._searched:
            self._searched[setting.name, name] = self._search(setting, name)
        return self._searched[setting.name, name]

    def _search(self, setting: Setting, name: str) -> Searched:
        centre = self._centre(setting, name)
        if centre is None or not setting.budget:
            return Searched(centre)
        method = self.methods[name]

        def trial(point: Point) -> Trial:
            return self.trial(setting, name, self._at(centre, method, point), 0, search=True)

        # The points that have a line, found again by their trial: a point itself is nowhere on disk.
        losses: dict[Point, float] = {}
        while True:
            try:
                found = find(losses, len(method.axes), setting.budget, setting.extra + method.more.get(setting.name, 0))
            except Needs as needs:
                wanted = [point for point in needs.points if trial(point) not in self.rows]
                losses |= {point: self.loss(trial(point)) for point in needs.points if point not in wanted}
                if not wanted:
                    continue
                best = min(losses, key=lambda point: losses[point], default=None)
                rates = None if best is None else self._at(centre, method, best)
                return Searched(rates, tuple(map(trial, wanted)), tuple(map(trial, losses)))
            return self._ended(found, method, centre, tuple(map(trial, found.tried)))

    def _ended(self, found: Found, method: Method, centre: Rates, tried: tuple[Trial, ...]) -> Searched:
        open_axes = tuple(method.axes[axis] for axis in found.open_axes)
        return Searched(self._at(centre, method, found.best), (), tried, open_axes)

    def _centre(self, setting: Setting, name: str) -> Rates | None:
        """Where the search starts; None while that is not known."""
        method = self.methods[name]
        if setting.rates_of is not None:
            first = self.searched(SETTINGS[setting.rates_of], name)
            return first.rates if first.finished else None
        inherited: Rates = {"knob": method.knob.centre}
        if method.start is not None:
            parent = self.searched(setting, method.start)
            if not parent.finished or parent.rates is None:
                return None
            same_knob = self.methods[method.start].knob == method.knob
            inherited |= parent.rates if same_knob else {k: v for k, v in parent.rates.items() if k != "knob"}
        return {axis: {**inherited, **method.centre}[axis] for axis in AXES}

    def _at(self, centre: Rates, method: Method, point: Point) -> Rates:
        rates = dict(centre)
        for axis, half_steps in zip(method.axes, point, strict=True):
            factor = method.knob.factor if axis == "knob" else 2.0
            rates[axis] = round_rate(centre[axis] * factor ** (half_steps / 2))
        return rates

    def trial(self, setting: Setting, name: str, rates: Rates, seed: int, *, search: bool = False) -> Trial:
        """One run at these rates."""
        steps = search_steps(setting) if search else setting.steps
        return Trial(setting.name, name, **rates, norm_lr=NORM_LR, seed=seed, steps=steps, search=search)

    def finals(self, setting: Setting, name: str) -> list[Trial]:
        """The full runs there are of a method, by seed, at the rates that its search found."""
        searched = self.searched(setting, name)
        if searched.rates is None or not searched.finished:
            return []
        # every seed that a stage could ask for, and those that somebody asked for besides
        trials = (self.trial(setting, name, searched.rates, seed) for seed in range(10))
        return [trial for trial in trials if trial in self.rows]

    def ranking(self) -> dict[str, float]:
        """Methods with a full run of the first setting, best first: mean loss over its seeds."""
        first = SETTINGS[STAGES[0].setting]
        means = {}
        for name in self.methods:
            if losses := [self.loss(trial) for trial in self.finals(first, name)]:
                means[name] = sum(losses) / len(losses)
        return dict(sorted(means.items(), key=lambda item: item[1]))

    def front(self) -> list[str]:
        """Of these the ones that nothing with as little state is better than: the Pareto front of the first setting."""
        first = SETTINGS[STAGES[0].setting]
        points = {
            name: (self.rows[self.finals(first, name)[0]]["state_total"], loss) for name, loss in self.ranking().items()
        }
        best = front(list(points.values()))
        return [name for name, point in points.items() if point in best]

    def chosen(self, stage: Stage) -> list[str]:
        """The methods that a stage is for, the baseline and its other searches always among them."""
        ranking = self.ranking()
        if stage.who == "all":
            return [*self.methods]
        if not ranking:
            return []
        best = min(ranking.values())
        near = [name for name, loss in ranking.items() if loss <= best + math.log(CLOSE)]
        winners, always = self.front(), self.alike(next(iter(self.methods)))
        close = list(dict.fromkeys([*winners, *near]))
        chosen = {"close": close, "leaders": close[:LEADERS], "winners": winners}[stage.who]
        return [name for name in self.methods if name in chosen or name in always]

    def alike(self, name: str) -> list[str]:
        """The methods that are this one but for their search, itself among them."""
        return [other for other, method in self.methods.items() if method.keys == self.methods[name].keys]

    def baseline(self, setting: Setting) -> str:
        """What the others are compared to: of the baseline's searches the one that ended best, on the seeds of both."""
        best, *others = self.alike(next(iter(self.methods)))
        for name in others:
            pairs = paired(self, self.finals(setting, name), self.finals(setting, best))
            pairs = [(new, old) for new, old in pairs if replace(new, method=best) != old]  # the same run, repeated
            if sum(self.loss(new) - self.loss(old) for new, old in pairs) < 0:
                best = name
        return best

    def wanted(self) -> Iterator[Trial]:
        """All that can be run now, first things first."""
        for stage in STAGES:
            setting = SETTINGS[stage.setting]
            for name in self.chosen(stage):
                searched = self.searched(setting, name)
                yield from searched.wanted
                if searched.finished and searched.rates is not None:
                    trials = (self.trial(setting, name, searched.rates, seed) for seed in stage.seeds)
                    yield from (trial for trial in trials if not self.has(trial))

    def has(self, trial: Trial) -> bool:
        """Whether its line is there, or that of the same run under a method that is searched otherwise."""
        return any(replace(trial, method=name) in self.rows for name in self.alike(trial.method))


def paired(board: Board, trials: list[Trial], base: list[Trial]) -> list[tuple[Trial, Trial]]:
    """Seed by seed, where both have the seed and an end."""
    of_seed = {trial.seed: trial for trial in base}
    pairs = [(trial, of_seed[trial.seed]) for trial in trials if trial.seed in of_seed]
    return [pair for pair in pairs if all(math.isfinite(board.loss(trial)) for trial in pair)]


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those with no other of as few bytes and as low a figure, by bytes."""
    best: list[tuple[float, float]] = []
    for size, figure in sorted(points):
        if not best or figure < best[-1][1]:
            best.append((size, figure))
    return best
