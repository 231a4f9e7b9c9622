"""The race's former protocol, whose lines are in results/race: their table, and the run file of each.

Nobody searches by it any more. It tuned two rates, of the matrices and of everything else, which leaves the head's and
the embedding's tied; `benchmarks/low_bit/compare.py` still makes its short runs. What it was:

1. Search. Every method got at most fifteen short runs (each a fifth of the horizon with its own full cosine and a
   quarter of warm-up, seed 0) over the two rates: from (1e-3, 1e-2) for AdamW and (1e-2, 1e-2) for the others, by
   factors of two, always around the best pair so far, until no neighbour of it was better. A variant of a method (the
   same in bf16, in low-bit weights, of another rank) took that method's best pair, one with another rest searched the
   rate of the rest anew.
2. Final. The best pair of each method at full length with every seed. A seed fixes the initial weights and the order
   of the data, so that differences between methods are paired.

Weight decay is 0 for all.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apollo_optim.core.errors import InputError
from apollo_optim.report import read_events
from apollo_optim.train.config import RunConfig, from_dict
from benchmarks import kit
from benchmarks.race.agenda import Row
from benchmarks.table import markdown

BF16 = {"model.dtype": "bfloat16"}
PAPER = {"optim.proj": "gaussian"}  # APOLLO to the letter; "apollo-sketch" is what Apollo does by default
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {"optim.name": "adamw"},
    "apollo": {"optim.name": "apollo", **PAPER},
    "apollo-mini": {"optim.name": "apollo-mini"},
    **{
        f"{name}{tail}": {"optim.name": f"{q}{name}", **BF16, **PAPER, **keys}
        for name in ("apollo", "apollo-mini")
        for q, tail, keys in (("", "-bf16", {}), ("q-", "-int8", {}), ("q-", "-int4", {"quant.bits": 4}))
    },
    **{
        f"apollo-rest-{rest}": {"optim.name": "apollo", **PAPER, "optim.rest": rest}
        for rest in ("adamw8bit", "adafactor", "scale", "apollo")
    },
    "apollo-sketch": {"optim.name": "apollo", "optim.proj": "sketch"},
    "apollo-d8": {"optim.name": "apollo", **PAPER, "optim.rank": 24},
    "apollo-d8-sketch": {"optim.name": "apollo", "optim.rank": 24, "optim.proj": "sketch"},
}
"""What was raced: keys of the run file."""
IN_THE_TABLE = ("adamw", "apollo", "apollo-sketch", "apollo-mini")
FINAL_WARMUP = 0.1
"""By which a final run is told from one of the search."""


@dataclass(frozen=True)
class Trial:
    """One run."""

    model: str
    method: str
    lr: float
    rest_lr: float
    seed: int
    steps: int
    warmup: float = FINAL_WARMUP

    @property
    def name(self) -> str:
        """Readable, and unique."""
        rates = f"lr{self.lr:g}-rest{self.rest_lr:g}"
        return f"{self.model}-{self.method}-{rates}-seed{self.seed}-steps{self.steps}-warmup{self.warmup:g}"


def read(results: Path) -> dict[Trial, Row] | None:
    """The lines of a results folder; None where they are not of this protocol."""
    rows = kit.read(results / "trials.jsonl")
    if not rows or "fingerprint" in rows[0]:
        return None
    return {Trial(**{key: row[key] for key in Trial.__dataclass_fields__}): row for row in rows}


def config_of(trial: Trial, out: str) -> RunConfig:
    """The run file of a line."""
    keys = {
        "model.name": trial.model,
        "data.source": "packages",
        "data.seq_len": 256,
        "data.seed": trial.seed,
        "optim.lr": trial.lr,
        "optim.rest_lr": trial.rest_lr,
        "optim.weight_decay": 0.0,
        "optim.seed": trial.seed,
        "schedule.warmup": trial.warmup,
        "train.steps": trial.steps,
        "train.batch_size": 16,
        "train.micro_batch": 8,
        "train.seed": trial.seed,
        "train.threads": 1,
        "train.matmul_precision": "medium",  # bf16 products of fp32 tensors: 1.5x faster where the CPU has them
        "eval.every": 175,  # a search run is evaluated at its end alone
        "eval.tokens": 131_072,
        "checkpoint.every": 100,
        "checkpoint.keep": 1,
        "log.display": "none",
        **METHODS[trial.method],
    }
    sections: dict[str, Any] = {"out": out}
    for key, value in keys.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return from_dict(sections)


def run(trial: Trial, out: Path) -> Row:
    """One run, and its line."""
    from apollo_optim.train.pretrain import pretrain

    done = pretrain(config_of(trial, str(out)))
    start = read_events(out / "metrics.jsonl")[0]
    return {
        **asdict(trial),
        **{key: getattr(done, key) for key in ("loss", "perplexity", "perplexity_reference", "bits_per_byte")},
        "tokens": done.tokens,
        "seconds": done.seconds,
        "memory": done.memory,
        **{key: start[key] for key in ("corpus", "versions", "hardware")},
    }


def table(rows: dict[Trial, Row], methods: Sequence[str] = IN_THE_TABLE) -> str:
    """Mean perplexity over the seeds that all have, and the paired difference to the first method.

    Raises InputError for a method without a final run.
    """
    finals = {name: [t for t in rows if t.method == name and t.warmup == FINAL_WARMUP] for name in methods}
    if missing := [name for name, trials in finals.items() if not trials]:
        known = dict.fromkeys(trial.method for trial in rows if trial.warmup == FINAL_WARMUP)
        raise InputError(f"there is no final run of {', '.join(missing)}; there are some of {', '.join(known)}")
    seeds = set.intersection(*({trial.seed for trial in trials} for trials in finals.values()))
    base, *_ = finals
    head = ["method", "lr matrices", "lr rest", "perplexity, each seed", "mean", "sd", f"against {base}, paired"]
    perplexities: dict[str, list[float]] = {}
    lines = []
    for name, trials in finals.items():
        same = sorted((trial for trial in trials if trial.seed in seeds), key=lambda trial: trial.seed)
        done = [rows[trial] for trial in same]
        found = perplexities[name] = [row["perplexity"] for row in done]
        against = [a / b - 1 for a, b in zip(found, perplexities[base], strict=True)]
        cells = (
            *(name, f"{same[0].lr:g}", f"{same[0].rest_lr:g}", ", ".join(f"{p:.2f}" for p in found)),
            f"{statistics.mean(found):.2f}",
            f"{statistics.stdev(found) if len(found) > 1 else float('nan'):.2f}",
            "-" if name == base else f"{statistics.mean(against):+.1%} ({min(against):+.1%} to {max(against):+.1%})",
            f"{statistics.mean(row['bits_per_byte'] for row in done):.3f}",
            kit.mb(done[0]["memory"]["optimizer"], ".2f"),
        )
        lines.append(cells)
    return markdown([*head, "bits per byte", "optimizer state, MB"], lines)
