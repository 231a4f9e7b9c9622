"""The race: the same small LLaMA trained by every optimizer, each with the same budget for its learning rates.

    apollo-optim bench race --out results/race/llama-4m
    apollo-optim bench race --methods apollo-bf16 apollo-int8 apollo-int4 --table

The protocol:

1. Search. Every method gets at most fifteen short runs (each a fifth of the horizon with its own full cosine and a
   quarter of warm-up, seed 0) over the learning rate of the matrices x that of the rest, *separately*: from the centres
   below, by factors of two, always around the best pair so far, until no neighbour of it is better. A variant of a
   method (the same in bf16, in low-bit weights, with another rest) starts from that method's best pair and searches
   only what ``METHODS`` says, or nothing.
2. Final. The best pair of each method at full length with every seed. A seed fixes the initial weights and the order
   of the data, so that differences between methods are paired.

Weight decay is 0 for all. Everything that ends is one line in `OUT/trials.jsonl`, final runs leave their whole log
beside it; what is there is never run again, and a run that was cut off goes on from its checkpoint.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from apollo_optim.train.config import RunConfig


@dataclass(frozen=True)
class Method:
    """What is raced: the optimizer, more keys of the run file, and how its two learning rates are found."""

    optim: str
    keys: dict[str, Any] = field(default_factory=dict)
    centre: tuple[float, float] = (1e-2, 1e-2)
    """Learning rates of matrices and rest that the search starts from."""
    rates_of: str | None = None
    """Start from that method's best pair instead."""
    axes: tuple[str, ...] = ("lr", "rest_lr")
    """What is searched."""


BF16 = {"model.dtype": "bfloat16"}
PAPER = {"optim.proj": "gaussian"}  # APOLLO to the letter; "apollo-sketch" is what Apollo does by itself
METHODS = {
    "adamw": Method("adamw", centre=(1e-3, 1e-2)),
    "apollo": Method("apollo", PAPER),
    "apollo-mini": Method("apollo-mini"),
    **{
        f"{name}{tail}": Method(f"{q}{name}", BF16 | PAPER | keys, rates_of=name, axes=())
        for name in ("apollo", "apollo-mini")
        for q, tail, keys in (("", "-bf16", {}), ("q-", "-int8", {}), ("q-", "-int4", {"quant.bits": 4}))
    },
    **{
        f"apollo-rest-{rest}": Method("apollo", PAPER | {"optim.rest": rest}, rates_of="apollo", axes=("rest_lr",))
        for rest in ("adamw8bit", "adafactor", "scale", "apollo")
    },
    "apollo-sketch": Method("apollo", {"optim.proj": "sketch"}, rates_of="apollo", axes=()),
    "apollo-d8": Method("apollo", PAPER | {"optim.rank": 24}, rates_of="apollo", axes=()),
    "apollo-d8-sketch": Method("apollo", {"optim.rank": 24, "optim.proj": "sketch"}, rates_of="apollo", axes=()),
}
DEFAULT = ("adamw", "apollo", "apollo-sketch", "apollo-mini")
SEARCH_WARMUP = 0.25  # a tenth of a short run is 14 steps: APOLLO-Mini at 1e-2 ends at 534 with them, at 294 with 35
BUDGET = 15
BATCH, SEQ_LEN, EVAL_TOKENS = 16, 256, 131_072


@dataclass(frozen=True)
class Trial:
    model: str
    method: str
    lr: float
    rest_lr: float
    seed: int
    steps: int
    warmup: float = 0.1

    @property
    def name(self) -> str:
        return (
            f"{self.method}-lr{self.lr:g}-rest{self.rest_lr:g}-seed{self.seed}-steps{self.steps}-warmup{self.warmup:g}"
        )


