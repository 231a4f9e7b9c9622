"""Damage the newest checkpoint of a run, resume it, and compare the end to the run that nobody damaged.

    apollo-optim bench corruptions [--runs 20] [--log results/trust/corruptions.jsonl]

Files of the checkpoint, in turn, are damaged in one of five ways: a bit is flipped, the end is cut off, a piece is
zeroed, nothing is left, or the file is gone. The resumed run has to name it, go on from the checkpoint before, and end
with the figures and the bytes of the whole run. One JSON line for each; exit code 0 if all did.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from apollo_optim.cli.words import Parser
from apollo_optim.train.checkpoint import checkpoints
from apollo_optim.train.config import RunConfig
from apollo_optim.train.pretrain import pretrain
from benchmarks import kit
from benchmarks.kill import figures, final_files, records, two_runs
from benchmarks.kit import Line

LOG = Path("results/trust/corruptions.jsonl")
STEPS = 24  # checkpoints after 8, 16 and 24; that of 24 is taken away, that of 16 damaged


def flipped(content: bytearray, chance: random.Random) -> None:
    """One bit is another."""
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def cut(content: bytearray, chance: random.Random) -> None:
    """As when a disk was full."""
    del content[chance.randrange(1, len(content)) :]


def zeroed(content: bytearray, chance: random.Random) -> None:
    """As when a block was never written."""
    at = chance.randrange(len(content))
    content[at : at + 512] = bytes(len(content[at : at + 512]))


def emptied(content: bytearray, chance: random.Random) -> None:
    """As when a name was written, and nothing else."""
    content.clear()


HARMS: dict[str, Callable[[bytearray, random.Random], None]] = {
    "a bit flipped": flipped,
    "cut off": cut,
    "a piece zeroed": zeroed,
    "emptied": emptied,
}
GONE = "gone"


def damage(file: Path, harm: str, chance: random.Random) -> None:
    """Do this to a file; it is another one afterwards."""
    if harm == GONE:
        file.unlink()
        return
    before = file.read_bytes()
    content = bytearray(before)
    while content == before:  # what was zeroed may have been zeros
        HARMS[harm](content, chance)
    file.write_bytes(content)


def interrupted(whole: Path, run: Path) -> Path:
    """A copy of a run as it was after its second checkpoint, which is returned."""
    shutil.copytree(whole, run, symlinks=True)
    shutil.rmtree(run / "model")
    *_, newest, last = checkpoints(run).values()
    shutil.rmtree(last)
    return newest


def resumed(cfg: RunConfig, whole: Path, number: int, folder: Path) -> Line:
    """What a run makes of a damaged checkpoint."""
    run, chance = folder / f"run-{number}", random.Random(number)
    newest = interrupted(whole, run)
    files = sorted(path for path in newest.iterdir() if path.is_file())
    file, harm = files[number % len(files)], [*HARMS, GONE][number % (len(HARMS) + 1)]
    damage(file, harm, chance)
    pretrain(dataclasses.replace(cfg, out=str(run)), resume=True)
    start = [line for line in records(run) if line["event"] == "start"][-1]
    told = start.get("damaged", [])
    ours, theirs = figures(run), figures(whole)
    return {
        "number": number, "file": file.name, "harm": harm, "named": len(told) == 1 and file.name in told[0],
        "resumed_from": start["resumed_from"], "figures": sum(map(len, theirs)), "equal": ours == theirs,
        "same_bytes": final_files(run) == final_files(whole),
    }  # fmt: skip


def sound(line: Line) -> bool:
    """Found, named, and gone on from the checkpoint before it."""
    return bool(line["named"] and line["equal"] and line["same_bytes"] and line["resumed_from"] == STEPS // 3)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench corruptions", __doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--log", type=Path, default=LOG)
    args: Any = parser.parse(argv)
    cfg, lines = two_runs(STEPS)["float32"], []
    with tempfile.TemporaryDirectory(prefix="corrupt-") as directory:
        whole = Path(directory) / "whole"
        cfg.checkpoint.keep = 3
        pretrain(dataclasses.replace(cfg, out=str(whole)))
        for number in range(args.runs):
            line = resumed(cfg, whole, number, Path(directory))
            lines.append(line)
            kit.append(args.log, line | {"commit": kit.commit(), "versions": kit.versions()})
            print(line, flush=True)
    found = sum(map(sound, lines))
    print(f"{found} of {len(lines)} damaged checkpoints were found and named, and their runs ended as the whole one")
    return 0 if found == len(lines) else 1


if __name__ == "__main__":
    kit.command(main)
