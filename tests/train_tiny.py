"""A run so small that a step takes milliseconds, for the tests of the training room."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from apollo_optim.data.config import DataConfig
from apollo_optim.train.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)

MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "attention_dropout": 0.1}


def corpus(folder: Path) -> Path:
    """A few hundred documents of made-up words."""
    path = folder / "text.jsonl"
    words = [hashlib.sha256(str(n).encode()).hexdigest()[:5] for n in range(60)]
    lines = [" ".join(words[(n * k) % 60] for k in range(1, 40)) for n in range(300)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def tiny(folder: Path, name: str = "run", **sections: dict[str, Any]) -> RunConfig:
    """A config whose run directory is `folder/name`; `sections` change keys."""
    text = folder / "text.jsonl"
    cfg = RunConfig(
        model=ModelConfig("llama-1m", config=MODEL),
        data=DataConfig(
            source=str(text if text.exists() else corpus(folder)),
            vocab_size=300,
            seq_len=32,
            cache_dir=str(folder),
            validation_percent=5,
        ),
        optim=OptimConfig("apollo", lr=1e-2, knobs={"rank": 8, "update_proj_gap": 3}),
        train=TrainConfig(steps=8, batch_size=4, threads=1, device="cpu"),
        eval=EvalConfig(every=4, tokens=512),
        checkpoint=CheckpointConfig(every=4),
        log=LogConfig(every=1, display="none"),
        out=str(folder / name),
    )
    for section, changes in sections.items():
        old = getattr(cfg, section)
        new = old.changed(**changes) if isinstance(old, OptimConfig) else dataclasses.replace(old, **changes)
        setattr(cfg, section, new)
    return cfg


def records(run: Path | str, event: str) -> list[dict[str, Any]]:
    """Lines of the log."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def figures(run: Path | str) -> list[dict[str, Any]]:
    """Everything in the log that must not depend on the clock."""
    timed = ("seconds", "tokens_per_s", "data_wait", "others", "memory")
    found = records(run, "step") + records(run, "eval") + records(run, "end")
    return [{key: value for key, value in record.items() if key not in timed} for record in found]
