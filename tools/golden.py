"""Two commits, the same steps: which numbers differ?

    python tools/golden.py BASE            the checkout against the commit BASE
    python tools/golden.py BASE HEAD       two commits
    python tools/golden.py BASE --only adafactor

Twenty steps of every optimizer with every rest it had, and with the knobs that change what a step computes, on tall,
wide, square, stacked, convolutional, 1-D, low-bit and 0-D weights, in fp32 and bf16, eager and on one thread. Each side
runs in a process of its own, on this machine, with fp32 products of fp32 ("ieee"); weights and states are then compared
bit by bit. Nothing is stored: such numbers do not survive another processor.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESTS = ("adamw", "adamw8bit", "adafactor", "scale", "apollo")
KNOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian": ("apollo", {"proj": "gaussian"}),
    "rademacher": ("apollo", {"proj": "rademacher"}),
    "kept sketch": ("apollo", {"keep_proj": True}),
    "kept gaussian": ("apollo", {"keep_proj": True, "proj": "gaussian"}),
    "tensor": ("apollo", {"scale_type": "tensor", "scale": "auto"}),
    "front": ("apollo", {"scale_front": True, "scale": 4.0}),
    "no limit": ("apollo", {"norm_growth": None}),
    "mini sketch": ("apollo-mini", {"proj": "sketch"}),
    "decay": ("apollo", {"weight_decay": 0.1}),
    "to nearest": ("apollo", {"stochastic_rounding": False}),
    "adamw decay": ("adamw", {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-5}),
    **{f"{name} state16": (name, {"state_dtype": torch.bfloat16}) for name in ("apollo", "apollo-svd", "adamw")},
}
STEPS = 20


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = nn.Linear(72, 160), nn.Linear(160, 72, bias=False)
        self.square, self.uneven = nn.Linear(64, 64, bias=False), nn.Linear(40, 67, bias=False)
        self.conv = nn.Conv2d(8, 16, 3)
        self.stack, self.wide_stack = nn.Parameter(torch.randn(3, 48, 24)), nn.Parameter(torch.randn(3, 24, 48))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mlp, self.adapter = nn.Embedding(61, 96), Experts(), nn.Linear(72, 96, bias=False)
        self.norm, self.gain = nn.LayerNorm(96), nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(96, 61, bias=False)


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(label, optimizer, arguments of build_optimizer)."""
    for name in ("apollo", "apollo-mini", "apollo-svd", "q-apollo", "q-apollo-mini", "adamw"):
        for rest in RESTS:
            if (name, rest) != ("adamw", "apollo"):
                yield f"{name}, rest {rest}", name, {"rest": rest}
    for label, (name, knobs) in KNOBS.items():
        yield label, name, knobs


def run(only: str) -> dict[str, Tensor]:
    """All cases in this process: the weights and the state at the end."""
    torch.set_num_threads(1)
    if hasattr(torch.backends.mkldnn, "matmul"):
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    from apollo_optim import build_optimizer, quantize_weights

    found: dict[str, Tensor] = {}
    for label, name, knobs in cases():
        for dtype in (torch.float32, torch.bfloat16):
            for bits in (None, 8, 4) if dtype is torch.bfloat16 else (None,):
                where = f"{label}, {str(dtype)[6:]}" + ("" if bits is None else f", {bits} bits")
                if only not in where or (bits is None) == name.startswith("q-"):
                    continue
                if bits is not None and (not knobs.get("stochastic_rounding", True) or "8bit" in where):
                    continue
                torch.manual_seed(0)
                model = Model().to(dtype)
                if bits is not None:
                    quantize_weights(model, bits, targets="mlp")
                own = {} if name == "adamw" else {"rank": 1 if "mini" in name else 8, "update_proj_gap": 7}
                optimizer = build_optimizer(name, model, targets="mlp", compile=False, **{"lr": 1e-2, **own, **knobs})
                for step in range(STEPS):
                    draw = torch.Generator().manual_seed(step)
                    for p in model.parameters():
                        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
                    optimizer.step()
                for key, p in model.named_parameters():
                    plain = p._parts() if hasattr(p, "_parts") else {"": p}
                    found |= {f"{where}: {key}{part}": t.detach().clone() for part, t in plain.items()}
                    state = optimizer.state[p].items()
                    found |= {f"{where}: {key}.{slot}": t for slot, t in state if isinstance(t, Tensor)}
    return found


def of(commit: str | None, only: str, scratch: Path) -> dict[str, Tensor]:
    """The numbers of a commit (None: the checkout), from a process of its own."""
    root = Path(__file__).resolve().parents[1]
    tree = root
    if commit is not None:
        tree = scratch / "tree"
        tree.mkdir()
        archive = subprocess.run(["git", "archive", commit, "apollo_optim"], cwd=root, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    out = scratch / "numbers.pt"
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--into", str(out), "--only", only]
    subprocess.run(command, check=True, env=environment, cwd=scratch)
    numbers: dict[str, Tensor] = torch.load(out, weights_only=True)
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="a commit")
    parser.add_argument("head", nargs="?", help="another; by default the checkout as it is")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.into is not None:
        torch.save(run(args.only), args.into)
        return 0
    if args.base is None:
        parser.error("name the commit to compare with")
    sides = []
    for commit in (args.base, args.head):
        with tempfile.TemporaryDirectory() as scratch:
            sides.append(of(commit, args.only, Path(scratch)))
    base, head = sides
    alone = sorted(base.keys() ^ head.keys())
    unequal = [key for key in sorted(base.keys() & head.keys()) if not same(base[key], head[key])]
    for key in unequal:
        print(f"differs: {key}  {difference(base[key], head[key])}")
    for key in alone:
        print(f"only in {'the first' if key in base else 'the second'}: {key}")
    print(f"{len(base.keys() & head.keys())} tensors compared, {len(unequal)} differ, {len(alone)} on one side only")
    return int(bool(unequal or alone))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit."""
    return a.shape == b.shape and a.dtype is b.dtype and torch.equal(a, b)


def difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype is not b.dtype:
        return f"{tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}"
    apart = (a.double() - b.double()).norm() / b.double().norm()
    return f"{apart:.1e} relative, {(a != b).double().mean():.2%} of the entries"


if __name__ == "__main__":
    sys.exit(main())
