"""SlimAdam: "When Can You Get Away with Low Memory Adam?", Kalra et al., arXiv 2503.01843."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.compile import in_memory
from apollo_optim.core.matrix import lerp, weighted_squares
from apollo_optim.core.place import Place
from apollo_optim.rules.adamw import AdamW
from apollo_optim.rules.base import Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import SWITCH, one_of


@dataclass(frozen=True)
class SlimAdam(AdamW):
    """AdamW with one second moment for a row or for a column: the average of its squared gradients' mean.

    The paper finds where a mean loses nothing: rows (outputs) of queries and keys and the tokens of embedding and head,
    columns (inputs) of values, outputs, up, gate and down projections. By rows and with its average it is Adam-mini.
    Without it (`averaged=False`, ours) the gradient itself is stepped, and what is kept is a number a row.

    When: Embedding and head where memory is short: `embedding="slimadam", averaged=False` keeps a number a token.

    Evidence: The paper's step in fp64 (`tests/rules/test_rivals.py`). Without its average it steps the
    embedding of `lite` and `nano` (`docs/race.md`); no run of it alone is in the logs yet, the race has it
    in its queue.
    """

    name: ClassVar[str] = "slimadam"
    title: ClassVar[str] = "SlimAdam"
    paper: ClassVar[str] = "arXiv 2503.01843"
    summary: ClassVar[str] = "AdamW with one second moment a row or a column; state dn + m (or n) per matrix."
    view: ClassVar = "matrix"
    stacks: ClassVar = True

    share: str = knob(
        one_of("rows", "columns"), "What has one second moment: an output (a token), or an input.", "rows"
    )
    averaged: bool = knob(
        SWITCH, "Keep the gradient's average. Otherwise the gradient is stepped, as in RMSprop.", True
    )

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        *batch, m, n = shape  # the second moments are in fp32 whatever the group asks for: they are few
        shared = Slot((*batch, m, 1), split="rows") if self.share == "rows" else Slot((*batch, 1, n), split="columns")
        return ({"exp_avg": Slot(shape, "mean")} if self.averaged else {}) | {"exp_avg_sq_shared": shared}

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        dim = -1 if self.share == "rows" else -2
        mean = weighted_squares(grad, None, place, dim) / place.shape[dim]
        return {"exp_avg_sq_shared": lerp(state["exp_avg_sq_shared"], mean, s["new2"])}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        factor = 1 / (state["exp_avg_sq_shared"].sqrt() * in_memory(1 / s["c2"]) + self.eps)
        if not self.averaged:
            return Update(grad, factor)
        m = lerp(state["exp_avg"], grad, s["new1"])
        return Update(m, factor * (1 / s["c1"]), {"exp_avg": m})

    def describe(self) -> str:
        return f"{self.title} ({self.share}{'' if self.averaged else ', no average'})"
