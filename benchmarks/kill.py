"""Kill runs with `kill -9` at random moments, some of them in the middle of a save, resume them, compare to the bit.

    apollo-optim bench kill [--runs 10] [--during-save 3]

Two runs are never stopped: one in float32 (APOLLO), one in bfloat16 (APOLLO-Mini), both with dropout, so that random
numbers matter. Every killed run is one of these two. Afterwards step, tokens, loss, lr, gradient norm and evaluations
of every step, and the bytes of weights and optimizer state at the end, must be those of the run that was never stopped.
Exit code 0 if they all are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import apollo_optim
from apollo_optim.cli.words import Parser
from apollo_optim.data.config import DataConfig
from apollo_optim.report import read_events
from apollo_optim.train.checkpoint import checkpoints, newest
from apollo_optim.train.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    save_config,
)
from benchmarks.kit import command

CHILD = """
import sys
from apollo_optim.train.config import load_config
from apollo_optim.train.pretrain import pretrain
pretrain(load_config(sys.argv[1]), resume="resume" in sys.argv)
"""
COMPARED = (
    "event",
    "step",
    "tokens",
    "loss",
    "lr",
    "lr_rest",
    "grad_norm",
    "perplexity",
    "perplexity_reference",
    "bits_per_byte",
)


@dataclass
class Row:
    """One killed run."""

    killed_at: int
    """The last step that it had recorded."""
    resumed_from: int
    figures: int
    """How many recorded figures were compared."""
    different: int
    """How many lines of the log were not the same bit-for-bit, and one more if the last checkpoints are not."""
    first: str
    """The first of them."""


def two_runs(steps: int) -> dict[str, RunConfig]:
    """The runs that are killed: small, but with everything that has a state."""
    kinds: dict[Literal["float32", "bfloat16"], str] = {"float32": "apollo", "bfloat16": "apollo-mini"}
    return {
        dtype: RunConfig(
            model=ModelConfig("llama-1m", dtype=dtype, config={"attention_dropout": 0.1}),
            data=DataConfig(seq_len=64),
            optim=OptimConfig(name, knobs={"update_proj_gap": 7}),
            train=TrainConfig(steps=steps, batch_size=4, micro_batch=2, clip=1.0, threads=1),
            eval=EvalConfig(every=10, tokens=2048),
            checkpoint=CheckpointConfig(every=8, keep=2),
            log=LogConfig(every=1, display="none"),
        )
        for dtype, name in kinds.items()
    }


def compare(
    runs: int = 10, during_save: int = 3, *, seed: int = 0, steps: int = 60, configs: dict[str, RunConfig] | None = None
) -> int:
    """The whole protocol; prints a table and returns the exit code."""
    chance = random.Random(seed)
    configs = configs or two_runs(steps)
    source = fingerprint()
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="kill-") as directory:
        root = Path(directory)
        references = {kind: whole_run(cfg, root / f"whole-{kind}") for kind, cfg in configs.items()}
        print(
            f"{'run':>3} {'kind':9} {'killed':13} {'at step':>7} {'resumed from':>12} {'figures':>7} {'different':>9}"
        )
        for number in range(runs):
            kind = list(configs)[number % len(configs)]
            moment = "during a save" if number < during_save else "at random"
            row = kill_and_resume(configs[kind], root / f"run-{number}", *references[kind], moment, chance)
            wrong += row.different > 0
            print(
                f"{number + 1:>3} {kind:9} {moment:13} {row.killed_at:>7} {row.resumed_from:>12} "
                f"{row.figures:>7} {row.different:>9}" + (f"  {row.first}" if row.first else ""),
                flush=True,
            )
    expect(source == fingerprint(), "the package was edited meanwhile: these runs cannot be compared")
    print(f"{runs - wrong} of {runs} killed and resumed runs are bit-for-bit equal to the run that was never stopped")
    return 1 if wrong else 0


def whole_run(cfg: RunConfig, run: Path) -> tuple[Path, float]:
    """The run that nobody kills, and how many seconds it took from its first step on."""
    child = start(cfg, run)
    wait_for_first_step(child, run)
    first = time.monotonic()
    expect(child.wait() == 0, f"{run.name}, which nobody killed, failed")
    return run, time.monotonic() - first


def kill_and_resume(cfg: RunConfig, run: Path, whole: Path, seconds: float, moment: str, chance: random.Random) -> Row:
    """Start, kill, resume, compare. A kill that came too late to be one is tried again."""
    kill = kill_during_save if moment == "during a save" else kill_at_random
    while not kill(cfg, run, seconds, chance):
        shutil.rmtree(run)
    killed_at = max((record["step"] for record in records(run) if record["event"] == "step"), default=0)
    resumed_from = max(checkpoints(run), default=0)
    expect(start(cfg, run, "resume").wait() == 0, f"{run.name} could not be resumed")
    ours, theirs = figures(run), figures(whole)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a != b]
    different = len(pairs) + abs(len(ours) - len(theirs)) + (final_files(run) != final_files(whole))
    first = f"first: {pairs[0][0]} instead of {pairs[0][1]}" if pairs else ""
    return Row(killed_at, resumed_from, sum(map(len, theirs)), different, first)


def kill_at_random(cfg: RunConfig, run: Path, seconds: float, chance: random.Random) -> bool:
    """Somewhere between the first step and the end."""
    child = start(cfg, run)
    wait_for_first_step(child, run)
    time.sleep(chance.uniform(0, seconds))
    child.kill()
    return child.wait() != 0


def kill_during_save(cfg: RunConfig, run: Path, seconds: float, chance: random.Random) -> bool:
    """While a checkpoint is half-written: its hidden directory is there before the kill, and still there after it."""
    every = cfg.checkpoint.every or cfg.train.steps
    step = chance.randrange(every, cfg.train.steps + 1, every)

    def half_written() -> bool:
        return any((run / "checkpoints").glob(f".tmp-*-step-{step:08d}"))

    child = start(cfg, run)
    while not half_written() and child.poll() is None:
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.02))
    child.kill()
    return child.wait() != 0 and half_written()


def start(cfg: RunConfig, run: Path, *words: str) -> subprocess.Popen[bytes]:
    """A process of its own, as from the command line."""
    path = run.with_suffix(".yaml")
    save_config(dataclasses.replace(cfg, out=str(run)), path)
    return subprocess.Popen([sys.executable, "-c", CHILD, str(path), *words])


def wait_for_first_step(child: subprocess.Popen[Any], run: Path) -> None:
    """Before that there is nothing to lose."""
    while child.poll() is None and not any(record["event"] == "step" for record in records(run)):
        time.sleep(0.05)


def records(run: Path) -> list[dict[str, Any]]:
    """The complete lines of the log."""
    path = run / "metrics.jsonl"
    return read_events(path) if path.exists() else []


def figures(run: Path) -> list[dict[str, Any]]:
    """What must be equal. JSON keeps every bit of a float."""
    return [
        {key: record[key] for key in COMPARED if key in record}
        for record in records(run)
        if record["event"] in ("step", "eval", "end")
    ]


def final_files(run: Path) -> dict[str, int]:
    """Checksums of weights and of the tensors of the training state at the end."""
    last = newest(run)
    expect(last is not None, f"{run.name} has no checkpoint")
    files = json.loads((last / "manifest.json").read_text())["files"] if last else {}
    return {name: file["crc32"] for name, file in files.items() if name.endswith(".safetensors")}


def fingerprint() -> str:
    """Of the package's source: while it is being edited nothing can be compared."""
    files = sorted(Path(apollo_optim.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def expect(true: bool, message: str) -> None:
    """End with one line if something is not as it has to be."""
    if not true:
        raise SystemExit(f"error: {message}")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench kill", __doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--during-save", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse(argv)
    return compare(options.runs, options.during_save, seed=options.seed, steps=options.steps)


if __name__ == "__main__":
    command(main)
