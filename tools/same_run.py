"""Two commits, the same run of `pretrain`: which numbers differ?

    python tools/same_run.py BASE HEAD --config runs/demo.yaml -- --train.steps 6
    python tools/same_run.py BASE HEAD --config runs/llama-7b-q-apollo-mini.yaml -- --train.steps 3

Both sides run the same file, one after the other, each in a process of its own, on this machine and one thread. Every
loss and gradient norm is compared bit by bit, and so is the last checkpoint, tensor by tensor. Seeds are drawn from
positions on both sides unless `--names` asks for a commit's own: later commits draw them from names, a wanted
difference. Another one, fp32 products of fp32 on a CPU with AMX, is asked of both sides. What comes after `--` goes to
`pretrain`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

BY_POSITION = """
try:
    from apollo_optim.optim.optimizer import RuleOptimizer
except ModuleNotFoundError:  # before the seam: by position anyway; but a step's fp32 products were bf16's with AMX
    import contextlib
    from apollo_optim.optim import base
    base.quick_products = contextlib.nullcontext
else:
    from apollo_optim.core.random import mix_seed
    RuleOptimizer._seed = lambda self, p, group: mix_seed(group["seed"], self.locate(p)[1])
"""
RUN = "import sys\nfrom apollo_optim.cli.main import main\nsys.exit(main())"


def run(commit: str, names: bool, words: list[str], work: Path) -> Path:
    """The run directory of this commit's `pretrain`."""
    tree, out = work / f"tree-{commit}", work / f"run-{commit}"
    subprocess.run(["git", "clone", "-q", "--shared", ".", str(tree)], check=True)
    subprocess.run(["git", "-C", str(tree), "checkout", "-q", commit], check=True)
    code = RUN if names else BY_POSITION + RUN
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "pretrain", *words, "--out", str(out), "--log.every", "1"]
    ended = subprocess.run(command, cwd=tree, env=env, check=False)
    if ended.returncode:
        raise SystemExit(f"{commit}: pretrain ended with {ended.returncode}")
    return out


def steps(out: Path) -> list[dict[str, Any]]:
    """Step, loss and gradient norm of every step, and what evaluations say."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    keys = ("event", "step", "loss", "grad_norm", "perplexity")
    return [{key: line.get(key) for key in keys} for line in lines if line["event"] in ("step", "eval")]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Weights and states of the last checkpoint."""
    last = max((out / "checkpoints").glob("step-*"), default=out)
    files = sorted(last.glob("*.safetensors"))
    return {f"{file.name}:{name}": t for file in files for name, t in load_file(file).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head")
    parser.add_argument("--config", type=Path, required=True, help="a run file that both commits know")
    parser.add_argument("--names", action="store_true", help="draw seeds as each commit does")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:cut])
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", str(args.config.resolve()), *given[cut + 1 :]]
        base, head = (run(commit, args.names, words, Path(folder)) for commit in (args.base, args.head))
        lines = list(zip(steps(base), steps(head), strict=True))
        differ = [pair for pair in lines if pair[0] != pair[1]]
        old, new = tensors(base), tensors(head)
    other = [name for name in sorted({*old, *new}) if not equal(old.get(name), new.get(name))]
    print(f"steps and evaluations: {len(lines)}, of them different {len(differ)}")
    print(f"tensors of the last checkpoint: {len(old)} and {len(new)}, different or on one side alone {len(other)}")
    print("\n".join([f"  {a} | {b}" for a, b in differ[:5]] + [f"  {name}" for name in other[:20]]))
    return bool(differ or other or not lines)


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bit for bit; None, of a tensor that one side lacks, is equal to none."""
    if a is None or b is None:
        return False
    bits = (t.reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


if __name__ == "__main__":
    raise SystemExit(main())
