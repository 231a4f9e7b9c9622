"""Tokens a second alone and beside a busy process, with several ways for threads to wait for each other.

    apollo-optim bench company --rounds 5

OpenMP's threads wait at the end of every parallel loop, dozens of times a millisecond, and while they wait they spin: a
thread that has no core, because another process is on it, is waited for by threads that use theirs up. What costs
nothing alone costs most of the speed in company. How long a thread spins before it sleeps is libgomp's GOMP_SPINCOUNT
(300,000 rounds by itself, 0 with OMP_WAIT_POLICY=passive), which it reads once, when torch is imported.

In every round each policy has a process of its own, in turn, which trains the same model alone and then, beside as many
processes as are asked for that do nothing but count. **alone** and **in company** are tokens a second; ratios are taken
round by round, to `libgomp's own` of that round. **fair share**: of a core for every thread that wants one: with two
threads and one busy process on two cores, two thirds of the speed alone. `others` says how much of the processors'
time was taken by processes that do not belong to the measurement: figures of a busy machine show themselves.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from apollo_optim.cli.waiting import SPINS, WORDS
from apollo_optim.cli.words import Parser
from apollo_optim.core.errors import InputError
from benchmarks import kit
from benchmarks.cases import Case, Child, Running
from benchmarks.kit import Line, spread, told
from benchmarks.table import markdown

OWN = "libgomp's own"
SPUN = (0, 300, 1_000, 3_000, 10_000, 30_000)
POLICIES: dict[str, dict[str, str]] = {OWN: {}, **{f"{n:,} spins": {"GOMP_SPINCOUNT": str(n)} for n in SPUN}}
COMMAND = f"{SPINS:,} spins"
WARM = 3  # steps before those that count: what is compiled is compiled in them


def train(running: Running) -> None:
    """A case: the same steps alone and in company, several times in turn."""
    from apollo_optim.train.build import build
    from apollo_optim.train.company import Others
    from apollo_optim.train.config import RunConfig
    from apollo_optim.train.loss import summed_loss, targets

    about = running.config
    cfg = RunConfig()
    cfg.model.name, cfg.optim.name, cfg.optim.lr = about["model"], about["optimizer"], 1e-3
    cfg.data.seq_len, cfg.train.batch_size, cfg.train.threads = about["seq_len"], about["batch"], about["threads"]
    job = build(cfg, running.scratch)
    batch = job.data.train.next(cfg.train.batch_size)

    def steps(seconds: float) -> Line:
        """For so long: tokens a second, and the share of the processors' time that others took."""
        others, began, made, took = Others(), time.perf_counter(), 0, 0.0
        while not made or took < seconds:
            loss = summed_loss(job.model, batch.input_ids, batch.labels) / targets(batch.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            job.optimizer.step()
            job.optimizer.zero_grad()
            made, took = made + 1, time.perf_counter() - began
        return {"tokens_per_s": made * batch.input_ids.numel() / took, "steps": made, "others": others.since()}

    for _ in range(WARM):
        steps(0.0)
    alone = steps(about["seconds"])
    with busy(about["beside"]):
        company = steps(about["seconds"])
    running.write(alone=alone, company=company)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside so many processes that do nothing but count."""
    with ExitStack() as ending:
        for _ in range(processes):
            process = subprocess.Popen([sys.executable, "-c", "n = 0\nwhile True: n += 1"])
            ending.callback(process.wait)
            ending.callback(process.kill)
        yield


def measure(args: argparse.Namespace) -> None:
    """A line of the log for every policy and round."""
    for word in WORDS:  # a policy is what it says and nothing else
        os.environ.pop(word, None)
    for number in range(args.rounds):
        for name in args.policies:
            about = {key: getattr(args, key) for key in ("model", "optimizer", "batch", "seq_len", "threads", "beside")}
            about |= {"policy": name, "round": number, "seconds": args.seconds}
            with tempfile.TemporaryDirectory() as scratch:
                log = Path(scratch) / args.log.name
                case = Case("company", name, "benchmarks.company:train", about)
                Child([case], log, args.timeout, env=POLICIES[name]).wait()
                lines = kit.read(log)
            for line in lines:
                if line["kind"] == "figures" or line["status"] != "ok":
                    kit.append(args.log, line)
            print(f"round {number + 1} of {args.rounds}: {name}: {summary(lines)}", file=sys.stderr, flush=True)


def summary(lines: Sequence[Line]) -> str:
    """One process, in a few words."""
    for line in lines:
        if line["kind"] == "figures":
            alone, company = (f"{line[key]['tokens_per_s']:,.0f}" for key in ("alone", "company"))
            return f"{alone} tokens/s alone, {company} in company"
    return "; ".join(str(line.get("reason", line["status"])) for line in lines)


def table(rows: Sequence[Line]) -> str:
    """Medians and quartiles over the rounds."""
    rows = [row for row in rows if row["kind"] == "figures"]
    if not rows:
        raise InputError("no process came to its figures: the log says why")
    first = rows[-1]["config"]
    alike = [key for key in first if key not in ("round", "policy")]
    same = [row for row in rows if all(row["config"][key] == first[key] for key in alike)]
    cores, threads, beside = rows[-1]["hardware"]["cores"], first["threads"], first["beside"]
    share = min(1.0, cores / (threads + beside))
    by_policy: dict[str, dict[int, Line]] = {}
    for row in same:
        by_policy.setdefault(row["config"]["policy"], {})[row["config"]["round"]] = row
    own = by_policy.get(OWN, {})
    cells = []
    for name, rounds in by_policy.items():
        alone, company = ([row[key]["tokens_per_s"] for row in rounds.values()] for key in ("alone", "company"))
        against = [a["alone"]["tokens_per_s"] / own[n]["alone"]["tokens_per_s"] for n, a in rounds.items() if n in own]
        kept = [row["company"]["tokens_per_s"] / row["alone"]["tokens_per_s"] / share for row in rounds.values()]
        cells.append(
            [
                f"{name} (the command's)" if name == COMMAND else name,
                told(spread(alone), digits=0),
                told(spread(against), digits=3) if against else "-",
                told(spread(company), digits=0),
                told(spread(kept)),
                f"{statistics.median(row['alone']['others'] or 0.0 for row in rounds.values()):.0%}",
            ]
        )
    head = ["threads wait for", "alone, tokens/s", "against its own, x", "in company, tokens/s", "of the fair share, x"]
    return "\n".join(
        [
            "# Alone and in company",
            "",
            f"{first['model']}, {first['optimizer']}, {first['batch']} x {first['seq_len']} tokens a step, {threads} "
            f"threads, {cores} cores; in company: beside {beside} busy process{'es' if beside > 1 else ''}; "
            f"{rows[-1]['hardware']['cpu']}; {len(own) or len(next(iter(by_policy.values())))} rounds. Medians "
            "(quartiles).",
            "",
            markdown([*head, "others, while alone"], cells, "lr"),
            "",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench company", __doc__)
    parser.add_argument("--model", default="llama-4m")
    parser.add_argument("--optimizer", default="apollo-mini")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--beside", type=int, default=1, help="busy processes, in company")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES), metavar="NAME")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a process may take")
    parser.add_argument(
        "--log", type=Path, default=Path("results/loop/company.jsonl"), help="company.md lies beside it"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, make the table of the log")
    args = parser.parse(argv)
    if not args.table:
        measure(args)
    return kit.tabled(args.log, args.log.with_suffix(".md"), table)


if __name__ == "__main__":
    kit.command(main)
