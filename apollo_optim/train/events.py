"""What is done around some of the steps: log, evaluate, save, tally. Each says when, and what."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from apollo_optim.core.place import local
from apollo_optim.core.runlog import Log as RunLog
from apollo_optim.core.storage import is_finite
from apollo_optim.parallel.world import ALONE, World
from apollo_optim.quant.stats import figures, rounding_stats
from apollo_optim.train import checkpoint, measure
from apollo_optim.train.company import BUSY, Others
from apollo_optim.train.evaluate import evaluate
from apollo_optim.train.failures import TrainingFailed
from apollo_optim.train.gradients import Gradients
from apollo_optim.train.optimizer import learning_rates
from apollo_optim.train.record import Record
from apollo_optim.train.skips import PATIENCE, Skips
from apollo_optim.train.state import TrainState

if TYPE_CHECKING:
    from torch import nn

    from apollo_optim.data import Batch
    from apollo_optim.train.chunked import How
    from apollo_optim.train.step import StepReport


def best_evaluation(run: Path) -> dict[str, Any]:
    """The record of a run's log with the lowest validation loss, the first of these; {} if there is none."""
    records = (record for _, record in RunLog(run / "metrics.jsonl") if record is not None)
    found = [record for record in records if record["event"] == "eval" and record["loss"] is not None]
    return min(found, key=lambda record: record["loss"], default={})


def due(step: int, every: int | None, last: int) -> bool:
    """Every so many steps, and at the last one."""
    return step == last or (every is not None and step % every == 0)


class Event:
    """Something that is done around some of the steps. A subclass overrides what it needs."""

    needs_norm: ClassVar[bool] = False
    """Whether it wants to know the gradients' norm."""
    for_goodbye: ClassVar[bool] = False
    """Whether it takes place when a run is asked to stop, due or not."""

    def due(self, step: int) -> bool:
        """Whether it takes place at this step."""
        raise NotImplementedError

    def during(self, step: int) -> AbstractContextManager[None]:
        """Around the step itself: when it is left, the gradients are still there."""
        return contextlib.nullcontext()

    def after(self, report: StepReport) -> None:
        """When the step is over and the clock stands still."""


@dataclasses.dataclass
class Memory(Event):
    """At the first step: bytes of weights, gradients and optimizer state, as they really are."""

    state: TrainState
    gradients: Gradients
    record: Record

    def __post_init__(self) -> None:
        self._first = self.state.step + 1

    def due(self, step: int) -> bool:
        return step == self._first

    @contextlib.contextmanager
    def during(self, step: int) -> Iterator[None]:
        yield
        sizes = measure.memory(self.state.model, self.state.optimizer)
        if self.gradients.released:  # they are gone already
            sizes["gradients"] = self.gradients.most()
        self.record.metrics.write("memory", step=step, **sizes)
        self.record.display.memory(sizes)


@dataclasses.dataclass
class Tally(Event):
    """One line of the log on what rounding made of the step of low-bit weights."""

    state: TrainState
    record: Record
    every: int | None
    world: World = ALONE

    def due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0

    @contextlib.contextmanager
    def during(self, step: int) -> Iterator[None]:
        with rounding_stats(self.state.model) as found:
            yield
        device = self.state.device
        told = figures(found, lambda sums: self.world.total(sums.to(device)).cpu())
        self.record.metrics.write("tally", step=step, weights=told)


