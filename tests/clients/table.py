"""Runs `long.py` in every environment that is named, and writes the table: `make test-clients` does it.

    python tests/clients/table.py results/clients.md ENVIRONMENT...

Exit 1 where a figure is not what it has to be: release and resumed runs are bitwise those without, wherever the same
client resumes bitwise with torch.optim.AdamW.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
COLUMNS = {
    "client": "client and version",
    "case": "model, weights, rule or state",
    "follows": "matrices on the rule",
    "accumulated": "4 micro-batches against 1 batch",
    "release": "release against without",
    "resumed": "resumed",
    "resumed_released": "resumed with release",
    "adamw": "resumed, torch.optim.AdamW",
}
TOP = """# Clients

Made by `make test-clients`, with the versions of `tests/clients/*.txt`, on a CPU with one thread. Tiny random models,
two epochs of 8 steps of 4 micro-batches (the last of an epoch of 2); resumed from step 8 and from step 12. A figure is
the largest difference between two runs in any weight or state (from another version's checkpoint: in any weight), 0
where they are bitwise equal. "4 micro-batches against 1 batch" is relative to how far the weights went: its sums have
another order. Counted as on the rule is a matrix that has the rule's state, in an optimizer of this library.

"""


def run(environment: Path, kept: Path, others: list[Path]) -> list[Row]:
    """The rows of one environment, as they come."""
    words = [environment / "bin" / "python", HERE / "long.py", "--keep", kept, "--from", *others]
    found = []
    how = {"PYTHONPATH": str(HERE.parent.parent), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **how}) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            found.append(json.loads(line))
    if process.returncode:
        raise SystemExit(f"error: {environment}: long.py ended with {process.returncode}")
    return found


def fails(row: Row) -> bool:
    """Is a figure not what it has to be?"""
    bitwise = [row.get("release", 0.0)]
    if not row.get("adamw"):
        bitwise += [row.get("resumed", 0.0), row.get("resumed_released", 0.0)]
    return any(bitwise) or row.get("accumulated", 0.0) > 1e-4


def table(rows: list[Row]) -> str:
    def cell(value: str | float | None) -> str:
        return f"{value:.2g}" if isinstance(value, float) else value or ""

    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *([cell(row.get(key)) for key in COLUMNS] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    target, *environments = map(Path, sys.argv[1:])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        kept: list[Path] = []
        for number, environment in enumerate(environments):
            rows += run(environment, Path(folder) / str(number), kept)
            kept.append(Path(folder) / str(number))
    target.write_text(TOP + table(rows))
    bad = [row for row in rows if fails(row)]
    print(f"{target}: {len(rows)} rows, {len(bad)} not as they have to be", *map(json.dumps, bad), sep="\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
