"""Learning rates that are known to work, by optimizer and tokens a step: one table for defaults, warnings and docs.

Rates belong to a batch: what the papers use for 131,072 tokens a step, 0.01 for everything, is far too much for
APOLLO-Mini at the 4,096 of a first run. What is in the table was run, and its log is named, or is said to be a paper's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from apollo_optim.optim.groups import rule_and_codec
from apollo_optim.optim.recipes import find_optimizer
from apollo_optim.train.config import OptimConfig, RunConfig

NEAR = 4.0  # steps of fewer than so many times the tokens (or of more than that fraction) are alike
FAR = 6.0  # a rate so many times as large, or as small, is said to be far


class Rate(NamedTuple):
    """Peak rates with which an optimizer was run."""

    optimizer: str
    tokens: int
    """Of a step."""
    lr: float
    """Of the matrices."""
    rest_lr: float
    """Of embedding, head and norms."""
    log: str
    """Where it was run: a folder of `results/`, or a paper."""
    rest: str = "adamw"
    """The rule of embedding and head, or that of each: "slimadam, adam-mini"."""
    more: Mapping[str, Any] = MappingProxyType({})
    """Other keys of `optim` that were tuned with them: rates of groups apart, and knobs."""


RACE, RACE2, SMALL_BATCH = "race/llama-4m", "race2", "llama-60m"
PAPER = "the papers' (arXiv 2412.05270, 2403.03507); AdamW's is our run files'"
NORMS = {"norm_lr": 0.02}  # of all methods there
SLIM = "slimadam, adam-mini"


def _of_recipe(name: str, rest: str, called: str | None = None) -> Rate:
    """What a recipe is built with where nobody says a rate, as a row."""
    more = dict(find_optimizer(name).rates)
    return Rate(called or name, 4_096, more.pop("lr"), more.pop("rest_lr"), RACE2, rest, more)


RATES = (
    Rate("apollo-mini", 1_024, 0.001, 0.005, SMALL_BATCH, "adafactor"),
    Rate("q-apollo-mini", 1_024, 0.001, 0.005, SMALL_BATCH, "adafactor"),
    Rate("q-apollo", 4_096, 0.005, 0.08, RACE),
    Rate("q-apollo-mini", 4_096, 0.00125, 0.02, RACE),
    Rate("apollo", 4_096, 0.005, 0.04, RACE, "adafactor"),
    Rate("apollo", 4_096, 0.005, 0.005, RACE, "scale"),
    # beta2 is a half-life of 72,000 tokens
    Rate("adamw", 4_096, 0.002, 0.04, RACE2, more={**NORMS, "embedding_lr": 0.16, "betas": (0.9, 0.9613)}),
    Rate("apollo", 4_096, 0.01, 0.02, RACE2, more={**NORMS, "embedding_lr": 0.16, "betas": (0.9, 0.9613)}),
    Rate("apollo-mini", 4_096, 0.005, 0.02, RACE2, more={**NORMS, "embedding_lr": 0.08, "betas": (0.9, 0.9613)}),
    _of_recipe("full", "adamw", "muon+adamw8bit"),
    _of_recipe("lite", SLIM),
    _of_recipe("nano", SLIM),
    # a search of their own at this batch; the same half-lives, but for AdamW's of 288,000
    Rate("adamw", 32_768, 0.002, 0.04, RACE2, more={**NORMS, "embedding_lr": 0.16, "betas": (0.9, 0.9242)}),
    Rate("muon+adamw8bit", 32_768, 0.032, 0.04, RACE2, more={**NORMS, "embedding_lr": 0.32, "momentum": 0.1938}),
    Rate("nano", 32_768, 0.032, 0.02, RACE2, SLIM, {**NORMS, "embedding_lr": 1.28, "betas": (0.9, 0.9951)}),
    Rate("adamw", 131_072, 0.001, 0.001, PAPER),
    Rate("apollo", 131_072, 0.01, 0.01, PAPER),
    Rate("apollo-mini", 131_072, 0.01, 0.01, PAPER),
)
IN_THE_LOGS = {"full": "muon+adamw8bit"}
"""What a recipe was called when it was run."""


def known(cfg: RunConfig) -> Rate | None:
    """What is known of the run's optimizer at the nearest number of tokens a step; None: nothing at all.

    All of it is for new weights, and for text.
    """
    if cfg.model.pretrained or cfg.data.format != "text":
        return None
    name = IN_THE_LOGS.get(cfg.optim.name, cfg.optim.name)
    rows = [row for row in RATES if row.optimizer == name]
    rows = [row for row in rows if row.rest == _rest(cfg.optim)] or rows
    return min(rows, key=lambda row: abs(math.log(row.tokens / tokens_a_step(cfg))), default=None)


def with_known_rates(cfg: RunConfig) -> RunConfig:
    """The run with known rates in the place of those that it does not say. A rate that is said is kept.

    Where `lr` is said, `rest_lr` is the same unless it is said, too. Where nothing is known, the optimizer has its own.
    """
    row = known(cfg)
    if cfg.optim.lr is not None or row is None:
        return cfg
    takes_rest = row.rest == _rest(cfg.optim) and cfg.optim.rest_lr is None
    rest_lr = row.rest_lr if takes_rest else cfg.optim.rest_lr
    said = cfg.optim.flat()
    near = _within(NEAR, row.tokens / tokens_a_step(cfg))
    # rates of groups belong to `rest_lr`, averages to a batch
    takes = {key: takes_rest if key.endswith("_lr") else near for key in row.more}
    more = {key: value for key, value in row.more.items() if takes[key] and said.get(key) is None}
    return dataclasses.replace(cfg, optim=cfg.optim.changed(lr=row.lr, rest_lr=rest_lr, **more))


def advice(cfg: RunConfig) -> str | None:
    """A line where a run's rates are far from what is known, or known from steps of quite another size."""
    row, lr, tokens = known(cfg), cfg.optim.lr, tokens_a_step(cfg)
    if cfg.model.pretrained and lr is None:
        return "optim.lr is not said: the optimizer's own default is one for new weights, too much for trained ones"
    if row is None or not lr:  # at a rate of 0 somebody knows what he does
        return None
    rest_lr = lr if cfg.optim.rest_lr is None else cfg.optim.rest_lr
    same_rest = row.rest == _rest(cfg.optim)
    here, there = _pair(lr, rest_lr), _pair(row.lr, row.rest_lr)
    if _within(NEAR, row.tokens / tokens):
        far = not _within(FAR, lr / row.lr) or (same_rest and rest_lr and not _within(FAR, rest_lr / row.rest_lr))
        told = f"lr {here} is far from {there}, which is known of {row.optimizer} at {row.tokens:,} tokens a step"
        return f"{told} (docs/rates.md)" if far else None
    told = f"lr {here} is known of {row.optimizer} at {row.tokens:,} tokens a step, and this run's have {tokens:,}"
    return f"{told}: other rates may be better (docs/rates.md)" if here == there else None


