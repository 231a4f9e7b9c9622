"""What the model of `make demo` writes before it has learnt anything, and on the way: results/welcome/writes.md.

    python tools/what_it_writes.py [--steps 400] [--at 0 100 400]      a quarter of an hour beside other work

The run is runs/demo.yaml, APOLLO's, with more steps; text is drawn as `apollo-optim sample` draws it, with one seed.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout's command, whatever is installed

from apollo_optim.cli import pretrain as command  # noqa: E402
from apollo_optim.cli.sample import generate, load  # noqa: E402
from apollo_optim.core import disk, runlog  # noqa: E402
from apollo_optim.core.printing import say  # noqa: E402
from apollo_optim.train.build import build  # noqa: E402
from apollo_optim.train.checkpoint import export, write_model  # noqa: E402
from apollo_optim.train.config import RunConfig  # noqa: E402
from apollo_optim.train.pretrain import pretrain  # noqa: E402

OUT = ROOT / "results" / "welcome" / "writes.md"
PROMPT = "def read(self, path):"
SEED = 1


def written(folder: Path) -> str:
    """What a model that was exported there writes."""
    model, tokenizer = load(folder)
    return PROMPT + "".join(generate(model, tokenizer, PROMPT, max_tokens=80, temperature=0.8, seed=SEED))


def untrained(cfg: RunConfig, run: Path, folder: Path) -> Path:
    """The model of a run before its first step."""
    job = build(cfg, run)
    write_model(job.model, job.data.tokenizer, folder)
    return folder


def perplexities(run: Path) -> dict[int, str]:
    """By step: on validation text; before the first step on what that step was made from."""
    told = dict[int, str]()
    for _, record in runlog.Log(run / "metrics.jsonl"):
        if record and record["event"] == "eval":
            told[record["step"]] = f"validation perplexity {record['perplexity']:,.0f}"
        elif record and record["event"] == "step" and record["step"] == 1:
            told[0] = f"perplexity {math.exp(record['loss']):,.0f} of the first step's text"
    return told


def main() -> int:
    """Train, and write down what it writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--at", type=int, nargs="+", default=[0, 100, 400])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    every = ["--eval.every", "100", "--checkpoint.every", "100", "--checkpoint.keep", "99"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["--config", str(ROOT / "runs" / "demo.yaml"), "--train.steps", str(args.steps), *every]
        cfg = command.parse([*words, "--out", str(run)]).cfg
        texts = {step: written(untrained(cfg, run, Path(folder) / "0")) for step in args.at if step == 0}
        pretrain(cfg)
        texts |= {step: written(export(run, step, Path(folder) / str(step))) for step in args.at if step}
        known = perplexities(run)
    parts = [
        "# What a small model writes\n",
        "Made by `python tools/what_it_writes.py`: `make demo`'s run file, APOLLO's,",
    ]
    parts += [f"with {args.steps} steps; after `{PROMPT}`, 80 tokens at temperature 0.8, seed {SEED}.\n"]
    for step in args.at:
        parts += [f"## Step {step}: {known.get(step, 'not evaluated')}\n", f"```text\n{texts[step].rstrip()}\n```\n"]
    disk.write(args.out, "\n".join(parts))
    say(f"{args.out}: steps {', '.join(map(str, args.at))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
