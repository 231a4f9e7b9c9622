"""A stranger's first minutes: an empty home, a new environment, and a trained model by each of the README's three ways.

    python tools/stranger.py [--log results/welcome/stranger.jsonl] [--python python3.12]

The library with torch alone, then the command, then transformers' Trainer: what the README says is what is run, cut
out of it. A line is one thing a stranger does: its seconds by the clock, downloads included, those of a processor, and
the load average when it was done (a busy machine's clock says little). `PIP_ARGS` goes to pip; the pinned versions of
constraints.txt are taken. Needs a registry of packages, and some 3 GB on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LIBRARY = """
import torch
from torch import nn

torch.manual_seed(0)
text = torch.tensor(list(open(torch.__file__, "rb").read(200_000)))
model = nn.ModuleDict({
    "embed": nn.Embedding(256, 64),
    "attn": nn.MultiheadAttention(64, 4, batch_first=True),
    "mlp": nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)),
    "head": nn.Linear(64, 256),
})
"""
TRAINED_BY_LIBRARY = """
losses = []
mask = nn.Transformer.generate_square_subsequent_mask(64)
for step in range(60):
    at = torch.randint(len(text) - 65, (32,)).tolist()
    rows = torch.stack([text[i : i + 65] for i in at])
    hidden = model["embed"](rows[:, :-1])
    hidden = hidden + model["attn"](hidden, hidden, hidden, attn_mask=mask, need_weights=False)[0]
    hidden = hidden + model["mlp"](hidden)
    loss = nn.functional.cross_entropy(model["head"](hidden).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0] - 1
"""
TRAINER = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
small = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**small))
text = list(open(torch.__file__, "rb").read(16_000))
rows = [{"input_ids": text[i : i + 64], "labels": text[i : i + 64]} for i in range(0, len(text) - 64, 64)]
"""
TRAINED_BY_TRAINER = """
loss = trainer.state.log_history[-1]["train_loss"]  # the mean over the run; ln 256 = 5.55 is guessing
print(f"{type(trainer.optimizer.optimizer).__name__}: {trainer.state.global_step} steps, mean loss {loss:.2f}")
assert loss < 5.2
"""


def blocks() -> tuple[str, str]:
    """The README's three lines, and its lines for Trainer."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    library = next(block for block in found if "param_groups" in block)
    trainer = next(block for block in found if "Trainer(" in block)
    return library, trainer


def ways(python: str, home: Path) -> list[tuple[str, list[str]]]:
    """What a stranger does, in this order: what it is called, and the words."""
    bin_dir = home / "venv" / "bin"
    pip = [
        str(bin_dir / "pip"),
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *os.environ.get("PIP_ARGS", "").split(),
    ]
    pip += ["--constraint", str(ROOT / "constraints.txt")]
    library, trainer = blocks()
    programs = {"library": LIBRARY + library + TRAINED_BY_LIBRARY, "trainer": TRAINER + trainer + TRAINED_BY_TRAINER}
    for name, program in programs.items():
        (home / f"{name}.py").write_text(program)
    own, command = str(bin_dir / "python"), str(bin_dir / "apollo-optim")
    run = ["--model.name", "llama-1m", "--train.steps", "60", "--out", str(home / "run")]
    return [
        ("a new environment", [python, "-m", "venv", str(home / "venv")]),
        ("the library: pip install .", [*pip, str(ROOT)]),
        ("the library: a model trained", [own, str(home / "library.py")]),
        ("the command: pip install '.[train]'", [*pip, f"{ROOT}[train]"]),
        ("the command: a model trained", [command, "pretrain", *run]),
        ("the command: it writes", [command, "sample", str(home / "run"), "--prompt", "def ", "--max-tokens", "20"]),
        ("Trainer: pip install accelerate", [*pip, "accelerate"]),
        ("Trainer: a model trained", [own, str(home / "trainer.py")]),
    ]


def processor_seconds() -> float:
    """Of all that was run and has ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Do all of it; ends with 1 where something fails, and says what it said."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--log", type=Path, help="append a JSON line for each thing done")
    parser.add_argument("--python", default=sys.executable, help="of the new environment")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        kept = (
            "PATH",
            "PIP_INDEX_URL",
            "PIP_EXTRA_INDEX_URL",
            "PIP_FIND_LINKS",
            "PIP_CONFIG_FILE",
            "SSL_CERT_FILE",
            "LANG",
        )
        clean = {key: os.environ[key] for key in kept if key in os.environ} | {"HOME": folder, "TMPDIR": folder}
        for name, words in ways(args.python, home):
            start, before = time.monotonic(), processor_seconds()
            done = subprocess.run(words, cwd=home, env=clean, capture_output=True, text=True, check=False)
            seconds, processor = time.monotonic() - start, processor_seconds() - before
            said = [line for line in done.stdout.splitlines() if line.strip()]
            print(
                f"{seconds:6.1f} s  {processor:6.1f} s  {name}{'' if done.returncode == 0 else ': FAILED'}", flush=True
            )
            if done.returncode:
                print(done.stdout[-2000:] + done.stderr[-4000:])
                return 1
            if args.log:
                args.log.parent.mkdir(parents=True, exist_ok=True)
                line = {
                    "did": name,
                    "seconds": round(seconds, 1),
                    "processor_seconds": round(processor, 1),
                    "load": round(os.getloadavg()[0], 1),
                    "said": said[-1] if "trained" in name and said else "",
                }
                with args.log.open("a") as log:
                    log.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
