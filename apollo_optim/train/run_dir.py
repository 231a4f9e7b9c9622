"""The run directory: whose it is, what in it goes on, and what lies beside the results."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apollo_optim.core import disk
from apollo_optim.core.errors import Damaged, InputError, nearest
from apollo_optim.core.runlog import last_record
from apollo_optim.parallel.world import ALONE, World
from apollo_optim.train import checkpoint
from apollo_optim.train.config import RunConfig, differences, may_change, only_rounds, save_config, to_dict
from apollo_optim.train.metrics import cut_back
from apollo_optim.train.schedule import factor
from apollo_optim.train.state import TrainState, check_saved

log = logging.getLogger(__name__)


def default_run(cfg: RunConfig) -> str:
    """out/<model>-<optimizer>."""
    return f"out/{Path(cfg.model.name).name}-{cfg.optim.name}"


def run_of(cfg: RunConfig) -> Path:
    """The run directory."""
    return Path(os.path.expanduser(cfg.out or default_run(cfg)))


def was_begun(cfg: RunConfig) -> bool:
    """Whether there is a run to go on with."""
    return (run_of(cfg) / "config.yaml").exists()


@contextlib.contextmanager
def claim(run: Path, resume: bool, world: World = ALONE) -> Iterator[None]:
    """Refuse a directory that holds another run, or (to resume) none, or one in which a process is at work.

    Of several processes the one that leads looks, and the others wait for it.
    """
    if not world.leads:
        world.wait()
        yield
        return
    if run.exists() and not run.is_dir():
        raise InputError(f"out={run}: that is a file, not a run directory")
    there = max(checkpoint.checkpoints(run), default=None)
    if there is not None and not resume:
        raise InputError(
            f"{run} already holds a run (step {there} is saved): add --resume to go on with it, or choose another --out"
        )
    started = (run / "config.yaml").exists() or (run / "metrics.jsonl").exists()
    if resume and not (run / "config.yaml").exists():
        raise InputError(nothing_to_resume(run))
    with disk.locked(run) as alone:
        if started and not resume and not alone:  # a start that saved nothing may be made again, if it is over
            raise InputError(
                f"{run} holds a run that has saved nothing, and it can't be known whether it is still going on: add "
                "--resume to start it again, or choose another --out"
            )
        world.wait()
        yield


def nothing_to_resume(run: Path) -> str:
    """Why this directory cannot be resumed, and which runs are near it."""
    what = "holds no run to resume" if run.is_dir() else "there is no such directory, so no run to resume"
    there = [path.parent for path in sorted(run.parent.parent.glob("*/*/config.yaml"))]
    beside = [str(path) for path in there if path.parent == run.parent][:3]
    hint = nearest(run, there) or (f" (runs next to it: {', '.join(beside)})" if beside else "")
    return f"{run}: {what}{hint}; leave --resume out to start one"


@dataclass
class Earlier:
    """What a run goes on from."""

    state: dict[str, Any] | None = None
    """None: there is no checkpoint."""
    changed: list[str] = field(default_factory=list)
    """What rounds otherwise from here on, in words."""
    memory: dict[str, int] | None = None
    """What a run that has ended took."""
    damaged: list[str] = field(default_factory=list)
    """What is wrong with checkpoints that are newer."""


def check_continuation(run: Path, cfg: RunConfig) -> Earlier:
    """What to go on from, if the config is the one it was made with. Before the first checkpoint it may be any.

    That is the newest checkpoint that is whole: a run that starts again by itself has nobody who would delete another.
    """
    found = checkpoint.from_newest(run, checkpoint.load_state)
    if found is None:
        return Earlier()
    newest, state, damaged = found
    check_saved(state, newest)
    old = checkpoint.saved_run(run, newest)
    was, now = to_dict(old), to_dict(cfg)

    def told(keys: list[str]) -> list[str]:
        return [f"{key} (was {_at(was, key)}, is {_at(now, key)})" for key in keys]

    different = [key for key in differences(was, now) if not may_change(key)]
    if refused := told([key for key in different if not only_rounds(key)]):
        raise InputError(
            f"{run} was started with another config: {', '.join(refused)}; put it back, or choose another --out"
        )
    state["checkpoint"] = newest
    done = state["step"]
    if done > cfg.train.steps:
        raise InputError(f"{run} has {done} steps already, more than train.steps={cfg.train.steps}")
    for step in range(1, done + 1):
        if factor(step, old.train.steps, old.schedule) != factor(step, cfg.train.steps, cfg.schedule):
            raise InputError(
                f"train.steps cannot go from {old.train.steps} to {cfg.train.steps}: with schedule {cfg.schedule.kind} "
                "the steps already made would have had other learning rates (constant can, and wsd before its decay)"
            )
    ended = last_record(run / "metrics.jsonl")
    memory = ended.get("memory") if ended.get("event") == "end" and done == cfg.train.steps else None
    return Earlier(state, told(different), memory, damaged)


def _at(plain: dict[str, Any], key: str) -> Any:
    value: Any = plain
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def own_tokenizer(run: Path, state: dict[str, Any], trust_remote_code: bool) -> Any:
    """The run's copy of its tokenizer; None where it is not there or not the same any more: then the original."""
    try:
        return checkpoint.run_tokenizer(run, state["identity"], trust_remote_code=trust_remote_code)
    except InputError as error:
        log.warning("%s; the original is taken instead", error)
        return None


def restore(state: TrainState, saved: dict[str, Any], run: Path) -> None:
    """Go back to a checkpoint. Raises InputError if the text is another one."""
    was, now = saved["identity"], state.identity
    hashed = was.get("sha256") is not None  # then its name says nothing: it may lie elsewhere now
    if changed := [key for key in differences(was, now) if not (hashed and key == "name")]:
        listed = ", ".join(f"{key} (was {_at(was, key)}, is {_at(now, key)})" for key in changed)
        raise InputError(
            f"the text is not the one that {run} was trained on: {listed}; bring the files of data.source (and of "
            "data.validation_source) back as they were, or begin another run with another --out"
        )
    checkpoint.load_weights(saved["checkpoint"], state.model)
    checkpoint.restore_generation(saved["checkpoint"], state.model)
    try:
        state.load_state_dict(saved)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise Damaged(saved["checkpoint"] / "state.json", f"{type(error).__name__}: {error}") from error


def prepare(run: Path, cfg: RunConfig, step: int, tokenizer: Any, *, resume: bool, keep_code: bool) -> None:
    """What lies beside the results. Written when everything is built: a typing error leaves no run behind.

    Args:
        step: Where the run begins or goes on.
        tokenizer: None if the run's own copy is in use.
        keep_code: Its own code may go on to be named in it.
    """
    try:
        checkpoint.sweep(run)
        metrics = run / "metrics.jsonl"
        if resume:
            checkpoint.set_aside(run, step)
            cut_back(metrics, step)
        elif metrics.exists():  # of a start that saved nothing
            disk.replace(metrics, run / "metrics-before.jsonl")
        save_config(dataclasses.replace(cfg, out=str(run)), run / "config.yaml")
        if tokenizer is not None:
            checkpoint.save_tokenizer(tokenizer, run / "tokenizer", keep_code=keep_code)
    except OSError as error:
        raise InputError(f"cannot write to the run directory {run}: {error.strerror}") from None
