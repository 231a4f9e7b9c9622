"""What is raced, as data: a run file's keys, what is searched, and where the search starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RATES = ("lr", "embedding_lr", "head_lr")
"""Of matrices, embedding and head."""
AXES = (*RATES, "knob")
"""What can be searched: three rates and one knob of the method's own."""


@dataclass(frozen=True)
class Knob:
    """The average that a method searches: its half-life in tokens."""

    key: str
    """Of the run file: the decay a step. `optim.betas.1` is the second of the pair."""
    centre: float
    """Where the search starts, in tokens."""
    factor: float = 4.0
    """The coarse step of the search."""


HALF_LIFE = Knob("optim.betas.1", 1.152e6)
"""Of Adam's second moment. 1.152 M tokens are a beta2 of 0.9975 at 4,096 tokens a step, and of 0.980 at 32,768."""
MOMENTUM = Knob("optim.momentum", 55_350)
"""Of a first moment. 55,350 tokens are a decay of 0.95 at 4,096 tokens a step, and of 0.664 at 32,768."""


@dataclass(frozen=True)
class Method:
    """One entry of the race."""

    keys: Mapping[str, Any]
    """Of the run file (`section.key`); rates, seed and what all methods share come from the protocol."""
    centre: Mapping[str, float] = field(default_factory=dict)
    """Rates that the search starts from; one that is missing is taken from `start`."""
    start: str | None = None
    """The method whose best point the search starts from, where `centre` says nothing."""
    axes: tuple[str, ...] = AXES
    """What is searched, in this order."""
    knob: Knob = HALF_LIFE
    recipe: str | None = None
    """The name that the library has for it."""
    more: Mapping[str, int] = field(default_factory=dict)
    """Search runs beyond what every method has, by setting: for axes of the baseline that a claim waits for."""

    def __post_init__(self) -> None:
        if missing := set(RATES) - set(self.centre):
            assert self.start, f"a method without `start` names every rate; {sorted(missing)} are missing"
        assert set(self.axes) <= set(AXES)


def apollo(start: str = "apollo", **keys: Any) -> Method:
    """APOLLO at rank d/4 with something changed."""
    return Method({"optim.name": "apollo"} | {f"optim.{key}": value for key, value in keys.items()}, start=start)


def slim(name: str, start: str, knob: Knob = HALF_LIFE, recipe: str | None = None, **keys: Any) -> Method:
    """A rule for the matrices; the embedding keeps one second moment a token, the head a momentum of 8 bits besides."""
    rest = {"embedding": "slimadam", "averaged": False, "head": "adam-mini8bit"}
    return Method(
        {"optim.name": name} | {f"optim.{key}": v for key, v in (rest | keys).items()},
        start=start,
        knob=knob,
        recipe=recipe,
    )


