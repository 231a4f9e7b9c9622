"""How long the steps of a run wait for their batches, with the text made in a thread ahead of them and without.

    apollo-optim bench stall --steps 300 --step-ms 50

No model is trained: a step is a sleep, as long as a GPU (or another core) would be at work on it, so that what is
measured is the wait for text. The text is a dataset of the package's own kind, streamed from a local file; both ways
read the same one, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from apollo_optim.cli.words import Parser
from apollo_optim.data import DataConfig, open_data
from apollo_optim.data.files import local_documents
from apollo_optim.data.readers import Reading
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.table import markdown


def write_dataset(folder: Path, size: int) -> None:
    """Python source of at least `size` bytes as a dataset with two splits."""
    with (folder / "train-0.jsonl").open("w") as train, (folder / "validation-0.jsonl").open("w") as validation:
        for number, document in enumerate(local_documents("packages", Reading("text", "skip"), alone=True)):
            line = json.dumps({"text": document.text.decode()}) + "\n"
            (train if number else validation).write(line)
            size -= len(document.text)
            if size <= 0:
                return


def waits(cfg: DataConfig, args: argparse.Namespace, *, ahead: bool) -> list[float]:
    """Seconds that each step waited, the first (which reads the first block) left out."""
    batches = open_data(cfg).train
    found = []
    with batches.ahead(args.steps * args.batch) if ahead else contextlib.nullcontext():
        for _ in range(args.steps):
            asked = time.perf_counter()
            batches.next(args.batch)
            found.append(time.perf_counter() - asked)
            time.sleep(args.step_ms / 1e3)
    return found[1:]


def measure(args: argparse.Namespace, log: Path) -> None:
    """A line of the log for each round."""
    with tempfile.TemporaryDirectory() as work:
        dataset = Path(work, "dataset")
        dataset.mkdir()
        write_dataset(dataset, args.megabytes * 1_000_000)
        cfg = DataConfig(source=f"hf:{dataset}", cache_dir=work, seq_len=args.seq_len, vocab_size=4096)
        for number in range(args.rounds):
            row: Line = {"round": number, "versions": kit.versions("tokenizers", "datasets"), "commit": kit.commit()}
            row |= {key: getattr(args, key) for key in ("steps", "step_ms", "batch", "seq_len")}
            row |= {"hardware": kit.hardware("cpu")}
            for name, ahead in (("in the step", False), ("ahead", True)):
                row[name] = waits(cfg, args, ahead=ahead)
            kit.append(log, row)


def table(rows: Sequence[Line]) -> str:
    """Over all steps of all rounds."""
    first = rows[-1]
    cells = []
    for name in ("in the step", "ahead"):
        found = sorted(wait for row in rows for wait in row[name])
        share = sum(found) / (sum(found) + len(found) * first["step_ms"] / 1e3)
        cells.append([name, f"{statistics.median(found) * 1e3:.2f}", f"{found[-1] * 1e3:,.0f}", f"{share:.1%}"])
    return "\n".join(
        [
            "# Waiting for text",
            "",
            f"Steps of {first['step_ms']} ms, {first['batch']} x {first['seq_len']} tokens of a streamed dataset; "
            f"{len(rows)} rounds of {first['steps']} steps; {first['hardware']['cpu']}.",
            "",
            markdown(["text is made", "median wait, ms", "longest, ms", "of the time"], cells, "lr"),
            "",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench stall", __doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-ms", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--megabytes", type=int, default=24, help="of text, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path("results/loop"), help="stall.jsonl and stall.md are kept there"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, make the table of the log")
    args = parser.parse(argv)
    log = args.out / "stall.jsonl"
    if not args.table:
        measure(args, log)
    return kit.tabled(log, args.out / "stall.md", table)


if __name__ == "__main__":
    kit.command(main)
