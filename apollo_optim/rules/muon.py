"""Muon: the momentum of a matrix, orthogonalised.

"Muon: An optimizer for hidden layers in neural networks", Jordan et al., 2024; its size as in "Muon is Scalable for LLM
Training", Liu et al., arXiv 2502.16982.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.matrix import lerp, orthogonalise
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Rule, Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import BETA, EPS, SWITCH, count, one_of


@dataclass(frozen=True)
class Muon(Rule):
    """torch.optim.Muon's arithmetic, in fp32: five Newton-Schulz steps on a (Nesterov) average of the gradient.

    `W <- (1 - lr wd) W - lr size O`, O near the orthogonal matrix that is nearest to the average. The size makes the
    RMS of a step 0.2, as AdamW's is about, so that AdamW's learning rates serve; or it is the original's.

    With `stateless` the average is left out (ours): the gradient of one step is orthogonalised, and nothing is kept.

    When: Hidden matrices, with AdamW for embedding and head (`muon+adamw`), where half of AdamW's state is
    affordable; `full`, `lite` and `nano` keep less.

    Evidence: torch.optim.Muon's step within its own noise (`tests/rules/test_parity.py`). With its
    momentum in 8 bits (`full`; 8 bits lose nothing at 2.7B in arXiv 2509.23106) it ends 18 to 26 % below AdamW's
    perplexity at 4,096 tokens a step, on models of up to ten million parameters; with 4 bits (`lite`) 20 to
    25 % and stateless (`nano`) 13 to 14 % below it (`docs/race.md`).
    """

    name: ClassVar[str] = "muon"
    title: ClassVar[str] = "Muon"
    paper: ClassVar[str] = "arXiv 2502.16982"
    summary: ClassVar[str] = "The gradient's average, orthogonalised; state dn per matrix, or 0 if stateless."
    view: ClassVar = "matrix"
    per_step: ClassVar[frozenset[str]] = frozenset({"momentum"})
    idle: ClassVar = MappingProxyType({"stateless": frozenset({"momentum", "nesterov"})})
    lr: ClassVar[float] = 2e-3

    momentum: float = knob(BETA, "Decay of the gradient's average.", 0.95)
    nesterov: bool = knob(SWITCH, "Mix this gradient in once more.", True)
    stateless: bool = knob(SWITCH, "Orthogonalise the gradient itself: no average is kept, momentum is unused.", False)
    steps: int = knob(count(1), "Newton-Schulz steps.", 5)
    size: str = knob(
        one_of("match_rms_adamw", "original"),
        '"match_rms_adamw": 0.2 sqrt(max(m, n)); "original": sqrt(max(1, m / n)), for m outputs and n inputs.',
        "match_rms_adamw",
    )
    precision: str = knob(
        one_of("float32", "bfloat16"),
        'Of the Newton-Schulz matmuls. "bfloat16", the original\'s, is many times as fast on a GPU and on a CPU with '
        "bf16 units; processors round it differently, and compiled is then not eager.",
        "float32",
    )
    eps: float = knob(EPS, "The least norm that a matrix is divided by.", 1e-7)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {} if self.stateless else {"exp_avg": Slot(shape, "mean")}

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        *_, m, n = shape
        size = 0.2 * max(m, n) ** 0.5 if self.size == "match_rms_adamw" else max(1.0, m / n) ** 0.5
        return {"new": 1 - self.momentum, "momentum": self.momentum, "size": size}

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        kept = {} if self.stateless else {"exp_avg": lerp(state["exp_avg"], grad, s["new"])}
        average = kept.get("exp_avg", grad)
        mixed = lerp(grad, average, s["momentum"]) if kept and self.nesterov else average
        orthogonal = orthogonalise(place.whole(mixed), self.steps, self.eps, self.precision)
        return {**kept, "orthogonal": place.part_of(orthogonal, grad)}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        return Update(state["orthogonal"], s["size"])

    def describe(self) -> str:
        return f"{self.title}{', stateless' if self.stateless else ''}"
