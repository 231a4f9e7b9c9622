"""RMNP: "RMNP: Row-Momentum Normalized Preconditioning for Scalable Matrix-Based Optimization", Deng et al., ICML 2026.

arXiv 2603.20527.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.matrix import lerp
from apollo_optim.rules.base import Scalars, knob, preset
from apollo_optim.rules.knobs import SWITCH, one_of
from apollo_optim.rules.scale import Scale


@dataclass(frozen=True)
class Rmnp(Scale):
    """Muon, with each row of the momentum divided by its norm in the place of Newton-Schulz.

    `M <- b M + (1 - b) G`, `W <- (1 - lr wd) W - lr size M_i / ||M_i||` of every row i, an output. That is SCALE's step
    on a momentum of every matrix, with Muon's size: RMS 0.2, as AdamW's is about, so that rates can be compared. A row
    that is all noise is stepped as far as any other, so that the best rate is below Muon's.

    When: Where Muon is and its matmuls are too slow; search a lower rate than Muon's.

    Evidence: The paper's step (`tests/rules/test_rivals.py`). No quality run of it is in the logs yet; the race
    (`docs/race.md`) has it in its queue.
    """

    name: ClassVar[str] = "rmnp"
    title: ClassVar[str] = "RMNP"
    paper: ClassVar[str] = "arXiv 2603.20527"
    summary: ClassVar[str] = "The gradient's average, each row brought to one size; state dn per matrix."

    momentum: float = preset(Scale, "momentum", 0.95)
    nesterov: bool = knob(SWITCH, "Mix this gradient in once more.", False)
    size: str = knob(
        one_of("match_rms_adamw", "original"),
        '"match_rms_adamw": a row has RMS 0.2; "original": norm 1, the paper\'s.',
        "match_rms_adamw",
    )

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        along = shape[-1] if self.normalize == "rows" else shape[-2]
        size = 0.2 if self.size == "match_rms_adamw" else along**-0.5
        return {**super().scalars(step, shape), "momentum": self.momentum, "size": size}

    def direction(self, grad: Tensor, average: Tensor, s: Scalars) -> Tensor:
        return lerp(grad, average, s["momentum"]) if self.nesterov else average
