"""An instruction set that a small model can learn, made by rules, and models scored on it by exact match.

    apollo-optim bench instructions --out out/demo-finetune
    apollo-optim bench instructions --out out/demo-finetune --score before=out/base/model adamw=out/demo-finetune/adamw

Five tasks over identifiers of Python source: copy, reverse, sort, rename and count. The first command writes
train.jsonl and held.jsonl (prompt and completion; no prompt is in both), the second lets every model answer the
held-out prompts, always with the likeliest token, and writes a log, a table and a picture. An answer is right if it is
the whole completion and the text ends there. `make demo-finetune` does all of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apollo_optim.cli.words import Parser
from apollo_optim.core import disk
from apollo_optim.core.errors import InputError
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.table import markdown

TASKS = ("copy", "reverse", "sort", "rename", "count")
NAMES = (
    *("args", "code", "count", "data", "end", "error", "file", "func", "index", "item", "key", "kind", "line", "list"),
    *("mode", "name", "node", "path", "read", "result", "self", "size", "start", "text", "type", "value"),
)
LONGEST = 12  # tokens of an answer, more than any has


def instruction(task: str, chance: random.Random) -> dict[str, str]:
    """One row: the task, what it is about, and the answer."""
    names = chance.sample(NAMES, chance.randint(2, 4))
    asked = names
    if task == "copy":
        answer = names
    elif task == "reverse":
        answer = names[::-1]
    elif task == "sort":
        names = names[:3]
        asked, answer = names, sorted(names)
    elif task == "rename":
        other = chance.choice([name for name in NAMES if name not in names])
        old = chance.choice(names)
        asked, answer = [old, "as", other, ":", *names], [other if name == old else name for name in names]
    else:
        one, *others = names[:3]
        asked = chance.choices([one, *others], weights=[2, *(1 for _ in others)], k=chance.randint(3, 5))
        answer = [str(asked.count(one))]
        asked = [one, ":", *asked]
    return {"task": task, "prompt": f"{task} {' '.join(asked)} =", "completion": f" {' '.join(answer)}"}


def instructions(count: int, held: int, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to train on and rows held out, as many of each task; no prompt is there twice."""
    chance, found = random.Random(seed), dict[str, dict[str, str]]()
    while len(found) < count + held:
        row = instruction(TASKS[len(found) % len(TASKS)], chance)
        found.setdefault(row["prompt"], row)
    rows = list(found.values())
    return rows[held:], rows[:held]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str | None]:
    """The likeliest answer to each prompt; None where the text does not end. Prompts of one length go together."""
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    said: list[str | None] = [None] * len(prompts)
    for length in sorted({len(some) for some in ids}):
        numbers = [number for number, some in enumerate(ids) if len(some) == length]
        tokens = torch.tensor([ids[number] for number in numbers])
        for _ in range(LONGEST):
            logits = model(input_ids=tokens, use_cache=False).logits[:, -1, : len(tokenizer)]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        for number, row in zip(numbers, tokens[:, length:].tolist(), strict=True):
            if tokenizer.eos_token_id in row:
                said[number] = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)])
    return said


def score(name: str, where: Path, rows: list[dict[str, str]]) -> Line:
    """A line of the log: the share of exact answers by task, and what the run took, if `where` is one."""
    from apollo_optim.cli.sample import load
    from apollo_optim.report import read_run

    run = where / "metrics.jsonl"
    model, tokenizer = load(where / "model" if run.exists() else where)
    said = answers(model, tokenizer, [row["prompt"] for row in rows])
    right = [answer == row["completion"] for answer, row in zip(said, rows, strict=True)]
    tasks = {
        task: sum(ok for ok, row in zip(right, rows, strict=True) if row["task"] == task)
        / max(1, sum(row["task"] == task for row in rows))
        for task in TASKS
    }
    took = {}
    if run.exists():
        found = read_run(where)
        took = {"memory": found.memory, "seconds": found.seconds, "optim": found.start["config"]["optim"]}
    return {"name": name, "rows": len(rows), "exact": sum(right) / len(rows), "tasks": tasks, **took}