METHODS: dict[str, Method] = {
    "adamw": Method({"optim.name": "adamw"}, {"lr": 2e-3, "embedding_lr": 0.08, "head_lr": 0.02}),
    # A byte a weight of momentum, in the place of a gradient that is released: no more than SGD's memory.
    "muon-8bit": Method(
        {"optim.name": "muon+adamw8bit", "optim.state_dtype": "8bit"},
        {"lr": 4e-3},
        start="adamw",
        knob=MOMENTUM,
        recipe="full",
    ),
    # AdamW's second look: its rate of the matrices was bracketed before its half-life moved, and at 32,768 tokens a
    # step its budget was gone before the half-life came up. Here that is first.
    "adamw-again": Method(
        {"optim.name": "adamw"},
        start="adamw",
        axes=("knob", "lr", "embedding_lr", "head_lr"),
        more={"32k": 6},
    ),
    # Embedding, head and norms use AdamW in these two: their search starts at AdamW's best rates for them.
    "apollo-mini": Method({"optim.name": "apollo-mini"}, {"lr": 1.25e-3}, start="adamw"),
    "apollo": Method({"optim.name": "apollo"}, {"lr": 5e-3}, start="adamw"),
    "apollo-rest-adamw8bit": apollo(rest="adamw8bit"),
    "apollo-rest-adafactor": apollo(rest="adafactor"),
    "apollo-rest-scale": Method(
        {"optim.name": "apollo", "optim.rest": "scale"}, {"embedding_lr": 5e-3, "head_lr": 5e-3}, start="apollo"
    ),
    "muon": Method({"optim.name": "muon+adamw"}, start="muon-8bit", knob=MOMENTUM),
    # Half a byte a weight.
    "muon-4bit": Method(
        {"optim.name": "muon+adamw8bit", "optim.state_dtype": "4bit"}, start="muon-8bit", knob=MOMENTUM
    ),
    # The search of muon-8bit had bracketed the matrices' rate before it found the short half-life.
    "muon-8bit-again": Method(
        {"optim.name": "muon+adamw8bit", "optim.state_dtype": "8bit"}, start="muon-4bit", knob=MOMENTUM
    ),
    "apollo-mini-rest-adafactor": Method({"optim.name": "apollo-mini", "optim.rest": "adafactor"}, start="apollo-mini"),
    # A slim rest: one second moment a token, of the head with a momentum of a byte. With it 7B keeps 3.47 and 0.15 GB.
    "muon-4bit-slim": slim("muon", "muon-4bit", MOMENTUM, "lite", state_dtype="4bit"),
    "apollo-mini-slim": slim("apollo-mini", "apollo-mini"),
    # No state of the matrices at all. Muon's best half-life was 3.4 steps of 4,096 tokens; a quarter of it was worse.
    "muon-stateless-slim": slim("muon", "muon-8bit", recipe="nano", stateless=True),
    # These two with the rows of each step brought to one size over time, for a number a row.
    "normuon-stateless-slim": slim("normuon", "muon-stateless-slim", stateless=True),
    "normuon-4bit-slim": slim("normuon", "muon-4bit-slim", MOMENTUM, state_dtype="4bit"),
    # At rank d/4 as APOLLO, or at its state. They start at the rate of GaLore's paper, whose scale of 0.25 all have.
    "galore": Method({"optim.name": "galore"}, {"lr": 0.01}, start="adamw"),
    "fira": Method({"optim.name": "fira"}, {"lr": 0.01}, start="adamw"),
    "foam": Method({"optim.name": "foam"}, {"lr": 0.01}, start="adamw"),
    # A step is Adafactor's of an average, as long as AdamW's at one rate; its momentum is what it has of its own.
    "flora": Method({"optim.name": "flora"}, start="adamw", knob=MOMENTUM),
    "adamw8bit": Method({"optim.name": "adamw+adamw8bit", "optim.state_dtype": "8bit"}, start="adamw"),
    "adafactor": Method({"optim.name": "adafactor+adafactor"}, start="adamw", axes=RATES),
    # Of everything, at AdamW's rates, as its authors recommend. (One v a row for queries and keys, too.)
    "adam-mini": Method({"optim.name": "adam-mini+adam-mini"}, start="adamw"),
    # Other rules of the matrices; embedding, head and norms use AdamW. RACS and SinkGD start at their papers' rates,
    # SGD where a step of this model is about as long as AdamW's (its gradient's norm is about 2).
    "slimadam": Method({"optim.name": "slimadam+slimadam"}, start="adamw"),
    "normuon": Method({"optim.name": "normuon+adamw"}, start="muon-8bit", knob=MOMENTUM),
    # RMNP steps rows of noise as far as any other: an RMS of 1e-3 a step was far too much, and here it starts at 1e-4.
    "rmnp": Method({"optim.name": "rmnp+adamw"}, {"lr": 5e-4}, start="adamw", knob=MOMENTUM),
    "racs": Method({"optim.name": "racs+adamw"}, {"lr": 0.02}, start="adamw", knob=Knob("optim.beta", 27_000)),
    "sinkgd": Method({"optim.name": "sinkgd+adamw"}, {"lr": 0.02}, start="adamw"),
    "sinkgd-axolotl": Method(
        {"optim.name": "sinkgd+adamw", "optim.rounds": 1, "optim.base_width": 192}, start="sinkgd"
    ),
    # As its paper has it, of everything: the head's rows after a momentum, the embedding's columns. A step's RMS is 1.
    "scale": Method(
        {"optim.name": "scale+scale"}, {"lr": 4e-4, "embedding_lr": 5e-3, "head_lr": 5e-3}, start="adamw", axes=RATES
    ),
    # A step's RMS is 1, five times what AdamW's and Muon's are about.
    "swan": Method({"optim.name": "swan+adamw"}, {"lr": 4e-4}, start="adamw"),
    # A step's norm is a quarter of the root of the rank: as long as AdamW's at a rate of about 0.05.
    "sumo": Method({"optim.name": "sumo"}, {"lr": 0.05}, start="adamw", knob=MOMENTUM),
    # Adam's step in another basis, or with moments of low rank: they start at AdamW's rates.
    "dct-adamw": Method({"optim.name": "dct-adamw"}, start="adamw"),
    "lora-pre": Method({"optim.name": "lora-pre"}, start="adamw"),
    "q-galore": Method({"optim.name": "q-galore", "quant.bits": 8}, start="galore"),
    # The embedding's every entry moves by the rate, as Lion's does: a fifth of AdamW's is as long.
    "sinkgd-sage": Method(
        {"optim.name": "sinkgd", "optim.embedding": "sage", "optim.head": "sage"},
        {"lr": 0.02, "embedding_lr": 0.02, "head_lr": 4e-3},
        start="adamw",
        knob=Knob("optim.beta2", 282_500),
    ),
    "lion": Method({"optim.name": "lion+adamw"}, {"lr": 4e-4}, start="adamw", knob=Knob("optim.beta2", 282_500)),
    "sgd": Method({"optim.name": "sgd+adamw"}, {"lr": 1.0}, start="adamw"),
    "sgd-momentum": Method({"optim.name": "sgd+adamw"}, {"lr": 0.1}, start="adamw", knob=MOMENTUM),
}
"""In the order of the queue; the first is what the others are compared to."""
BASELINE = next(iter(METHODS))
