"""The loss on validation text, and the two perplexities that are in circulation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from apollo_optim.parallel.world import ALONE, World
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
    model: PreTrainedModel,
    rows: list[Batch],
    batch_size: int,
    bytes_per_token: float,
    how: How = "auto",
    *,
    learner: nn.Module | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Evaluate on `rows`, `batch_size` of them at a time.

    Several processes take batches in turn, and each learns what all have found: `learner` is the model with its loss
    as it is spread over them.

    Leaves the model in the mode it was in, and draws no random numbers: training goes on as if nothing had been.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.train(False)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    losses = torch.zeros(len(batches), dtype=torch.float64, device=device)
    counts = [targets(torch.stack([row.labels for row in batch])) for batch in batches]
    for first in range(0, len(batches), world.shares):
        number = first + world.share
        batch = batches[min(number, len(batches) - 1)]  # who has none left goes along: sharded weights need all
        ids, labels, positions = type(batch[0]).stacked(batch).map(lambda part: part.to(device))
        loss = summed_loss(model, ids, labels, how, positions) if learner is None else learner(ids, labels, positions)
        if number < len(batches):
            losses[number] = loss.double()
    model.train(was_training)
    summed = world.total(losses).tolist()
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
