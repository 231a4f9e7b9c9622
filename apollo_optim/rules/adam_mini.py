"""Adam-mini: "Use Fewer Learning Rates To Gain More", Zhang et al., ICLR 2025, arXiv 2406.16793."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.compile import in_memory
from apollo_optim.core.matrix import lerp, weighted_squares
from apollo_optim.core.place import Place
from apollo_optim.rules.adamw import AdamW
from apollo_optim.rules.base import Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import count


@dataclass(frozen=True)
class AdamMini(AdamW):
    """AdamW with one second moment for a block of rows: the average of its squared gradients' mean.

    The paper's blocks are a row - an output's neuron, a token of embedding and head - and, of queries and keys, a head:
    `block_rows` is a head's rows there. (A group of their own, as no name says what is a query.) Each of a head's rows
    keeps the head's number, so that rows may be split over ranks anywhere: m numbers a matrix, whatever the blocks.
    Norms and biases, one block each in the paper, use AdamW.

    When: Half of AdamW's state at AdamW's rates.

    Evidence: The authors' step to 2e-7 of its length (`results/parity/rivals.md`). It steps the head of `lite`
    and `nano` (`docs/race.md`); no run of it alone is in the logs yet, the race has it in its queue.
    """

    name: ClassVar[str] = "adam-mini"
    title: ClassVar[str] = "Adam-mini"
    paper: ClassVar[str] = "arXiv 2406.16793"
    summary: ClassVar[str] = "AdamW with one second moment a row; state dn + m per matrix."
    view: ClassVar = "matrix"
    stacks: ClassVar = True

    block_rows: int = knob(count(1), "Neighbouring rows that share a second moment: a head's, of queries and keys.", 1)

    def applies(self, shape: tuple[int, ...]) -> bool:
        return shape[-2] % self.block_rows == 0

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        rows = Slot((*shape[:-1], 1), split="rows")  # fp32 whatever the group asks for: they are few
        return {"exp_avg": Slot(shape, "mean"), "exp_avg_sq_row": rows}

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        mean_m1 = weighted_squares(grad, None, place, -1) / place.shape[-1]
        if self.block_rows > 1:
            rows = place.along(-1)
            every_m1 = rows.whole(mean_m1)
            blocks = every_m1.reshape(*every_m1.shape[:-2], -1, self.block_rows).mean(-1, keepdim=True)
            mean_m1 = rows.part_of(blocks.expand(*blocks.shape[:-1], self.block_rows).reshape(every_m1.shape), mean_m1)
        return {"exp_avg_sq_row": lerp(state["exp_avg_sq_row"], mean_m1, s["new2"])}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        m = lerp(state["exp_avg"], grad, s["new1"])
        factor = 1 / (state["exp_avg_sq_row"].sqrt() * in_memory(1 / s["c2"]) + self.eps)
        return Update(m, factor * (1 / s["c1"]), {"exp_avg": m})
