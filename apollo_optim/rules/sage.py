"""SAGE: "Sign-Adaptive Gradient for Memory-Efficient LLM Optimization", Lee and Kim, Findings of ACL 2026, arXiv
2604.07663."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.blocks import Block
from apollo_optim.core.compile import in_memory
from apollo_optim.core.matrix import lerp, sum_blocks
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import EPS
from apollo_optim.rules.lion import Lion


@dataclass(frozen=True)
class Sage(Lion):
    """Lion, with columns damped whose gradients are larger than the others': a rule for an embedding.

    `s` is the mean of |G| over rows (tokens), one number a column; `S` its average (beta2, corrected for its start).
    `H = min(rms(S) / (S + eps), rms(s) / (s + eps), 1)`,
    `W <- (1 - lr wd) W - lr H sign(beta1 M + (1 - beta1) G)`, `M <- beta2 M + (1 - beta2) G`.
    The paper takes it for the embedding and SinkGD for the matrices.

    When: An embedding with half of AdamW's state: `sinkgd+sage`.

    Evidence: The paper's step in fp64; of columns alike it is Lion (`tests/rules/test_more_rivals.py`). No quality run
    of it is in the logs yet; the race (`docs/race.md`) has it in its queue.
    """

    name: ClassVar[str] = "sage"
    title: ClassVar[str] = "SAGE"
    paper: ClassVar[str] = "arXiv 2604.07663"
    summary: ClassVar[str] = "Lion, columns with larger gradients damped; state dn + n per matrix."
    view: ClassVar = "matrix"
    lr: ClassVar[float] = 1e-3

    eps: float = knob(EPS, "Added to a column's size.", 1e-8)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        *batch, _, n = shape
        return {**super().slots(shape), "size": Slot((*batch, 1, n), split="columns")}

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        return {**super().scalars(step, shape), "correction": 1 - self.beta2**step}

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        *_, m, n = place.shape
        columns = place.along(-2)

        def sizes(block: Tensor, _: Block) -> Tensor:
            return block.float().abs()

        def damped(size_1n: Tensor) -> Tensor:
            """The mean of the columns' sizes, and how much of it one of them is."""
            rms_11 = (columns.sum(size_1n.square().sum(-1, keepdim=True), -1) / n).sqrt()
            return rms_11 / (size_1n + self.eps)

        now_1n = in_memory(sum_blocks(sizes, grad, place, -2) / m)
        size_1n = in_memory(lerp(state["size"], now_1n, s["new"]))
        damper = damped(size_1n / s["correction"]).minimum(damped(now_1n)).clamp(max=1.0)
        return {"size": size_1n, "damper": in_memory(damper)}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        lion = super().update(grad, state, s)
        return Update(lion.tensor, state["damper"], lion.state)
