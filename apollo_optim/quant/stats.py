"""What rounding makes of a step: how many codes it changed, and how much of the intended update was realised."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apollo_optim.core.compile import number_on
from apollo_optim.core.matrix import Number
from apollo_optim.core.placements import held
from apollo_optim.core.storage import writes_itself
from apollo_optim.quant import format


class RoundingStats:
    """Sums over the blocks of one weight's step, on its device.

    Attributes (after the step):
        changed: The fraction of codes that are others than before, between 0 and 1.
        realised: <new - old, intended> / <intended, intended>: 1 on average, as rounding is unbiased.
    """

    def __init__(self) -> None:
        self._changed, self._entries = torch.zeros((), dtype=torch.int64), 0
        self._product = self._square = torch.zeros((), dtype=torch.float64)

    def add(self, entries: int, changed: Tensor, product: Tensor, square: Tensor) -> None:
        """Count a block: what `measured` said of it."""
        self._entries += entries
        self._changed = self._changed + changed
        self._product = self._product + product.double()
        self._square = self._square + square.double()

    @property
    def changed(self) -> float:
        return float(self._changed) / max(self._entries, 1)

    @property
    def realised(self) -> float:
        return float(self._product / self._square)

    @property
    def sums(self) -> Tensor:
        """What the figures are made of, (4,) in fp64 on the CPU: codes changed, codes, and the two products."""
        sums = [self._changed.double(), torch.tensor(self._entries, dtype=torch.float64), self._product, self._square]
        return torch.stack([t.cpu() for t in sums])


def figures(found: dict[str, RoundingStats], total: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
    """`changed` and `realised` by name, over all processes: `total` sums a tensor (weights, 4) over them."""
    if not found:
        return {}
    changed, entries, product, square = total(torch.stack([stats.sums for stats in found.values()])).unbind(1)
    rows = zip((changed / entries).tolist(), (product / square).tolist(), strict=True)
    return {name: {"changed": a, "realised": b} for name, (a, b) in zip(found, rows, strict=True)}


def measured(
    old_codes: Tensor,
    old_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    tensor_rn: Tensor,
    factor: Tensor,
    finite: Tensor,
    lr: Number,
    weight_decay: Number,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes changed, <moved, intended> and <intended, intended> of a block: codes and scales before and after."""
    n = tensor_rn.shape[-1]
    lr, weight_decay = (number_on(codes.device, rate) for rate in (lr, weight_decay))
    before, after = (format.unpack(it)[..., :n] for it in (old_codes, codes))
    old_rn, new_rn = (format.dequantised(*it, n, torch.float32) for it in ((old_codes, old_scales), (codes, scales)))
    intended = torch.where(finite, -lr * (weight_decay * old_rn + factor * tensor_rn.float()), 0.0)
    return (before != after).sum(), ((new_rn - old_rn) * intended).sum(), intended.square().sum()


@contextlib.contextmanager
def rounding_stats(model: nn.Module) -> Iterator[dict[str, RoundingStats]]:
    """Count the steps that low-bit weights take within: name -> stats. It costs a fraction of a forward pass.

    Of a sharded weight, those of this process's part (`figures` puts them together).
    """
    weights: dict[str, Any] = {name: held(p) for name, p in model.named_parameters() if writes_itself(p)}
    for p in weights.values():
        p.stats = RoundingStats()
    try:
        yield {name: p.stats for name, p in weights.items()}
    finally:
        for p in weights.values():
            p.stats = None