def tokens_a_step(cfg: RunConfig) -> int:
    """Of all micro-batches of a step."""
    return cfg.train.batch_size * cfg.data.seq_len


def _rest(optim: OptimConfig) -> str:
    """The rule of embedding and head, or the two of them. How their state is stored moves no rate."""
    own = find_optimizer(optim.name).groups
    both = (
        asked or own.get(kind) or optim.rest or own.get("rest", "adamw")
        for kind, asked in (("embedding", optim.embedding), ("head", optim.head))
    )
    return ", ".join(dict.fromkeys(rule_and_codec(choice)["rule"] for choice in both))


def _within(times: float, ratio: float) -> bool:
    return 1 / times < ratio < times


def _pair(lr: float, rest_lr: float) -> str:
    return f"{lr:g} (rest {rest_lr:g})"


def _cell(row: Rate) -> str:
    more = "".join(f"; `{key}` {value}" for key, value in row.more.items())
    return f"{row.lr:g} / {row.rest_lr:g}{more}"


def table() -> str:
    """All that is known, as the docs show it."""
    names = list(dict.fromkeys(row.optimizer for row in sorted(RATES, key=lambda row: row.optimizer)))
    lines = [
        ["tokens a step", "embedding and head", *(f"`{name}`" for name in names), "known from"],
        ["---:", "---", *("---" for _ in names), "---"],
    ]
    for tokens, rest, log in dict.fromkeys((row.tokens, row.rest, row.log) for row in RATES):
        here = {row.optimizer: row for row in RATES if (row.tokens, row.rest, row.log) == (tokens, rest, log)}
        cells = [_cell(here[name]) if name in here else "not measured" for name in names]
        lines.append([f"{tokens:,}", rest, *cells, log if log == PAPER else f"`results/{log}`"])
    lines.append(["fine-tuning", "-", *("not measured" for _ in names), "-"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