@dataclasses.dataclass
class Log(Event):
    """One line of the log. Stops a run of which every step is skipped."""

    state: TrainState
    record: Record
    every: int | None
    last: int
    world: World = ALONE
    needs_norm = True

    def __post_init__(self) -> None:
        self._skips = Skips(self.state.model, self.state.optimizer, self.state.step)
        self._patience = min(PATIENCE, self.last - self.state.step)
        self._mark = self._progress()
        self._dead = False
        self._waited: float | None = None  # until the first line, which had to wait for the first text
        self._others = Others()

    def due(self, step: int) -> bool:
        return due(step, self.every, self.last) or step == 1

    def after(self, report: StepReport) -> None:
        state = self.state
        self._say_skipped()
        before = self._mark[-1]
        tokens_per_s, left = self._pace()
        data_wait = report.data_wait - (self._waited or 0.0)
        waiting = None if self._waited is None else data_wait / (state.seconds - before)
        self._waited = report.data_wait
        lr, lr_rest = learning_rates(state.optimizer)
        record = self.record.metrics.write(
            "step",
            step=state.step,
            tokens=state.tokens,
            loss=report.loss,
            lr=lr,
            lr_rest=lr_rest,
            grad_norm=report.grad_norm.get() if report.grad_norm is not None else math.nan,
            tokens_per_s=tokens_per_s,
            seconds=state.seconds,
            data_wait=data_wait,
            others=self._others.since() if self.world.size == 1 else None,  # (the run's own processes are others, too)
            skipped=self._skips.total,
        )
        shown = {"peak_gpu": measure.peak_gpu_memory(state.device), "waiting": waiting}
        self.record.display.step(record | shown, left)
        self._check_progress()
        share = self._others.altogether()
        if state.step == self.last and share is not None and share >= BUSY:
            self.record.display.note(
                f"other processes took {share:.0%} of the processors' time: figures of time are those of a busy machine"
            )
        if record["grad_norm"] == 0 and not self._dead:
            self._dead = True
            self.record.display.note(
                f"at step {state.step} every gradient is 0: the model is dead, and goes on in vain. A learning rate "
                "that is far too large does that"
            )

    def _progress(self) -> tuple[float, float, float]:
        return self.state.step, self.state.tokens, self.state.seconds

    def _pace(self) -> tuple[float, float]:
        """Tokens per second since the last call, and the seconds that are left if it goes on like that."""
        now = self._progress()
        steps, tokens, seconds = (a - b for a, b in zip(now, self._mark, strict=True))
        self._mark = now
        return tokens / seconds, seconds / steps * (self.last - self.state.step)

    def _say_skipped(self) -> None:
        """One line where a parameter's gradient is not finite for the first time."""
        if new := self._skips.look(self.state.step):
            more = f" and {len(new) - 3} more" if len(new) > 3 else ""
            self.record.display.note(
                f"by step {self.state.step}: the gradient of {', '.join(new[:3])}{more} was not finite; "
                "such updates are skipped and counted"
            )

    def _check_progress(self) -> None:
        """Stop a run that only looks like one: no gradient is finite, so no weight has changed for a while."""
        if self._skips.streak >= self._patience:
            raise TrainingFailed(
                f"no gradient was finite in the last {self._skips.streak} steps, up to step {self.state.step}: every "
                "update was skipped, and no weight has changed. Look for what overflows (dtype, attention, learning "
                "rate)"
            )


@dataclasses.dataclass
class Evaluate(Event):
    """Evaluation on rows of validation text. A loss that is not finite means that the weights are spoilt."""

    state: TrainState
    record: Record
    rows: list[Batch]
    batch_size: int
    bytes_per_token: float
    every: int | None
    last: int
    loss: How = "auto"
    world: World = ALONE
    learner: nn.Module | None = None

    def due(self, step: int) -> bool:
        return due(step, self.every, self.last)

    def after(self, report: StepReport) -> None:
        state = self.state
        figures = evaluate(
            state.model,
            self.rows,
            self.batch_size,
            self.bytes_per_token,
            self.loss,
            learner=self.learner,
            world=self.world,
        )
        if not math.isfinite(figures.loss):
            raise TrainingFailed(f"the validation loss is {figures.loss} after step {state.step}")
        state.evaluation = dataclasses.asdict(figures)
        record = self.record.metrics.write(
            "eval", step=state.step, tokens=state.tokens, **state.evaluation, seconds=state.seconds
        )
        self.record.display.evaluation(record)


@dataclasses.dataclass
class Save(Event):
    """A checkpoint, unless the weights are already spoilt: the last one saved must be a good one."""

    state: TrainState
    record: Record
    run: Path
    every: int | None
    keep: int
    last: int
    config: dict[str, Any] | None = None
    """The run's, which a checkpoint keeps a copy of."""
    world: World = ALONE
    best: bool = False
    """Keep that of the lowest validation loss, too."""
    evaluated: int | None = None
    """Every so many steps; with `best` there is a checkpoint then, too."""
    _lowest: tuple[float, int] | None = dataclasses.field(default=None, init=False)
    """The lowest validation loss, and its step."""
    for_goodbye = True

    def due(self, step: int) -> bool:
        return due(step, self.every, self.last) or (self.best and due(step, self.evaluated, self.last))

    def after(self, report: StepReport) -> None:
        self.now()

    def now(self) -> None:
        """Save what is there, if it is not saved yet."""
        state = self.state
        if self.world.any(not all(is_finite(local(p)) for p in state.model.parameters())):
            raise TrainingFailed(f"the weights are not finite any more after step {state.step}")
        if self.world.leads:
            self.record.metrics.flush()
            best = self.best_step() if self.best else None
            checkpoint.save(self.run, state.step, state.model, state.state_dict(), self.keep, self.config, best)
        else:
            checkpoint.lend(checkpoint.weights(state.model), state.state_dict())
        self.world.wait()  # a checkpoint is there when all go on

    def best_step(self) -> int | None:
        """The step of the lowest validation loss so far, the first of these. The log may be long: it is read once."""
        if self._lowest is None:
            if found := best_evaluation(self.run):
                self._lowest = found["loss"], found["step"]
        elif due(self.state.step, self.evaluated, self.last):
            self._lowest = min(self._lowest, (self.state.evaluation["loss"], self.state.step))
        return None if self._lowest is None else self._lowest[1]
