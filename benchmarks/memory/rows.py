"""A line of the log: what a fresh process measured, beside the plan of the same run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from apollo_optim.plan import Plan
from apollo_optim.train.config import RunConfig, to_dict
from benchmarks import cases, kit
from benchmarks.kit import Line
from benchmarks.memory.cases import CASES


def run_case(name: str, cfg: RunConfig, malloc: str = "trimmed", timeout: float = 1800.0) -> Line:
    """One line of the log: what a fresh process measured, and the plan of the same run."""
    case, started = CASES[name], time.monotonic()
    row: Line = {
        "case": name,
        "size": cfg.model.name,
        "dtype": cfg.model.dtype,
        "batch": cfg.train.batch_size,
        "seq": cfg.data.seq_len,
        "steps": cfg.train.steps,
        "checkpointing": cfg.model.gradient_checkpointing,
        "malloc": malloc,
        "config": to_dict(cfg),
    }
    row |= answer(name, cfg, malloc, timeout)
    row["seconds"] = round(time.monotonic() - started, 1)
    if case.peer is None and row["status"] == "ok":
        from apollo_optim.train.plan import planned

        row |= beside(row, planned(cfg))
    return row


def answer(name: str, cfg: RunConfig, malloc: str, timeout: float) -> Line:
    """What the case's own process says, or what became of it."""
    package = CASES[name].package.replace("_", "-")
    config = {"run": to_dict(cfg), "malloc": malloc, "packages": [package] if package else []}
    asked = cases.Case("memory", name, "benchmarks.memory.measure:life", config)
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        log = Path(folder, "log.jsonl")
        cases.Child([asked], log, timeout, env={}).wait()
        first, *_ = kit.read(log)
    found = {key: value for key, value in first.items() if key not in ("part", "kind", "case", "config")}
    return found | {"package": found["versions"][package] if package else None}


def beside(row: Line, plan: Plan) -> Line:
    """The plan, and what a measured peak has more, by what was measured of it."""
    state = plan.rows["state, matrices"] + plan.rows["state, rest"]
    found: Line = {
        "plan": {"total": plan.total, "when": plan.peak.when, "rows": plan.rows},
        "equal": (row["weights"], row["optimizer"]) == (plan.rows["weights"], state),
        "difference": row["peak"] - row["baseline"] - plan.total,
    }
    stays = row["rest"] - row["baseline"] - row["weights"] - row["optimizer"] - row["buffers"]
    others = {"rest": stays - sum(row["kept"].values()), "peak": found["difference"] - stays}
    return found | {"residual": row["kept"] | others}
