"""Runs the long half in every environment that is named, and writes the table: `make test-clients` does it.

    python tests/clients/table.py results/clients.md ENVIRONMENT... [--keep-others] [--only NAME...]

The long half is `NAME_runs.py` in an environment that has one of its name, else `long.py`. `--keep-others` keeps the
rows that this run does not make, `--only` asks `long.py` for some of its rows. The table is written after every
environment, with the old rows of those that are still to come or whose long half ended with an error.

Exit 1 where one did, or where a figure is not what it has to be: release and resumed runs are bitwise those without,
wherever the same client resumes bitwise with torch.optim.AdamW.
"""

import argparse
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
two epochs of 8 steps of 4 micro-batches (the last of an epoch of 2); resumed from step 8 and from step 12. Of clients
with a command of their own 8 steps, resumed from step 4; of Lightning and accelerate 6, from steps 4 and 3. A figure is
the largest difference between two runs in any weight or state (from another version's checkpoint: in any weight), 0
where they are bitwise equal. "4 micro-batches against 1 batch" is relative to how far the weights went: its sums have
another order. Counted as on the rule is a matrix that has the rule's state, in an optimizer of this library.

"""


def run(environment: Path, kept: Path, others: list[Path], only: list[str]) -> tuple[list[Row], int]:
    """The rows of one environment, printed as they come, and the exit code of its long half."""
    own = HERE / f"{environment.name}_runs.py"
    asked = ["--only", *only] if only else []
    words: list[Any] = [own] if own.exists() else [HERE / "long.py", "--keep", kept, *asked, "--from", *others]
    words = [environment / "bin" / "python", *words]
    found = []
    how = {"PYTHONPATH": str(HERE.parent.parent), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **how}) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            found.append(json.loads(line))
    return found, process.returncode


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


def read(target: Path) -> list[Row]:
    """The rows of a table that was written before, as words."""
    lines = target.read_text().splitlines() if target.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [dict(zip(COLUMNS, row, strict=True)) for row in cells[2:]]


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """The old rows, each in its newest form, then those that are new; what a run tells of one case is one row."""
    found: dict[tuple[str, str], Row] = {}
    for row in new:
        key = row["client"], row["case"]
        found[key] = found.get(key, {}) | row
    return list(({(row["client"], row["case"]): row for row in old} | found).values())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("environments", type=Path, nargs="+")
    parser.add_argument("--keep-others", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    old, rows, ended = read(asked.target), [], []
    with tempfile.TemporaryDirectory() as folder:
        kept: list[Path] = []
        for number, environment in enumerate(asked.environments):
            left = Path(folder) / str(number)
            made, code = run(environment, left, kept, asked.only)
            rows += made
            if code:
                ended.append(f"error: {environment}: its long half ended with {code}")
            if (left / "version").exists():  # `long.py` alone keeps checkpoints
                kept.append(left)
            asked.target.write_text(TOP + table(merged(old, rows)))
    if not (asked.keep_others or ended):
        asked.target.write_text(TOP + table(merged([], rows)))
    bad = [row for row in rows if fails(row)]
    print(f"{asked.target}: {len(rows)} rows made, {len(bad)} not as they have to be", *map(json.dumps, bad), sep="\n")
    for line in ended:
        print(line, file=sys.stderr)
    return bool(bad or ended)


if __name__ == "__main__":
    sys.exit(main())
