"""Damaged, odd and hostile inputs through every command: no traceback, no hang, no result that is wrong and unsaid.

    python -m tools.fuzz --inputs 5000 --log results/trust/fuzz.jsonl

An input is a number: from it (and `--seed`) follow the command, the file that is changed, and how. Each runs in a fork
of one warm process, which is killed when it hangs. The log has a line for each input, with the commit; the same
command goes on behind its last, and runs again what was a fault: the last line of an input counts. What may come of
one:

    refused     exit 1 or 2, with one line that says why
    right       exit 0, and the result is to the bit that of the untouched input
    as it says  exit 0, for inputs that have no checksum (a log, a run file, text, somebody's model): they count
    said        exit 0 with a result of its own, and a line that says so
    traceback, hang, silent: faults
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.kit import ROOT, commit
from tools.fuzz.inputs import WEIGHTS, case_of
from tools.fuzz.stage import FAULTS, Stage, in_a_fork, outcome


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=5000, help="so many, those in the log counted (5000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=[maker.__name__ for maker in WEIGHTS], help="inputs of one kind alone")
    parser.add_argument("--log", type=Path, help="append to it, and go on where it ends")
    parser.add_argument("--only", type=int, help="this input alone; says all of it")
    args = parser.parse_args(argv)
    lines = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log and args.log.exists() else []
    found = {line["input"]: line["outcome"] for line in lines}
    to_do = [number for number in range(args.inputs) if found.get(number, "traceback") in FAULTS]
    begin = time.monotonic()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    import torch

    torch.set_num_threads(1)
    import matplotlib.figure  # noqa: F401
    import transformers.modeling_utils  # noqa: F401 (all imports once, before the forks)

    import apollo_optim.cli.pretrain
    import apollo_optim.report
    import apollo_optim.train.pretrain  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        os.environ |= {"FUZZ_ROOT": root, "HF_HOME": root, "MPLCONFIGDIR": root, "HOME": root}
        stage = Stage(Path(root))
        for number in to_do if args.only is None else [args.only]:
            if time.monotonic() - begin > args.seconds:
                break
            case = case_of(stage, number, args.seed, args.kind)
            start = time.monotonic()
            code, said = in_a_fork(case.words)
            result = outcome(case, code, said)
            found[number] = result
            line = {"input": number, "what": case.what, "outcome": result, "commit": commit()}
            line["seconds"] = round(time.monotonic() - start, 2)
            if args.only is not None or result in FAULTS:
                for place in (root, str(ROOT), sys.prefix):
                    said = said.replace(place, ".")
                line["said"] = said[-3000:]
                print(f"{number}: {case.what}: {result}\n{line['said']}", flush=True)
            if args.log:
                args.log.parent.mkdir(parents=True, exist_ok=True)
                with args.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line | {"what": case.what.replace(root, ".")}) + "\n")
    counts = Counter(found.values())
    print(f"{len(found):,} inputs: " + ", ".join(f"{counts[name]:,} {name}" for name in sorted(counts)))
    return any(counts[name] for name in FAULTS)


if __name__ == "__main__":
    raise SystemExit(main())
