"""The loss of a model on rows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apollo_optim.core.errors import InputError
from apollo_optim.train.chunked import How, Unmade, summed_cross_entropy, unmade_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # a label that counts for nothing


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


class Learner(nn.Module):
    """A model and its loss as one module, for what wraps or shards a module by its `forward`: DDP and FSDP2."""

    def __init__(self, model: PreTrainedModel, how: How) -> None:
        super().__init__()
        self.model, self._how = model, how

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """`summed_loss` of some rows."""
        return summed_loss(self.model, input_ids, labels, self._how)
