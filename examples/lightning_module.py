"""A LightningModule, with the step inside backward: python examples/lightning_module.py [STEPS]"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from apollo_optim import build_optimizer
from apollo_optim.integrations.lightning import ReleaseCallback

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100


class FirstWord(LightningModule):
    """Says which of eight words came first."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Embedding(64, 32), nn.Flatten(), nn.Linear(8 * 32, 128), nn.GELU(), nn.Linear(128, 64)
        )
        self.losses: list[float] = []

    def training_step(self, words: Tensor, index: int) -> Tensor:
        """The loss of a batch."""
        loss = nn.functional.cross_entropy(self.model(words), words[:, 0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer of this library, as any other."""
        return build_optimizer("apollo", self, lr=0.01, rank=8, targets="all-linear")


torch.manual_seed(0)
module = FirstWord()
trainer = Trainer(
    max_steps=steps,
    accelerator="auto",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[ReleaseCallback()],
)
trainer.fit(module, DataLoader(torch.randint(64, (64 * steps, 8)), batch_size=64))
print(f"step 1: loss {module.losses[0]:.3f}\nstep {steps}: loss {module.losses[-1]:.3f}")
