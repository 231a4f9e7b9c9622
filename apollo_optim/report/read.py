"""What runs looked like, as their logs tell it, and which of them can be compared."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, overload

from apollo_optim.core.errors import InputError
from apollo_optim.core.runlog import Log

logger = logging.getLogger(__name__)
Event = dict[str, Any]
COUNTS = ("step", "tokens")
STEP = (*COUNTS, "loss", "seconds", "lr", "lr_rest")
EVAL = (*COUNTS, "loss", "seconds", "perplexity", "perplexity_reference", "bits_per_byte")
PARTS = ("weights", "gradients", "optimizer")  # of the memory that stays


@dataclass(frozen=True)
class Run:
    """One run, as its log tells it."""

    path: Path
    """Its directory, or its log where that was kept alone."""
    start: Event
    """The last start: a resumed run has several, of the same configuration."""
    steps: Series
    evals: Series
    sizes: dict[str, int]
    """Bytes of weights, gradients and optimizer state after the first step."""
    end: Event | None
    """None while a run goes on, or when it was stopped."""
    resumes: int

    def setting(self, section: str, key: str) -> Any:
        return (self.start["config"].get(section) or {}).get(key)

    def peak(self, rate: str) -> float | None:
        """The configured learning rate (`lr`, `lr_rest`); of older logs, which do not say, the highest one logged."""
        configured = self.start.get("peak_lr") or {}
        if rate in configured:
            return float(configured[rate])
        return max((x for x in self.steps.column(rate) if not math.isnan(x)), default=None)

    @property
    def tunes(self) -> bool:
        """Is it a fine-tuning run? Its tokens are those that are learnt: answers, not questions or padding."""
        return self.setting("data", "format") not in (None, "text")

    @property
    def optimizer(self) -> str:
        return str(self.setting("optim", "name"))

    @property
    def final(self) -> Event:
        """The last evaluation; of a run without one, the last step."""
        return next((events[-1] for events in (self.evals, self.steps) if events), {})

    @property
    def seconds(self) -> float | None:
        known = (x for x in chain(self.steps.column("seconds"), self.evals.column("seconds")) if not math.isnan(x))
        return max(known, default=None)

    def expected(self, key: str) -> float:
        """Where this figure (tokens, seconds) will be when the run has made all its steps, as it went so far."""
        planned, last = self.setting("train", "steps"), self.steps[-1] if self.steps else {}
        now = float(last.get(key, 0.0))
        goes_on = not self.end and isinstance(planned, int) and last.get("step", 0) > 0
        return now * max(1.0, planned / last["step"]) if goes_on else now

    @property
    def tokens_per_second(self) -> float | None:
        last = self.steps[-1] if self.steps else {}
        return last["tokens"] / last["seconds"] if last.get("seconds") else None

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by part: the end's; before it, those counted after the first step, when the optimizer has its state."""
        return self.sizes | ((self.end or {}).get("memory") or {})


def read_run(path: str | Path) -> Run:
    """Read the log of a run directory, or a log that was kept alone, under a name of its own."""
    path = Path(path)
    if path.name == "metrics.jsonl":
        path = path.parent
    log = log_of(path)
    lines = Log(log)
    steps, evals = Series(STEP), Series(EVAL)
    starts, start, memory, end = 0, Event(), list[Event](), None
    for _, record in lines:
        kind = record["event"] if record else ""
        if record is None:
            continue
        if kind == "start":
            starts, start = starts + 1, record
        elif kind in ("step", "eval") and record["loss"] is not None:  # a loss that is null was not a number
            (steps if kind == "step" else evals).append(record)
        elif kind == "memory":
            memory = [record]
        elif kind == "end":
            end = record
    if lines.bad:
        logger.warning("%s", lines.told)
    if not starts:
        raise InputError(f"{log}: no start event in it, so it is not the log of a run")
    return Run(path, start, steps, evals, sizes_of(start, *memory), end, resumes=starts - 1)


def log_of(path: Path) -> Path:
    """The log of a run's directory, or one that was kept alone. Raises InputError where there is none."""
    log = path / "metrics.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise InputError(f"{path}: no metrics.jsonl there; name the directory of a run (what `pretrain --out` named)")
    return log


def read_events(log: Path) -> list[Event]:
    """All records of a log; what is none is left out and said."""
    lines = Log(log)
    events = [record for _, record in lines if record is not None]
    if lines.bad:
        logger.warning("%s", lines.told)
    return events


class Series(Sequence[Event]):
    """Records of one kind, of which only some figures are kept: eight bytes each, where a record takes hundreds."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._columns = {key: array("d") for key in keys}
        self._count = 0

    def append(self, record: Event) -> None:
        """One more at the end."""
        self._count += 1
        for key, column in self._columns.items():
            value = record.get(key)
            column.append(math.nan if value is None else value)

    def column(self, key: str) -> array[float]:
        """One figure of all of them; NaN where a record does not have it."""
        return self._columns[key]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        figures = {key: column[index] for key, column in self._columns.items()}
        return {key: int(value) if key in COUNTS else value for key, value in figures.items() if not math.isnan(value)}


def sizes_of(start: Event, *measured: Event) -> dict[str, int]:
    """The parts' bytes, as the last of these events tells them."""
    last = measured[-1] if measured else start.get("memory", {})
    return {part: last[part] for part in PARTS if part in last}


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its optimizer where that tells them apart, else its directory."""
    optimizers = [run.optimizer for run in runs]
    if len(set(optimizers)) == len(runs):
        return optimizers
    names = [run.path.resolve().name.removesuffix(".jsonl") for run in runs]
    return names if len(set(names)) == len(runs) else [str(run.path) for run in runs]


def check_comparable(runs: Sequence[Run]) -> None:
    """Perplexity depends on the text and on how it is cut: refuse to put runs side by side that differ in either."""
    for what, identity in (("corpora", corpus_of), ("tokenizers", tokenizer_of)):
        groups: dict[str, list[Path]] = {}
        for run in runs:
            groups.setdefault(identity(run), []).append(run.path)
        if len(groups) > 1:
            told = "; ".join(f"{name}: {', '.join(map(str, paths))}" for name, paths in groups.items())
            raise InputError(f"different {what}, so the losses can't be compared ({told}): report these runs apart")


def corpus_of(run: Run) -> str:
    corpus = run.start.get("corpus") or {}
    if corpus.get("sha256"):
        python = f", Python {corpus['python']}" if "python" in corpus else ""
        return f"{corpus['name']} (sha256 {corpus['sha256'][:12]}{python})"
    # A stream is never read to its end and has no hash: what was asked for, in which revision.
    return " ".join(str(corpus[key]) for key in ("name", "subset", "split", "revision") if corpus.get(key)) or "unknown"


def tokenizer_of(run: Run) -> str:
    tokenizer = (run.start.get("corpus") or {}).get("tokenizer") or {}
    return f"{tokenizer.get('name', 'unknown')} (sha256 {str(tokenizer.get('sha256', 'unknown'))[:12]})"


def token_word(runs: Sequence[Run]) -> str:
    """What the tokens of these runs are called."""
    kinds = {run.tunes for run in runs}
    if kinds == {True}:
        return "learnt tokens"
    return "tokens (of fine-tuning: learnt ones)" if kinds == {True, False} else "tokens"
