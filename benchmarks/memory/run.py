"""A run of `pretrain` beside the plan of its configuration, from its log."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from apollo_optim.train.config import from_dict
from benchmarks import kit
from benchmarks.table import markdown

gb = partial(kit.gb, spec=".3f")


def of_run(log: Path, peak: int | None = None, baseline: int | None = None) -> str:
    """The table of a run's peak beside its plan, from its log.

    `peak`, `baseline`: bytes of those that the log lacks (the run was stopped; it is older than the figure).
    """
    from apollo_optim.report import read_run
    from apollo_optim.train.plan import planned

    run = read_run(log)
    cfg = from_dict(run.start["config"])
    plan = planned(cfg, vocab_size=run.start["corpus"]["tokenizer"]["entries"])
    there = run.start.get("baseline") or {}
    peak, baseline = peak or run.memory.get("peak"), baseline or there.get("imports")
    sizes = {
        "weights": (run.memory["weights"], plan.rows["weights"]),
        "optimizer state": (run.memory["optimizer"], plan.rows["state, matrices"] + plan.rows["state, rest"]),
    }
    rows = [[what, gb(a), gb(b), f"{a - b:+,} bytes"] for what, (a, b) in sizes.items()]
    note = ""
    if peak is None:
        note = "No peak in the log, the run did not end: --peak 8.06GB gives what it printed."
    elif baseline is None:
        rows.append(["peak of the process", gb(peak), gb(plan.total), ""])
        note = "No import baseline in the log, it is an older one: --baseline 0.35GB gives it."
    else:
        above = f"{(peak - baseline) / plan.total - 1:+.1%}"
        rows.append([f"peak less imports, {gb(baseline)}", gb(peak - baseline), gb(plan.total), above])
        if "data" in there:
            rows.append(["of it the text and its tokenizer", gb(there["data"] - there["imports"]), "", ""])
    title = f"{cfg.model.name}, {cfg.optim.name}: {log}, beside the plan of its configuration (GB)"
    text = markdown(["", "measured", "planned", "difference"], rows, "lr")
    return "\n\n".join([title, text, *filter(None, [note])])


def in_bytes(text: str) -> int:
    """8.06GB, 350MB, or a number of bytes."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("", 1)):
        if text.endswith(unit):
            try:
                return int(float(text.removesuffix(unit)) * factor)
            except ValueError:
                break
    raise argparse.ArgumentTypeError(f"{text}: give a size such as 8.06GB")
