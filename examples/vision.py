"""A small convolutional network: python examples/vision.py [STEPS]

A convolution's weight is seen as a matrix, (outputs, the rest). The pictures are made up: bars at one of four angles,
in noise.
"""

import sys

import torch
from torch import Tensor, nn

from apollo_optim import build_optimizer, describe

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Pictures of 16 x 16 and which of four angles their bars have."""
    angle = torch.randint(4, (count,))
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along = torch.stack([x, y, x + y, x - y])[angle] + 3 * torch.rand(count, 1, 1)
    return (torch.sin(along) + 0.5 * torch.randn(count, 16, 16)).unsqueeze(1), angle


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
    nn.Flatten(), nn.Linear(64, 4),
)  # fmt: skip
optimizer = build_optimizer("apollo", model, lr=0.01, rank=4, targets="all-linear")
print(describe(optimizer))
for step in range(steps):
    x, angle = pictures(64)
    loss = nn.functional.cross_entropy(model(x), angle)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, steps - 1):
        print(f"step {step + 1}: loss {loss.item():.3f}")
