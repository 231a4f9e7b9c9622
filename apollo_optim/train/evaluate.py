"""The loss on validation text, and the two perplexities that are in circulation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from apollo_optim.train.chunked import How
from apollo_optim.train.loss import summed_loss, targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from apollo_optim.data import Batch


@dataclass(frozen=True)
class Evaluation:
    """What the validation rows say."""

    loss: float
    """Nats per predicted token, every token weighing the same."""
    perplexity: float
    """exp(loss)."""
    perplexity_reference: float
    """What the evaluation of GaLore, Fira, APOLLO and others prints: exp(the summed losses of n batches / (n + 1)).
    It is too low, by an amount that depends on n; it is here so that tables can be compared, and for nothing else."""
    bits_per_byte: float
    """loss / ln 2 / bytes per token: comparable between tokenizers."""
    predictions: int
    """Tokens that were predicted."""
    batches: int
    """The n of the reference's figure."""


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, rows: list[Batch], batch_size: int, bytes_per_token: float, how: How = "auto"
) -> Evaluation:
    """Evaluate on `rows`, `batch_size` of them at a time.

    Leaves the model in the mode it was in, and draws no random numbers: training goes on as if nothing had been.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.train(False)
    losses, counts = [], []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        labels = torch.stack([row.labels for row in some])
        input_ids = torch.stack([row.input_ids for row in some])
        losses.append(summed_loss(model, input_ids.to(device), labels.to(device), how).double())
        counts.append(targets(labels))
    model.train(was_training)
    summed = torch.stack(losses).tolist()
    loss = sum(summed) / max(sum(counts), 1)
    reference = sum(total / max(count, 1) for total, count in zip(summed, counts, strict=True)) / (len(counts) + 1)
    return Evaluation(
        loss=loss,
        perplexity=_exp(loss),
        perplexity_reference=_exp(reference),
        bits_per_byte=loss / math.log(2) / bytes_per_token if bytes_per_token else math.nan,
        predictions=sum(counts),
        batches=len(counts),
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
