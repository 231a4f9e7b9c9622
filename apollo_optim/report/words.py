"""What the picture of several runs shows, in a sentence or two for each run beside the first."""

from __future__ import annotations

from collections.abc import Sequence

from apollo_optim.report.read import Run, labels
from apollo_optim.report.units import human_bytes


def in_words(runs: Sequence[Run], at: str = "", state: Sequence[int] = ()) -> list[str]:
    """State and perplexity of every run beside those of the first; of one run alone, its state.

    Args:
        at: A larger model by name.
        state: Bytes of optimizer state that each run's optimizer would keep with it.

    Perplexities are told of runs that have ended after the same tokens, for others say little.
    """
    names = labels(runs)
    if len(runs) == 1:
        return [f"With {at} {names[0]} would keep {human_bytes(state[0])} of optimizer state."] if state else []
    told = []
    for i in range(1, len(runs)):
        sentences = [_kept(runs[i], runs[0], names[i], names[0]), _reached(runs[i], runs[0], names[i], names[0])]
        if state:
            would = f"{human_bytes(state[i])} where {names[0]} would keep {human_bytes(state[0])}"
            sentences.append(f"With {at} {names[i]} would keep {would}{_times(state[0], state[i])}.")
        told.append(" ".join(filter(None, sentences)))
    return [text for text in told if text]


def _kept(run: Run, first: Run, name: str, other: str) -> str:
    size, theirs = run.memory.get("optimizer"), first.memory.get("optimizer")
    if size is None or theirs is None:
        return ""
    kept = f"{human_bytes(size)} of optimizer state where {other} keeps {human_bytes(theirs)}"
    return f"{name} keeps {kept}{_times(theirs, size)}."


def _reached(run: Run, first: Run, name: str, other: str) -> str:
    ends = [run.end, first.end]
    if any(end is None or "perplexity" not in end for end in ends) or len({end["tokens"] for end in ends if end}) > 1:
        return ""
    perplexity, theirs = (end["perplexity"] for end in ends if end)
    return f"It ends at perplexity {perplexity:.2f}, {other} at {theirs:.2f} ({perplexity / theirs - 1:+.1%})."


def _times(first: int, size: int) -> str:
    return f" ({first / size:.1f} times as much)" if 0 < size < first else ""
