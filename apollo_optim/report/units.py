"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def unit_of(size: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit that is not larger than `size`, else the smallest one."""
    return next((unit for unit in units if size >= unit[0]), units[-1])


def byte_scale(size: float) -> tuple[float, str]:
    return unit_of(size, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")))


def token_scale(most: float, word: str) -> tuple[float, str]:
    """What an axis of so many tokens counts in; `word`: what they are called."""
    return unit_of(
        most, ((1e9, f"billions of {word}"), (1e6, f"millions of {word}"), (1e3, f"thousands of {word}"), (1, word))
    )


def time_scale(longest: float) -> tuple[float, str]:
    """What an axis of so many seconds counts in."""
    return unit_of(longest / 2, ((3600, "hours"), (60, "minutes"), (1, "seconds")))


def human_bytes(size: float) -> str:
    factor, unit = byte_scale(size)
    return f"{size / factor:.3g} {unit}"


def human_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"
