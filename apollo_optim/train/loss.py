"""The loss of a model on rows of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apollo_optim.core.errors import InputError
from apollo_optim.data.layout import IGNORED
from apollo_optim.train.chunked import How, Unmade, summed_cross_entropy, unmade_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def targets(labels: torch.Tensor) -> int:
    """How many predictions these rows ask for: every label but a row's first, padding left out."""
    return int((labels[:, 1:] != IGNORED).sum())


def summed_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    how: How = "auto",
    position_ids: Tensor | None = None,
) -> Tensor:
    """Cross entropy in float32, summed over the predictions: the caller divides by as many as *it* counts.

    No attention mask: padding is only ever at the end of a row, where a causal model's other positions cannot see it.
    `position_ids` that begin again within a row divide it into texts that do not see each other (`check_packing`).
    The labels are shifted, not the logits: those are large, and a shifted view of them would be copied; or they are
    never made (`how`, see `train.loss`). Raises InputError if they must not be, but the model uses them itself.
    """
    positions = {} if position_ids is None else {"position_ids": position_ids}
    with unmade_logits(model, how):
        output = model(input_ids=input_ids, use_cache=False, **positions)
    logits = output.logits
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if isinstance(logits, Unmade) and logits.made is None:
        loss = summed_cross_entropy(logits, shifted)
    elif how == "chunked":
        raise InputError(
            f"train.loss=chunked: the logits of {type(model).__name__} are not the plain matmul of its hidden states "
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

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """`summed_loss` of some rows."""
        return summed_loss(self.model, input_ids, labels, self._how, position_ids)


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model whose attention goes across the texts of a packed row. Draws no random numbers.

    transformers' attention masks follow from the positions; a recurrent model, one without positions, or a kernel that
    takes one row at a time has none: there a text that is changed changes what is said of the next.
    """
    was_training, device = model.training, next(model.parameters()).device
    ids = torch.arange(2 * 12, device=device).view(2, 12) % 7 + 1
    positions = torch.tensor([*range(5), *range(7)], device=device).expand(2, 12)
    other = ids.clone()
    other[:, :5] = 9 - ids[:, :5]
    model.train(False)
    try:
        one, two = (model(input_ids=x, use_cache=False, position_ids=positions).logits[:, 5:] for x in (ids, other))
        apart = torch.allclose(one.float(), two.float(), rtol=1e-3, atol=1e-3 * float(one.float().abs().max()))
    except TypeError:  # it takes no positions
        apart = False
    finally:
        model.train(was_training)
    if not apart:
        raise InputError(
            f"data.mode=pack: {type(model).__name__} with attention {model.config._attn_implementation} sees from one "
            "text of a row into the next: set data.mode to pad, or another model.attention (sdpa, eager)"
        )
