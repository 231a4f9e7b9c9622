"""What rounding makes of a step: how many codes it changed, and how much of the intended update was realised."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from apollo_optim.core.storage import writes_itself
from apollo_optim.quant import format


class Tally:
    """Sums over the blocks of one weight's step, on its device.

    Attributes (after the step):
        changed: The fraction of codes that are others than before, between 0 and 1.
        realised: <new - old, intended> / <intended, intended>: 1 on average, as rounding is unbiased.
    """

    def __init__(self) -> None:
        self._changed, self._entries = torch.zeros((), dtype=torch.int64), 0
        self._product = self._square = torch.zeros((), dtype=torch.float64)

    def add(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], intended_rn: Tensor) -> None:
        """Count a block: codes and scales before and after, and the update it was to be, fp32."""
        n = intended_rn.shape[-1]
        before, after = (format.unpack(codes)[..., :n] for codes, _ in (old, new))
        self._changed = self._changed + (before != after).sum()
        self._entries += intended_rn.numel()
        moved = format.dequantised(*new, n, torch.float32) - format.dequantised(*old, n, torch.float32)
        self._product = self._product + (moved * intended_rn).sum(dtype=torch.float64)
        self._square = self._square + intended_rn.square().sum(dtype=torch.float64)

    @property
    def changed(self) -> float:
        return float(self._changed) / max(self._entries, 1)

    @property
    def realised(self) -> float:
        return float(self._product / self._square)


@contextlib.contextmanager
def tallied(model: nn.Module) -> Iterator[dict[str, Tally]]:
    """Count the steps that low-bit weights take within: name -> tally. It costs a fraction of a forward pass."""
    weights = {name: p for name, p in model.named_parameters() if writes_itself(p)}
    for p in weights.values():
        p.tally = Tally()  # type: ignore[attr-defined]
    try:
        yield {name: p.tally for name, p in weights.items()}  # type: ignore[attr-defined]
    finally:
        for p in weights.values():
            p.tally = None  # type: ignore[attr-defined]
