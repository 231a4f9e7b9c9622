"""The loop. A story (`pretrain`) builds a state, a step and some events, and hands them to it.

>>> with stop_signals() as stop:
...     run_steps(state, TrainStep(state, cfg.train, schedule), [Log(...), Save(...)], last=1000, stop=stop)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import torch

from apollo_optim.parallel.world import ALONE, World
from apollo_optim.train.events import Event
from apollo_optim.train.failures import Interrupted
from apollo_optim.train.signals import Stop
from apollo_optim.train.state import TrainState
from apollo_optim.train.step import StepReport


def run_steps(
    state: TrainState,
    train_step: Callable[..., StepReport],
    events: Sequence[Event],
    *,
    last: int,
    stop: Stop | None = None,
    world: World = ALONE,
) -> None:
    """Step after step until step `last` is made or somebody asks to stop.

    Args:
        state: Where the run is; `state.step` counts the steps that are made.
        train_step: Called as `train_step(step, norm=...)`.
        events: What is done around some of the steps, in this order.
        world: All of its processes stop after the same step, whichever was asked.
        stop: Who asks. Then the events that are `for_goodbye` take place, and Interrupted is raised.
    """
    stop = stop or Stop()
    clock = Stopwatch(state)
    for step in range(state.step + 1, last + 1):
        due = [event for event in events if event.due(step)]
        with contextlib.ExitStack() as around:
            for event in due:
                around.enter_context(event.during(step))
            report = train_step(step, norm=any(event.needs_norm for event in due))
        state.step = step
        state.optimizer.zero_grad(set_to_none=True)
        asked = stop.requested  # read once: what is asked for from here on is done one step later
        stopping = world.any(bool(asked))
        if stopping:
            due += [event for event in events if event.for_goodbye and event not in due]
        if not due:
            continue
        clock.stop()
        for event in due:
            event.after(report)
        if stopping and step < last:
            raise Interrupted(f"{asked or 'another process was asked'}: saved after step {step}")
        clock.start()


class Stopwatch:
    """Counts the seconds of training into the state; evaluations and checkpoints are made while it stands still."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self.start()

    def start(self) -> None:
        """Go on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Wait for the device, so that all the time it took is counted, and stand still."""
        if self._state.device.type == "cuda":
            torch.cuda.synchronize(self._state.device)
        self._state.seconds += time.perf_counter() - self._since
