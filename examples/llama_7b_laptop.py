"""LLaMA-7B on a laptop, from scratch, 8-bit weights, 8.1 GB: python examples/llama_7b_laptop.py [STEPS] [SIZE]

Weights are drawn and quantised module by module, every step is taken inside the backward pass, activations are
recomputed. A step takes some 40 s on two cores: it shows that it fits, not that it learns. A small SIZE, llama-1m, goes
the same way in a minute. Ctrl-C saves; to go on: `apollo-optim pretrain --out out/examples/llama-7b --resume`.
"""

import dataclasses
import sys
from pathlib import Path

from apollo_optim.train.config import load_config
from apollo_optim.train.plan import planned
from apollo_optim.train.pretrain import pretrain

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 3
size = sys.argv[2] if len(sys.argv) > 2 else "llama-7b"
cfg = load_config(Path(__file__).parent.parent / "runs" / "llama-7b-q-apollo-mini.yaml")
cfg = dataclasses.replace(
    cfg,
    model=dataclasses.replace(cfg.model, name=size),
    data=dataclasses.replace(cfg.data, vocab_size=32_000 if size == "llama-7b" else 4_096),
    train=dataclasses.replace(cfg.train, steps=steps),
    checkpoint=dataclasses.replace(cfg.checkpoint, every=None),
    out=f"out/examples/{size}",
)
plan = planned(cfg, vocab_size=cfg.data.vocab_size)
print(f"planned: {plan.total / 1e9:.2f} GB of tensors at the fullest moment of a step")
result = pretrain(cfg)
print(f"step {steps}: perplexity {result.perplexity:.0f}")
