"""The story of fine-tuning: a model that is there, rows of questions and answers, and the run of pre-training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from apollo_optim.core.errors import InputError
from apollo_optim.data import IGNORED, Data, open_data
from apollo_optim.data.answers import Answers
from apollo_optim.parallel.world import World
from apollo_optim.train import checkpoint
from apollo_optim.train.config import OptimConfig, RunConfig, check
from apollo_optim.train.models import SIZES
from apollo_optim.train.pretrain import Result, alone, go
from apollo_optim.train.run_dir import run_of

# What `apollo-optim finetune` begins with, where neither the run file nor the command says otherwise.
DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {"pretrained": True},
    "data": {"format": "auto", "seq_len": 512, "on_bad_line": "error"},
    "train": {"epochs": 3.0},
    "checkpoint": {"every": None, "best": True},
}
# The paper's rates and sketches for fine-tuning (arXiv 2412.05270: Llama-3.2-1B, commonsense), and what is usual for
# AdamW. Not measured here.
TUNED: dict[str, dict[str, float]] = {
    "adamw": {"lr": 2e-5},
    "apollo": {"lr": 3e-4, "rank": 32, "scale": 5.0},
    "apollo-svd": {"lr": 3e-4, "rank": 32, "scale": 5.0},
    "apollo-mini": {"lr": 3e-4},
    "q-apollo": {"lr": 3e-4, "rank": 32, "scale": 5.0},
    "q-apollo-mini": {"lr": 3e-4},
}


def finetune(cfg: RunConfig, *, resume: bool = False, trust_remote_code: bool = False) -> Result:
    """Train a model that is there on the answers of `cfg.data`, as `pretrain` trains: the same steps, run and resume.

    >>> data = DataConfig(source="train.jsonl", format="auto", seq_len=512)
    >>> model = ModelConfig("out/base/model", pretrained=True)
    >>> finetune(RunConfig(model=model, data=data, train=TrainConfig(epochs=3), out="out/tuned"))

    The tokenizer is the model's. What `cfg.optim` does not say is as in `TUNED`. With `train.epochs` the rows are laid
    out once to count them. Raises InputError, TrainingFailed and Interrupted as `pretrain` does.
    """
    cfg = resolved(cfg)

    def story(world: World) -> Result:
        run = run_of(cfg)
        if resume and (found := checkpoint.from_newest(run, partial(checkpoint.saved_run, run))) is not None:
            return go(with_steps_of(cfg, found[1]), world, resume, trust_remote_code)
        with world.leader_first():
            data = open_data(cfg.data, trust_remote_code=trust_remote_code)
        return go(counted(cfg, data), world, resume, trust_remote_code, data)

    return alone(cfg, resume, story)


def resolved(cfg: RunConfig) -> RunConfig:
    """The run with the model's tokenizer, and the optimizer's keys for fine-tuning where it does not say any."""
    if cfg.data.format == "text":
        raise InputError("data.format=text: fine-tuning learns answers; set it to auto, messages, prompt, ...")
    if not cfg.model.pretrained:
        raise InputError("model.pretrained=false: fine-tuning starts from the weights of model.name")
    name = Path(cfg.model.name).expanduser()
    if cfg.model.name in SIZES:
        raise InputError(
            f"model.name={cfg.model.name}: a size has no weights to start from; name a model's directory, such as "
            "RUN/model of a run of pretrain, or a name of the hub"
        )
    if (name / "config.yaml").is_file() and (name / "model").is_dir():
        raise InputError(f"model.name={name}: that is a run; its model is {name / 'model'}")
    data = cfg.data
    if data.tokenizer == "bpe":
        data = dataclasses.replace(data, tokenizer=cfg.model.name)
    said = {key: value for key, value in cfg.optim.flat().items() if value is not None}
    known = {} if cfg.optim.lr is not None else TUNED.get(cfg.optim.name, {})
    return dataclasses.replace(cfg, data=data, optim=OptimConfig.of(**known | said))


def with_steps_of(cfg: RunConfig, earlier: RunConfig) -> RunConfig:
    """The run with as many steps as it had: its rows are not counted again."""
    if cfg.train.epochs is None:
        return cfg
    if cfg.train.epochs != earlier.train.epochs:
        raise InputError(
            f"train.epochs was {earlier.train.epochs}, is {cfg.train.epochs}: a run goes on to another end with "
            "train.epochs null and train.steps"
        )
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=earlier.train.steps))


def counted(cfg: RunConfig, data: Data) -> RunConfig:
    """The run with the steps that its epochs make; what was counted is told in `data.notes`."""
    if data.open_epoch is None:
        if cfg.train.epochs is not None:
            raise InputError("train.epochs: the rows of a stream are not counted: set it to null, and train.steps")
        return cfg
    found = survey(data)
    data.notes += found.lines()
    if cfg.train.epochs is None:
        return cfg
    steps = max(1, math.ceil(cfg.train.epochs * found.rows / cfg.train.batch_size))
    data.notes.append(f"train.epochs={cfg.train.epochs:g}: {steps:,} steps of {cfg.train.batch_size} rows")
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=steps))
    check(cfg)  # a warm-up of so many steps
    return cfg


@dataclass
class Survey:
    """One pass over the training text, counted."""

    rows: int = 0
    positions: int = 0
    tokens: int = 0
    """Padding not counted."""
    learnt: int = 0
    """Predictions: tokens of answers, or of all text."""
    answers: Answers | None = None
    """The layout, which has counted samples; None: it is text."""

    def lines(self) -> list[str]:
        """What was counted, in words."""
        padding = 1 - self.tokens / max(1, self.positions)
        rows = f"{self.rows:,} rows: {self.tokens:,} tokens, {self.learnt:,} of them learnt, {padding:.1%} padding"
        found = self.answers
        if found is None:
            return [rows]
        told = [f"{found.samples:,} samples in {rows}"]
        if found.cut:
            told.append(f"{found.cut:,} samples are longer than data.seq_len, and a part of their answers is cut off")
        if found.unanswered:
            told.append(f"{found.unanswered:,} samples are left out: data.seq_len cuts off all of their answers")
        if found.endless:
            told.append(
                f"the answers of {found.endless:,} samples end without the tokenizer's end-of-text token: what is "
                "tuned on them does not learn to stop; the chat template should end an answer with it"
            )
        return told


def survey(data: Data) -> Survey:
    """Lay the training text out once. Raises InputError if that makes no row."""
    assert data.open_epoch is not None
    epoch, found = data.open_epoch(), Survey()
    for rows in epoch.blocks():
        found.rows += len(rows)
        found.tokens += sum(map(len, rows))
        labels = epoch.layout.batch(rows).labels
        found.positions += labels.numel()
        found.learnt += int((labels[:, 1:] != IGNORED).sum())
    if isinstance(epoch.layout, Answers):
        found.answers = epoch.layout
    if not found.rows:
        samples, unanswered = (found.answers.samples, found.answers.unanswered) if found.answers else (0, 0)
        raise InputError(
            f"{data.identity['name']}: no row is left to train on ({samples:,} samples; of "
            f"{unanswered:,} data.seq_len={epoch.seq_len} cuts off all that is learnt): raise data.seq_len"
        )
    return found
