"""The loss of a model on rows of tokens, and the two perplexities that are in circulation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from apollo_optim.core.errors import InputError
from apollo_optim.train.chunked import How, Unmade, summed_cross_entropy, unmade_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from apollo_optim.data import Batch

IGNORED = -100  # a label that counts for nothing


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


def targets(labels: torch.Tensor) -> int:
    """How many predictions these rows ask for: every label but a row's first, padding left out."""
    return int((labels[:, 1:] != IGNORED).sum())


def summed_loss(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, how: How = "auto"
) -> torch.Tensor:
    """Cross entropy in float32, summed over the predictions: the caller divides by as many as *it* counts.

    No attention mask: padding is only ever at the end of a row, where a causal model's other positions cannot see it.
    The labels are shifted, not the logits: those are large, and a shifted view of them would be copied; or they are
    never made (`how`, see `train.loss`). Raises InputError if they must not be, but the model uses them itself.
    """
    with unmade_logits(model, how):
        output = model(input_ids=input_ids, use_cache=False)
    logits = output.logits
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if isinstance(logits, Unmade) and logits.made is None:
        loss = summed_cross_entropy(logits, shifted)
    elif how == "chunked":
        raise InputError(
            f"train.loss=chunked: the logits of {type(model).__name__} are not the plain product of its hidden states "
            "and its head (a bias, a scale, a soft cap, a compiled head): use auto or full"
        )
    else:
        loss = F.cross_entropy(logits.flatten(0, 1).float(), shifted.flatten(), ignore_index=IGNORED, reduction="sum")
    router_loss = getattr(output, "aux_loss", None)  # a mixture of experts that was told to output it
    if router_loss is not None and model.training:
        loss = loss + getattr(model, "router_aux_loss_coef", 0.0) * router_loss * (shifted != IGNORED).sum()
    return loss


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
