"""Where a run is written down: its log with the trackers, and what a person sees."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo_optim.parallel.world import ProcessLost, World, losing_none
from apollo_optim.train.checkpoint import SaveFailed, newest
from apollo_optim.train.display import Display, open_display
from apollo_optim.train.failures import TrainingFailed
from apollo_optim.train.metrics import Metrics, open_trackers
from apollo_optim.train.state import TrainState


@dataclass(frozen=True)
class Record:
    """The log and the display of a run, open."""

    metrics: Metrics
    display: Display


@contextlib.contextmanager
def recording(
    run: Path, state: TrainState, config: dict[str, Any], title: str, steps: int, world: World
) -> Iterator[Record]:
    """Open both; close them, and tell in one line, with what is left of the run, what went wrong meanwhile.

    Args:
        run: The run directory.
        config: All of the run's configuration; its section `log` says what is shown and who tracks.
        world: Only the process that leads writes and shows.
    """
    log: dict[str, Any] = config["log"] if world.leads else {"display": "none", "to": []}
    display = open_display(log["display"], title, steps)
    with contextlib.ExitStack() as closing:
        closing.callback(display.close)
        trackers = open_trackers(list(log["to"]), run, config, state.step)
        metrics = Metrics(run / "metrics.jsonl" if world.leads else Path(os.devnull), trackers)
        closing.callback(metrics.close)
        try:
            with losing_none():
                yield Record(metrics, display)
        except TrainingFailed as error:
            told = TrainingFailed(f"{error}; {last_good(run)}", error.step)
            with contextlib.suppress(OSError):  # what failed first is what is told
                metrics.write("failed", step=state.step if error.step is None else error.step, reason=str(told))
            raise told from error.__cause__
        except ProcessLost as error:
            raise TrainingFailed(f"{lost(error)} after step {state.step}; {last_good(run)}") from error
        except SaveFailed as error:
            raise TrainingFailed(f"step {state.step}: {error}; {last_good(run)}") from error
        except OSError as error:
            raise TrainingFailed(
                f"step {state.step}: cannot write to {run}: {error.strerror or error}; {last_good(run)}"
            ) from error


def lost(error: ProcessLost) -> str:
    """What has become of the others, as far as it can be known here."""
    return f"another process of the run is gone, or does not answer ({error})"


def last_good(run: Path) -> str:
    """What is left, for an error message."""
    there = newest(run)
    return f"the last good checkpoint is {there}" if there else "there is no checkpoint yet"