def tabled(lines: list[Line]) -> str:
    """The scores as Markdown."""
    header = ["model", "exact match", *TASKS, "optimizer state", "weights", "peak of the process", "training"]
    rows = []
    for line in lines:
        memory = line.get("memory") or {}
        sizes = [f"{memory[key] / 1e6:.2f} MB" if key in memory else "-" for key in ("optimizer", "weights", "peak")]
        seconds = f"{line['seconds']:.0f} s" if line.get("seconds") else "-"
        rows.append(
            [line["name"], f"{line['exact']:.1%}", *(f"{line['tasks'][t]:.0%}" for t in TASKS), *sizes, seconds]
        )
    return markdown(header, rows, "l" + "r" * (len(header) - 1)) + "\n"


def draw(lines: list[Line], path: Path) -> None:
    """Exact match, weights with the optimizer's state, and the peak of the process, a bar for each model."""
    from matplotlib.figure import Figure

    from apollo_optim.core.printing import literal
    from apollo_optim.report.picture import COLOURS

    figure = Figure(figsize=(13, 1.4 + 0.4 * len(lines)), layout="constrained", dpi=140)
    names, shown = [literal(line["name"]) for line in lines], [COLOURS[i % len(COLOURS)] for i in range(len(lines))]
    exact, kept, peak = figure.subplots(1, 3, sharey=True)
    bars = exact.barh(names, [100 * line["exact"] for line in lines], color=shown)
    exact.bar_label(bars, [f"{line['exact']:.0%}" for line in lines], padding=3)
    exact.set(xlim=(0, 118), xlabel="%", title=f"Exact match on {lines[0]['rows']} held-out instructions")
    of = {part: [(line.get("memory") or {}).get(part, 0) / 1e6 for line in lines] for part in ("weights", "optimizer")}
    kept.barh(names, of["weights"], color=shown, alpha=0.4)
    bars = kept.barh(names, of["optimizer"], left=of["weights"], color=shown)
    both = list(zip(of["weights"], of["optimizer"], strict=True))
    kept.bar_label(bars, [f"{a:.2f} + {b:.2f}" if b else "-" for a, b in both], padding=3)
    kept.set(xlim=(0, 1.5 * max(map(sum, both)) or 1), xlabel="MB", title="Weights (pale) + optimizer state")
    peaks = [(line.get("memory") or {}).get("peak", 0) / 1e6 for line in lines]
    bars = peak.barh(names, peaks, color=shown)
    peak.bar_label(bars, [f"{size:.0f}" if size else "-" for size in peaks], padding=3)
    peak.set(xlim=(0, 1.2 * max(peaks) or 1), xlabel="MB", title="Peak of the process")
    exact.invert_yaxis()
    for axes in (exact, kept, peak):
        axes.title.set_fontsize(11)
        axes.spines[["top", "right"]].set_visible(False)
    with disk.writing(path) as file:
        figure.savefig(file, format="png")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser("apollo-optim bench instructions", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="where train.jsonl and held.jsonl are, or go to")
    parser.add_argument("--rows", type=int, default=6000, help="to train on (6000)")
    parser.add_argument("--held", type=int, default=300, help="held out (300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", nargs="+", metavar="NAME=DIR", help="run directories, or models, to score")
    args = parser.parse(argv)
    if min(args.rows, args.held) < 1:
        raise InputError(f"--rows {args.rows} --held {args.held}: at least 1 of each")
    if not args.score:
        if there := [path for name in ("train", "held") if (path := args.out / f"{name}.jsonl").exists()]:
            raise InputError(f"{there[0]} is there already: name another --out, or remove it")
        args.out.mkdir(parents=True, exist_ok=True)
        for name, rows in zip(("train", "held"), instructions(args.rows, args.held, args.seed), strict=True):
            disk.write(args.out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            print(f"{args.out / name}.jsonl: {len(rows):,} rows, such as {rows[0]['prompt']}{rows[0]['completion']}")
        return 0
    rows = kit.read(args.out / "held.jsonl")
    if not rows:
        raise InputError(f"{args.out}/held.jsonl: there are no rows; make them first (leave --score out)")
    lines = []
    for word in args.score:
        name, _, where = word.partition("=")
        if not where:
            raise InputError(f"--score {word}: give NAME=DIR")
        lines.append(score(name, Path(where), rows))
        kit.append(args.out / "scores.jsonl", lines[-1])
        print(f"{name}: {lines[-1]['exact']:.1%} exact", flush=True)
    draw(lines, args.out / "demo-finetune.png")
    disk.write(args.out / "demo-finetune.md", (table := tabled(lines)))
    print(f"\n{table}\npicture: {args.out / 'demo-finetune.png'}")
    return 0


if __name__ == "__main__":
    kit.command(main)
