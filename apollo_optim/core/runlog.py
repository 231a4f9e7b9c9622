"""Reading the log of a run, `metrics.jsonl`, line by line: records of known types, and all else counted and told.

Whoever reads a log reads it here: a log may have been cut off by a kill, merged by a tool or edited by a hand. No line
is held longer than it takes to look at it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apollo_optim.core.errors import InputError
from apollo_optim.core.reading import is_count, opened

Record = dict[str, Any]
Test = Callable[[Any], bool]
LONGEST = 4 << 20  # bytes of a line: a start holds the run's configuration, which is a thousandth of it


def is_number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def maybe(test: Test) -> Test:
    """Or null."""
    return lambda value: value is None or test(value)


def table(test: Test, **named: Test) -> Test:
    """An object whose values are like that; those of some names like this."""

    def is_table(value: Any) -> bool:
        return isinstance(value, dict) and all(named.get(key, test)(item) for key, item in value.items())

    return is_table


def anything(_: Any) -> bool:
    """Whatever it is."""
    return True


SIZES = table(is_count)
TOKENIZER = table(anything, name=is_text, sha256=maybe(is_text))
CORPUS = table(anything, name=is_text, sha256=maybe(is_text), python=is_text, tokenizer=TOKENIZER)
FIGURES = {"seconds": is_number, "lr": maybe(is_number), "lr_rest": maybe(is_number), "perplexity": maybe(is_number)}
FIGURES |= {"perplexity_reference": maybe(is_number), "bits_per_byte": maybe(is_number)}
# Of every kind of record that somebody reads: what it must have, and what the rest of it is if it is there.
NEEDED: dict[str, dict[str, Test]] = {
    "start": {"config": table(maybe(table(anything)), out=maybe(is_text))},
    "step": {"step": is_count, "tokens": is_count, "loss": maybe(is_number)},
    "eval": {"step": is_count, "tokens": is_count, "loss": maybe(is_number)},
}
OPTIONAL: dict[str, dict[str, Test]] = {
    "start": {"corpus": maybe(CORPUS), "memory": SIZES, "params": is_count, "peak_lr": maybe(table(is_number))},
    "step": FIGURES,
    "eval": FIGURES,
    "memory": dict.fromkeys(("weights", "gradients", "optimizer"), is_count),
    "end": {"memory": maybe(SIZES)},
}
ALWAYS: dict[str, Test] = {"step": is_count, "resumed_from": maybe(is_count)}


def why_not(record: Any) -> str | None:
    """Why this is no record of a log; None if it is one."""
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return "not an event of a run's log"
    event = record["event"]
    for key, test in NEEDED.get(event, {}).items():
        if key not in record or not test(record[key]):
            return f"a {event} without a {key} that makes sense"
    for key, test in (ALWAYS | OPTIONAL.get(event, {})).items():
        if key in record and not test(record[key]):
            return f"a {event} whose {key} makes no sense"
    return None


class Log:
    """The lines of a log; `bad` counts those that are no records, `told` says it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad = 0
        self.first = ""
        """The first bad line: its number, and what is wrong with it."""

    def __iter__(self) -> Iterator[tuple[bytes, Record | None]]:
        """Every line with its newline, and the record that it is, or None; blank ones are left out.

        A last line without its newline was cut short by a kill, or is being written: it comes if it is a record.
        """
        with opened(self.path) as file:
            number = 0
            while line := file.readline(LONGEST):
                number += 1
                if line.endswith(b"\n") or len(line) < LONGEST:
                    record, why = self._parsed(line)
                    if why is None:
                        yield line, record
                    elif line.strip() and line.endswith(b"\n"):
                        self._count(number, why)
                        yield line, None
                    continue
                while (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
                    pass
                self._count(number, f"longer than {LONGEST >> 20} MiB")

    def _parsed(self, line: bytes) -> tuple[Record | None, str | None]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None, "not an event of a run's log"
        why = why_not(record)
        return (record, None) if why is None else (None, why)

    def _count(self, number: int, why: str) -> None:
        self.bad += 1
        self.first = self.first or f"line {number}: {why}"

    @property
    def told(self) -> str:
        """What was not read, in one line; empty where all was."""
        lines = "1 line that is no record" if self.bad == 1 else f"{self.bad:,} lines that are no records"
        return f"{self.path} has {lines}, the first: {self.first}" if self.bad else ""


def last_record(path: Path) -> Record:
    """The last line of a log, {} if there is none or it is no record."""
    try:
        with opened(path) as file:
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            lines = file.read().splitlines()
        found = json.loads(lines[-1]) if lines else {}
    except (OSError, InputError, ValueError, RecursionError):
        return {}
    return {} if why_not(found) else dict(found)


class Gaps:
    """Which steps a log lacks, as far as one can know: lines come at step 1 and at every multiple of `log.every`."""

    def __init__(self) -> None:
        self._every: int | None = 1
        self._last = 0
        self._found: list[tuple[int, int]] = []

    def see(self, record: Record) -> None:
        """The next record."""
        if record["event"] == "start":
            every = (record["config"].get("log") or {}).get("every")
            self._every = every if is_count(every) and every else None
        elif record["event"] == "step":
            self._lacks_before(record["step"])
            self._last = max(self._last, record["step"])

    def up_to(self, step: int) -> str:
        """The steps up to this one without a line where one was due, in words; empty where none lacks."""
        self._lacks_before(step + 1)
        told = [f"{first}" if first == last else f"{first} to {last}" for first, last in self._found[:3]]
        return ", ".join(told) + (" and more" if len(self._found) > 3 else "")

    def _lacks_before(self, step: int) -> None:
        if self._every is None:
            return
        due = 1 if self._last == 0 else self._last - self._last % self._every + self._every
        if due < step and len(self._found) < 4:
            self._found.append((due, step - 1))
