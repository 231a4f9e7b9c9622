"""The library in a loop of your own, torch alone: python examples/bare_loop.py [STEPS]"""

import sys

import torch
from torch import nn

from apollo_optim import build_optimizer, describe

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 32), nn.Flatten(), nn.Linear(8 * 32, 128), nn.GELU(), nn.Linear(128, 64))
optimizer = build_optimizer("apollo", model, lr=0.01, rank=8, targets="all-linear")
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
print(describe(optimizer))
for step in range(steps):
    words = torch.randint(64, (64, 8))
    loss = nn.functional.cross_entropy(model(words), words[:, 0])  # to learn: which word came first
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step in (0, steps - 1):
        print(f"step {step + 1}: loss {loss.item():.3f}")
