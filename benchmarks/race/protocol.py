"""How the race is run: settings, budgets, stages, and the run file of one trial."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from apollo_optim.train.config import RunConfig, from_dict
from benchmarks.race.methods import METHODS, Knob, Method

VERSION = 1
"""Of the protocol. A change that moves a figure raises it, and starts new results."""
SEQ_LEN, MICRO_BATCH = 256, 8
NORM_LR = 0.02
"""Of everything 1-D, for every method: it uses AdamW in all of them, and is searched in none."""
SEARCH_SHARE, SEARCH_WARMUP, WARMUP = 5, 0.25, 0.1
"""A search run is a fifth of the horizon with its own cosine. A tenth of warm-up would be 14 steps there, and picks too
low a rate (APOLLO-Mini at 1e-2 ended at 534 with 14 steps of it, at 294 with 35)."""
SEARCH_EVAL, FINAL_EVAL = 65_536, 131_072
"""Tokens of the validation split, from its beginning."""
HOPELESS = 0.6
"""A search run whose training loss half way is so much above that of its method's best one is stopped there. High rates
catch up late: AdamW at twice its best rate is 0.39 behind half way, and 0.18 at the end."""
CLOSE = 1.10
"""Clearly behind: a perplexity above so many times the best one's on the first seed, and off the Pareto front."""
LEADERS = 5


@dataclass(frozen=True)
class Setting:
    """A task: which model on which text, how many tokens a step, how many steps."""

    name: str
    model: str = "llama-4m"
    source: str = "packages"
    batch: int = 16
    """Sequences a step."""
    steps: int = 700
    budget: int = 0
    """Search runs of a method, the same for all; 0: the rates of `rates_of` as they are."""
    extra: int = 0
    """So many more where the best point lies at the edge of what was tried."""
    rates_of: str | None = None
    """The setting whose best rates this one starts from."""

    @property
    def tokens(self) -> int:
        """A step."""
        return self.batch * SEQ_LEN


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("4k", budget=8, extra=4),
        Setting("32k", batch=128, steps=300, budget=4, extra=2, rates_of="4k"),
        Setting("9m", model="llama-9m", rates_of="4k"),
        Setting("4x", steps=2800, rates_of="4k"),
        Setting("other-text", source="python", rates_of="4k"),
    )
}


@dataclass(frozen=True)
class Stage:
    """A piece of the queue: the search that is missing for it, then these seeds."""

    setting: str
    who: Literal["all", "close", "leaders", "winners"]
    seeds: tuple[int, ...]


STAGES = (
    Stage("4k", "all", (0,)),  # method by method: every one that is done is a point of the picture
    Stage("4k", "close", (1, 2)),
    Stage("32k", "leaders", (0,)),
    Stage("9m", "close", (0,)),
    Stage("32k", "leaders", (1, 2)),
    Stage("9m", "leaders", (1, 2)),
    Stage("4k", "winners", (3, 4)),  # seeds that no choice was made on
    Stage("other-text", "winners", (0, 1, 2)),
    Stage("4x", "leaders", (0,)),
    Stage("4x", "leaders", (1, 2)),
)


@dataclass(frozen=True)
class Trial:
    """One run: what its loss depends on, but for the text and the arithmetic of the machine."""

    setting: str
    method: str
    lr: float
    embedding_lr: float
    head_lr: float
    norm_lr: float
    knob: float
    seed: int
    steps: int
    search: bool

    @property
    def name(self) -> str:
        """Readable, unique, and a file's name."""
        rates = f"lr{self.lr:g}-emb{self.embedding_lr:g}-head{self.head_lr:g}-knob{self.knob:g}"
        return f"{self.setting}-{self.method}-{rates}-seed{self.seed}-steps{self.steps}"


def search_steps(setting: Setting) -> int:
    """Of a search run."""
    return setting.steps // SEARCH_SHARE


def round_rate(x: float) -> float:
    """Four digits: a rate goes up and down by the root of two and comes back to itself."""
    return float(f"{x:.4g}")


def knob_keys(knob: Knob, value: float, tokens: int) -> dict[str, Any]:
    """The run file's keys for a knob at `value`, with so many tokens a step."""
    number = round(0.5 ** (tokens / value), 6)
    if knob.key == "optim.betas.1":
        return {"optim.betas": [0.9, number]}
    return {knob.key: number}


def keys_of(trial: Trial, methods: Mapping[str, Method] = METHODS) -> dict[str, Any]:
    """All that a trial says of its run file, as flat keys."""
    setting, method = SETTINGS[trial.setting], methods[trial.method]
    every = max(1, trial.steps // 20)
    return {
        "model.name": setting.model,
        "data.source": setting.source,
        "data.seq_len": SEQ_LEN,
        "data.seed": trial.seed,
        "optim.weight_decay": 0.0,
        "optim.lr": trial.lr,
        "optim.embedding_lr": trial.embedding_lr,
        "optim.head_lr": trial.head_lr,
        "optim.norm_lr": trial.norm_lr,
        "optim.seed": trial.seed,
        "schedule.kind": "cosine",
        "schedule.warmup": SEARCH_WARMUP if trial.search else WARMUP,
        "schedule.min_lr": 0.1,
        "train.steps": trial.steps,
        "train.batch_size": setting.batch,
        "train.micro_batch": MICRO_BATCH,
        "train.seed": trial.seed,
        "train.threads": 1,
        "train.matmul_precision": "highest",  # fp32 everywhere: a pair need not have met the same processor
        "train.device": "cpu",
        "eval.every": None if trial.search else trial.steps // 4,
        "eval.tokens": SEARCH_EVAL if trial.search else FINAL_EVAL,
        "checkpoint.every": max(5, trial.steps // 7),
        "checkpoint.keep": 1,
        "checkpoint.export": False,
        "log.every": every,
        "log.display": "none",
        **method.keys,
        **knob_keys(method.knob, trial.knob, setting.tokens),
    }


def config_of(trial: Trial, out: str, methods: Mapping[str, Method] = METHODS) -> RunConfig:
    """The run file of a trial. Raises InputError for a key that no section has."""
    sections: dict[str, Any] = {"out": out}
    for key, value in keys_of(trial, methods).items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return from_dict(sections)


def fingerprint(trial: Trial, methods: Mapping[str, Method] = METHODS) -> str:
    """Of everything that decides a trial's loss: a line made by another protocol is no line of this one."""
    keys = {key: value for key, value in keys_of(trial, methods).items() if not key.startswith(("log.", "checkpoint."))}
    content = {"version": VERSION, **asdict(trial), "keys": keys}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
