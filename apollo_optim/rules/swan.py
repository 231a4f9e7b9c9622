"""SWAN: "SGD with Normalization and Whitening Enables Stateless LLM Training", Ma et al., arXiv 2412.13148."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.linalg import vector_norm

from apollo_optim.core.matrix import TINY, orthogonalise
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Rule, Scalars, State, Update, knob, preset
from apollo_optim.rules.knobs import EPS
from apollo_optim.rules.muon import Muon


@dataclass(frozen=True)
class Swan(Rule):
    """The gradient itself, its rows standardised, then whitened: `S = (G - mean) / std` of every row, an output,
    `O = (S S^T)^-1/2 S` by Newton-Schulz, `W <- (1 - lr wd) W - lr O ||S|| / ||O||`.

    A step has an RMS of 1. The Newton-Schulz iteration is Muon's, after which singular values are between 0.7 and 1.2.

    When: To compare with: it keeps nothing, and takes Muon's time.

    Evidence: The paper's step with exact singular vectors (`tests/rules/test_rivals.py`). No quality run of it is in
    the logs yet; the race (`docs/race.md`) has it in its queue.
    """

    name: ClassVar[str] = "swan"
    title: ClassVar[str] = "SWAN"
    paper: ClassVar[str] = "arXiv 2412.13148"
    summary: ClassVar[str] = "The gradient, its rows standardised, then whitened; state 0."
    view: ClassVar = "matrix"
    lr: ClassVar[float] = 4e-4

    steps: int = preset(Muon, "steps", 5)
    precision: str = preset(Muon, "precision", "float32")
    eps: float = knob(EPS, "Added to a row's standard deviation.", 1e-8)

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        rows = place.whole(grad).float()
        centred = rows - rows.mean(-1, keepdim=True)
        standard = centred / (centred.square().mean(-1, keepdim=True).sqrt() + self.eps)
        white = orthogonalise(standard, self.steps, TINY, self.precision).float()
        size, had = (vector_norm(x, dim=(-2, -1), keepdim=True) for x in (standard, white))
        return {"white": place.part_of(white * (size / (had + TINY)), grad)}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        return Update(state["white"])