def config_of(trial: Trial, out: Path) -> RunConfig:
    cfg, method = RunConfig(out=str(out)), METHODS[trial.method]
    cfg.model.name = trial.model
    cfg.data.source, cfg.data.seq_len, cfg.data.seed = "packages", SEQ_LEN, trial.seed
    cfg.optim.name, cfg.optim.lr, cfg.optim.rest_lr = method.optim, trial.lr, trial.rest_lr
    cfg.optim.weight_decay, cfg.optim.seed = 0.0, trial.seed
    cfg.train.steps, cfg.train.batch_size, cfg.train.micro_batch = trial.steps, BATCH, 8
    cfg.schedule.warmup = trial.warmup
    cfg.train.seed, cfg.train.threads = trial.seed, 1
    cfg.train.matmul_precision = "medium"  # bf16 products of fp32 tensors: 1.5x faster where the CPU has them
    cfg.eval.every, cfg.eval.tokens = 175, EVAL_TOKENS  # a search run is evaluated at its end alone
    cfg.checkpoint.every, cfg.checkpoint.keep = 100, 1
    cfg.log.display = "none"
    for key, value in method.keys.items():
        section, name = key.split(".")
        if section == "optim":
            cfg.optim = cfg.optim.changed(**{name: value})
        else:
            setattr(getattr(cfg, section), name, value)
    return cfg


def run_trial(trial: Trial, work: Path) -> dict[str, Any]:
    """One run, from its checkpoint if it was cut off; a line for ``trials.jsonl``."""
    from apollo_optim.train.pretrain import pretrain

    out = work / trial.name
    done = pretrain(config_of(trial, out), resume=(out / "checkpoints" / "latest").exists())
    start = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return {
        **asdict(trial),
        **{key: getattr(done, key) for key in ("loss", "perplexity", "perplexity_reference", "bits_per_byte")},
        "tokens": done.tokens,
        "seconds": done.seconds,
        "memory": done.memory,
        **{key: start[key] for key in ("corpus", "versions", "hardware")},
    }


