"""Which optimizer for this memory: the best by the evidence of docs/choose.md whose plan fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from apollo_optim.core.errors import InputError
from apollo_optim.plan import Plan
from apollo_optim.train.config import RunConfig
from apollo_optim.train.plan import planned


class Candidate(NamedTuple):
    """Keys of the sections `optim` and `quant`, and why they stand where they do."""

    name: str
    optim: Mapping[str, Any]
    bits: Literal[4, 8] | None
    why: str


SMALL_REST = {"rest": "adamw8bit"}
CANDIDATES = (
    Candidate(
        "muon+adamw8bit",
        {"state_dtype": "8bit"},
        None,
        "the lowest perplexity of the race so far, with a byte of momentum for a weight (docs/race.md)",
    ),
    Candidate("apollo-mini", SMALL_REST, None, "next to no state: two vectors for a matrix (docs/race.md)"),
    Candidate(
        "q-apollo-mini", SMALL_REST, 8, "weights of a byte each, level with bfloat16 in our runs (docs/choose.md)"
    ),
    Candidate("q-apollo-mini", SMALL_REST, 4, "half a byte a weight costs 16 % of perplexity, if nothing else fits"),
)
"""The best first; each takes less than the one before. APOLLO at rank d/4 keeps two bytes a weight, in fp32: twice what
the first of them keeps, for a higher perplexity in our runs."""


class Choice(NamedTuple):
    """What fits.

    Attributes:
        cfg: The run with it; its other keys are those that were given.
        why: One line.
        plan: Of its fullest moment.
        passed_over: Plans of what is better and does not fit.
    """

    cfg: RunConfig
    why: str
    plan: Plan
    passed_over: tuple[Plan, ...]


def choose(cfg: RunConfig, memory: float, plan_of: Callable[[RunConfig], Plan] = planned) -> Choice:
    """The best optimizer for a run whose weights, gradients, activations and state together may take `memory` bytes.

    >>> choice = choose(RunConfig(model=ModelConfig("llama-7b", dtype="bfloat16")), 24e9)
    >>> choice.cfg.optim.name, choice.why, choice.plan.total

    Model, batch, sequence, `train.release` and recomputation are those of `cfg`; what it says of an optimizer is left
    behind. `plan_of`: who plans, if not `planned`. Raises InputError, naming what would help, where nothing fits.
    """
    passed: list[Plan] = []
    for candidate in CANDIDATES:
        kept = {"targets": cfg.optim.targets, "exclude": cfg.optim.exclude, "seed": cfg.optim.seed}
        optim = type(cfg.optim).of(name=candidate.name, **kept, **candidate.optim)
        one = dataclasses.replace(cfg, optim=optim, quant=dataclasses.replace(cfg.quant, bits=candidate.bits))
        plan = plan_of(one)
        if plan.total <= memory:
            return Choice(one, candidate.why, plan, tuple(passed))
        passed.append(plan)
    ways = [] if cfg.train.release else ["train.release true"]
    ways += [] if cfg.model.gradient_checkpointing else ["model.gradient_checkpointing true"]
    ways += ["a smaller train.micro_batch or data.seq_len"]
    least, bits = passed[-1], CANDIDATES[-1].bits
    raise InputError(
        f"nothing fits in {memory / 1e9:.1f} GB: {least.optimizer} with weights of {bits} bits takes "
        f"{least.total / 1e9:.1f} GB. What would help: {', '.join(ways)}"
    )
