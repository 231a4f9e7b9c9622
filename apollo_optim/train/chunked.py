"""Cross entropy without logits: a head's product with a part of the vocabulary at a time.

The logits of a micro-batch, tokens x vocabulary, are three times in memory while their loss is differentiated; with a
vocabulary of 128,000 nothing else is as large. Here a part of them is made, used and forgotten; backward makes it anew.
The vocabulary is cut and not the tokens: so every row of the head's gradient is one product, rounded once. Cut by
tokens it would be a sum of roundings in the weight's dtype, or a second gradient in fp32. What is added up over the
parts, in fp32, is the gradient of the hidden states: in bf16 it is rounded once as a part and once as a whole.

Shapes in this file: t tokens, d entries of a hidden state, v of the vocabulary, c of a part of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from apollo_optim.core.place import is_sharded
from apollo_optim.quant import LowBitWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

How = Literal["auto", "full", "chunked"]
LOGITS = 1 << 24  # "auto" lets logits have so many entries (64 MiB in fp32), and so many has a part of them


class Unmade(Tensor):
    """Logits that nobody has looked at yet: the head and its input. Any operation on them makes them, once."""

    hidden: Tensor
    head: nn.Linear
    made: Tensor | None = None

    @staticmethod
    def __new__(cls, hidden: Tensor, head: nn.Linear) -> Unmade:
        shape = (*hidden.shape[:-1], head.out_features)
        self: Unmade = Tensor._make_wrapper_subclass(cls, shape, dtype=hidden.dtype, device=hidden.device)
        self.hidden, self.head = hidden, head
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def made(x: Any) -> Any:
            if not isinstance(x, Unmade):
                return x
            if x.made is None:
                x.made = F.linear(x.hidden, x.head.weight)
            return x.made

        return func(*tree_map(made, args), **tree_map(made, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return NotImplemented  # an error: what comes here has gone past the logits' making


@contextlib.contextmanager
def unmade_logits(model: PreTrainedModel, how: How) -> Iterator[None]:
    """Within it the model's head hands its input on as `Unmade`: always if "chunked", for large logits if "auto".

    What comes out of the model is still unmade only if the model does nothing with its logits: a soft cap, a scale or a
    mask makes them. Heads that are more than a product (a bias, another class, hooks in place of `forward`) are left
    alone, and so is a model that is compiled together with its head.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if how == "full" or model._compiled_call_impl is not None or not _is_product(head):
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        large = hidden.shape[:-1].numel() * head.out_features > LOGITS
        return Unmade(hidden, head) if large or how == "chunked" else F.linear(hidden, head.weight)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _is_product(head: nn.Module | None) -> bool:
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return False
    return not is_sharded(head.weight)


def summed_cross_entropy(logits: Unmade, targets: Tensor) -> Tensor:
    """In fp32, summed over the targets that are not negative. The head gets one gradient, as from its product."""
    loss: Tensor = _SummedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits.hidden.flatten(0, -2), logits.head.weight, targets.flatten()
    )
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_td: Tensor, weight_vd: Tensor, target_t: Tensor) -> Tensor:
        log_sum_t = torch.full(target_t.shape, -math.inf, dtype=torch.float32, device=hidden_td.device)
        picked_t = torch.zeros_like(log_sum_t)
        for part in _parts(hidden_td, weight_vd):
            logits_tc = (hidden_td @ _rows(weight_vd, part).mT).float()
            log_sum_t = torch.logaddexp(log_sum_t, logits_tc.logsumexp(1))
            here_t1, column_t1 = _within(part, target_t)
            picked_t += torch.where(here_t1, logits_tc.gather(1, column_t1), 0.0).squeeze(1)
        ctx.save_for_backward(hidden_td, weight_vd, target_t, log_sum_t)
        return torch.where(target_t >= 0, log_sum_t - picked_t, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden_td, weight_vd, target_t, log_sum_t = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        counts_t1 = ((target_t >= 0) * grad).unsqueeze(1)
        grad_hidden = torch.zeros_like(hidden_td, dtype=torch.float32) if of_hidden else None
        grad_weight = torch.empty(weight_vd.shape, dtype=weight_vd.dtype, device=grad.device) if of_weight else None
        for part in _parts(hidden_td, weight_vd):
            rows_cd = _rows(weight_vd, part)
            grad_tc = (hidden_td @ rows_cd.mT).float().sub_(log_sum_t.unsqueeze(1)).exp_()
            here_t1, column_t1 = _within(part, target_t)
            grad_tc.scatter_add_(1, column_t1, -here_t1.float())
            grad_tc = grad_tc.mul_(counts_t1).to(hidden_td.dtype)
            if grad_hidden is not None:
                grad_hidden += grad_tc @ rows_cd
            if grad_weight is not None:
                torch.mm(grad_tc.mT, hidden_td, out=grad_weight[part])
        return None if grad_hidden is None else grad_hidden.to(hidden_td.dtype), grad_weight, None


def _parts(hidden_td: Tensor, weight_vd: Tensor) -> list[slice]:
    """The vocabulary, cut so that a part's logits have about `LOGITS` entries."""
    entries, wide = weight_vd.shape[0], max(64, LOGITS // max(1, len(hidden_td)) // 64 * 64)
    return [slice(first, min(first + wide, entries)) for first in range(0, entries, wide)]


def _rows(weight: Tensor, part: slice) -> Tensor:
    return weight.dequantize(rows=part) if isinstance(weight, LowBitWeight) else weight[part]


def _within(part: slice, target_t: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets are in this part of the vocabulary, and in which column of it (the others: in any)."""
    column_t1 = (target_t - part.start).unsqueeze(1)
    size = part.stop - part.start
    return (column_t1 >= 0) & (column_t1 < size), column_t1.clamp(0, size - 1)