class Race:
    """Results on disk, and the workers that add to them."""

    def __init__(self, out: Path, work: Path, jobs: int) -> None:
        self.out, self.work, self.jobs = out, work, jobs
        self.log = out / "trials.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        rows = [json.loads(line) for line in lines]
        self.done = {Trial(**{key: row[key] for key in Trial.__dataclass_fields__}): row for row in rows}

    def run(self, trials: list[Trial], *, keep_log: bool = False) -> None:
        """Run those that are not done yet, ``jobs`` at a time, one thread each."""
        missing = [trial for trial in trials if trial not in self.done]
        with ProcessPoolExecutor(self.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
            waiting = {pool.submit(run_trial, trial, self.work): trial for trial in missing}
            for future in as_completed(waiting):
                trial, row = waiting[future], future.result()
                if keep_log:
                    shutil.copy(
                        self.work / trial.name / "metrics.jsonl", self.out / f"{trial.method}-seed{trial.seed}.jsonl"
                    )
                with self.log.open("a") as log:
                    log.write(json.dumps(row) + "\n")
                self.done[trial] = row
                shutil.rmtree(self.work / trial.name)
                print(f"{trial.name}: perplexity {row['perplexity']:.2f} ({row['seconds']:.0f} s)", flush=True)

    def loss(self, trial: Trial) -> float:
        return float(self.done[trial]["loss"])


def start_of(method: str, race: Race, rates: Race, model: str, steps: int) -> Trial:
    """The short run that a method's search begins with; from another race's rates there is none."""
    other = METHODS[method].rates_of or (method if rates is not race else None)
    if other is None:
        return Trial(model, method, *METHODS[method].centre, 0, steps, SEARCH_WARMUP)
    known = [trial for trial in rates.done if trial.method == other and trial.warmup == SEARCH_WARMUP]
    if not known:
        raise SystemExit(f"{method} starts from the best rates of {other}, which {rates.log} does not have: race it")
    best = min(known, key=rates.loss)
    return Trial(model, method, best.lr, best.rest_lr, 0, steps, SEARCH_WARMUP)


def search(race: Race, starts: dict[str, Trial], rates: Race) -> dict[str, Trial]:
    """The best pair of learning rates of each method, after ``BUDGET`` short runs or when no neighbour is better."""
    searched = [m for m in starts if METHODS[m].axes and (rates is race or METHODS[m].rates_of)]
    tried: dict[str, list[Trial]] = {method: [] for method in searched}

    def moves(method: str) -> list[Trial]:
        if not tried[method]:
            return [starts[method]]
        best = min(tried[method], key=race.loss)
        around = [replace(best, **{axis: getattr(best, axis) * f}) for axis in METHODS[method].axes for f in (2.0, 0.5)]
        return [trial for trial in around if trial not in tried[method]][: min(2, BUDGET - len(tried[method]))]

    while batch := {method: trials for method in tried if (trials := moves(method))}:
        race.run([trial for trials in batch.values() for trial in trials])
        for method, trials in batch.items():
            tried[method] += trials
    return starts | {method: min(trials, key=race.loss) for method, trials in tried.items()}


def table(race: Race, finals: dict[str, list[Trial]]) -> str:
    """Mean perplexity over the seeds with its spread, and the paired difference to the first method."""
    base = next(iter(finals))
    lines = [
        "| method | lr matrices | lr rest | perplexity, each seed | mean | sd | against " + base + ", paired | "
        "bits per byte | optimizer state, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, trials in finals.items():
        rows = [race.done[trial] for trial in trials]
        ppl = [row["perplexity"] for row in rows]
        against = [a / race.done[b]["perplexity"] - 1 for a, b in zip(ppl, finals[base], strict=True)]
        spread = f"{min(against):+.1%} to {max(against):+.1%}"
        lines.append(
            f"| {method} | {trials[0].lr:g} | {trials[0].rest_lr:g} | {', '.join(f'{p:.2f}' for p in ppl)} | "
            f"{statistics.mean(ppl):.2f} | {statistics.stdev(ppl) if len(ppl) > 1 else float('nan'):.2f} | "
            f"{'-' if method == base else f'{statistics.mean(against):+.1%} ({spread})'} | "
            f"{statistics.mean(row['bits_per_byte'] for row in rows):.3f} | {rows[0]['memory']['optimizer'] / 1e6:.2f} |"  # noqa: E501
        )
    return "\n".join(lines)


def finished(race: Race, steps: int, methods: list[str]) -> dict[str, list[Trial]]:
    """The final runs there are, those seeds that every method has."""
    trials = sorted((trial for trial in race.done if trial.steps == steps), key=lambda trial: trial.seed)
    finals = {method: [trial for trial in trials if trial.method == method] for method in methods}
    if not all(finals.values()):
        raise SystemExit(f"{race.log} holds no final run yet of {', '.join(m for m, t in finals.items() if not t)}")
    seeds = set.intersection(*({trial.seed for trial in done} for done in finals.values()))
    return {method: [trial for trial in done if trial.seed in seeds] for method, done in finals.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "apollo-optim bench race", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/race/llama-4m"), help="where results are kept")
    parser.add_argument("--work", type=Path, default=Path("out/race"), help="where unfinished runs live")
    parser.add_argument("--model", default="llama-4m")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(DEFAULT),
        choices=list(METHODS),
        metavar="METHOD",
        help=f"the first is what the others are compared to; of {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--rates", type=Path, help="another race: its best rates are taken; only a variant's own are searched"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of the final runs there are")
    args = parser.parse_args(argv)
    race = Race(args.out, args.work, args.jobs)
    if args.table:
        print(table(race, finished(race, args.steps, args.methods)))
        return 0
    rates = Race(args.rates, args.work, args.jobs) if args.rates else race
    best = search(race, {m: start_of(m, race, rates, args.model, args.steps // 5) for m in args.methods}, rates)
    finals = {
        method: [Trial(args.model, method, trial.lr, trial.rest_lr, seed, args.steps) for seed in args.seeds]
        for method, trial in best.items()
    }
    # seed by seed, so that a race cut short has compared all methods on the seeds it reached
    race.run([trials[i] for i in range(len(args.seeds)) for trials in finals.values()], keep_log=True)
    text = table(race, finals)
    if args.methods == list(DEFAULT):
        (args.out / "table.md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
