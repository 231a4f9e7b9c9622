"""What a run leaves behind: one JSON object a line in metrics.jsonl, always; trackers besides, if asked for."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from apollo_optim.core import disk
from apollo_optim.core.errors import InputError
from apollo_optim.core.reading import read_text
from apollo_optim.core.runlog import Gaps, Log
from apollo_optim.data.foreign import explained

logger = logging.getLogger(__name__)
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """Somebody else's board."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Take the figures of one step."""

    def close(self) -> None:
        """There will be no more."""


class Metrics:
    """The log of one run, open for appending. Every line is flushed, so that a killed process loses none."""

    def __init__(self, path: Path, trackers: list[Tracker]) -> None:
        self._path, self._file = path, disk.appending(path)
        self._trackers = trackers

    def write(self, event: str, **fields: Any) -> dict[str, Any]:
        """Append one line; numbers of steps and evaluations also go to the trackers. Returns the record."""
        record = {"event": event, **fields}
        self._file.write(json.dumps(_finite(record)).encode() + b"\n")
        self._file.flush()
        if event in ("step", "eval"):
            prefix = "eval/" if event == "eval" else "train/"
            figures = {
                prefix + key: value
                for key, value in fields.items()
                if key != "step" and isinstance(value, (int, float))
            }
            for tracker in self._trackers:
                tracker.write(fields["step"], figures)
        return record

    def flush(self) -> None:
        """Onto the disk itself: before a checkpoint says that the log reaches this far."""
        disk.flush(self._path)

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def cut_back(path: Path, step: int) -> None:
    """Drop all that was recorded after `step`, and what a kill left of the last line; say what else is wrong with it.

    Lines that are no records stay where they are, and are counted.
    """
    if not path.exists():
        if step:
            logger.warning("%s is not there: the log lacks steps 1 to %d", path, step)
        return
    lines, gaps = Log(path), Gaps()
    with disk.writing(path) as file:
        for line, record in lines:
            if record is not None:
                beyond = record.get("step", 0) > step or (record.get("resumed_from") or 0) > step
                if beyond or record["event"] == "end" or not line.endswith(b"\n"):
                    continue
                gaps.see(record)
            file.write(line)
    if lines.bad:
        logger.warning("%s", lines.told)
    if lacking := gaps.up_to(step):
        logger.warning("%s lacks steps: %s", path, lacking)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


# --- trackers ---


def check_trackers(names: list[str]) -> None:
    """Say what is missing before anything is computed."""
    for name in names:
        try:
            importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError:
            raise InputError(
                f"log.to={name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}"
            ) from None


def open_trackers(names: list[str], run: Path, config: dict[str, Any], step: int) -> list[Tracker]:
    """Those that were asked for; `step` is the one that a resumed run continues from, else 0."""
    check_trackers(names)
    found: list[Tracker] = []
    for name in names:
        with explained(f"log.to={name}: it could not be opened"):
            found.append(TRACKERS[name](run, config, step))
    return found


class TensorBoard:
    """RUN/tensorboard, for `tensorboard --logdir`."""

    def __init__(self, run: Path, config: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```", step)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One point of every curve."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the rest out."""
        self._writer.close()


class WandB:
    """Weights & Biases; project, entity and mode come from its own environment variables."""

    def __init__(self, run: Path, config: dict[str, Any], step: int) -> None:
        import wandb

        # One id for a run and its continuations, kept beside the results.
        note = run / "wandb-id"
        if not (step and note.exists()):
            disk.write(note, secrets.token_hex(4))
        project = os.environ.get("WANDB_PROJECT", "apollo-optim")
        self._run: Any = wandb.init(
            project=project, name=run.name, id=read_text(note), resume="allow", dir=str(run), config=config
        )

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One point of every curve."""
        self._run.log(figures, step=step)

    def close(self) -> None:
        """Say goodbye."""
        self._run.finish()


class Trackio:
    """Trackio, the local-first tracker with W&B's interface."""

    def __init__(self, run: Path, config: dict[str, Any], step: int) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project="apollo-optim", name=run.name, resume="allow" if step else "never", config=config)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One point of every curve."""
        self._trackio.log(figures, step=step)

    def close(self) -> None:
        """Say goodbye."""
        self._trackio.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
