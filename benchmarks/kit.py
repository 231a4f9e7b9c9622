"""What every benchmark needs: a log of JSON lines, what a figure depends on, statistics, units, the command line.

Nothing here imports torch, so that a parent starts at once and holds no device. See `benchmarks.cases` for processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from apollo_optim.core.errors import InputError

Line = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
FAULTS = ("failed", "differs", "killed")
"""Statuses that should not be; "out of memory", "does not fit", "skipped" and "timed out" are answers."""


# --- the log ---


def append(log: Path, line: Mapping[str, Any]) -> None:
    """One line more, on the disk when this returns; several processes may do so at a time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(line)) + "\n"
    handle = os.open(log, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        cut_off = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, (b"\n" if cut_off else b"") + text.encode())  # in one piece
        os.fsync(handle)
    finally:
        os.close(handle)


def read(log: Path) -> list[Line]:
    """All lines of a log, none where there is no log; of one that a kill cut off, it says so on stderr."""
    lines: list[Line] = []
    if not log.exists():
        return lines
    for number, text in enumerate(log.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{log}:{number}: a line that was cut off is left out", file=sys.stderr)
    return lines


def measured(log: Path) -> list[Line]:
    """The lines of a log that a table is made of. Raises InputError where there are none."""
    if not (lines := read(log)):
        raise InputError(f"{log}: there is no such log; measure first (leave --table out), or name another folder")
    return lines


def keep_table(path: Path, title: str, text: str) -> None:
    """A table of a log, in a file of its own and on the screen."""
    path.write_text(f"# {title}\n\n{text}\n", encoding="utf-8")
    print(text)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


# --- what a figure depends on ---


@cache
def commit() -> str | None:
    """The commit of the checkout, "-dirty" if something differs from it; without git what the variable COMMIT says."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("COMMIT") or None


@cache
def versions(*more: str) -> dict[str, str | None]:
    """Versions of Python and of what is installed of torch, triton, transformers, this library and `more`."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "apollo-optim", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def hardware(device: str) -> Line:
    """The machine: its CPU and, once this process uses it, its GPU."""
    found: Line = {"device": device, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        names = (line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
        found["cpu"] = next(names, found["cpu"])
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if device.startswith("cuda") and torch.cuda.is_initialized():
            properties = torch.cuda.get_device_properties(device)
            found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    return found


# --- statistics and units ---


def spread(values: Sequence[float]) -> Line:
    """Median and quartiles of what was measured `n` times."""
    if len(values) < 2:
        median = values[0] if values else math.nan
        return {"median": median, "low": median, "high": median, "n": len(values)}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "n": len(values)}


def told(found: Line, unit: float = 1.0, digits: int = 2) -> str:
    """A `spread` in words: the median (the quartiles), each times `unit`."""
    median, low, high = (f"{found[key] * unit:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def gb(size: float | None, spec: str = ".2f") -> str:
    """Bytes as gigabytes, 1e9 bytes."""
    return "-" if size is None else format(size / 1e9, spec)


def mb(size: float | None, spec: str = ",.1f") -> str:
    """Bytes as megabytes, 1e6 bytes."""
    return "-" if size is None else format(size / 1e6, spec)


def number(value: float | None, digits: int = 3) -> str:
    """A figure of so many digits; "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def one_line(error: object, width: int = 300) -> str:
    """What an error says, fit for a line."""
    text = " ".join(str(error).split())
    return text if len(text) <= width else text[: width - 3] + "..."


# --- the command line ---


def tabled(log: Path, page: Path, table: Callable[[Sequence[Line]], str]) -> int:
    """Make the table of a log, keep it as `page` and print it. Returns the exit code."""
    text = table(measured(log))
    page.write_text(text, encoding="utf-8")
    print(text)
    return 0


def command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """`python -m benchmarks.NAME`: ends as `apollo-optim bench NAME` does, wrong input in one line and with code 2."""
    from apollo_optim.cli.main import guarded

    sys.exit(guarded(lambda: main(sys.argv[1:])))
