"""SCALE, arXiv 2506.16659: the gradient itself, its rows (or columns) brought to one size."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.blocks import Block
from apollo_optim.core.matrix import TINY, lerp, sum_blocks
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Rule, Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import BETA, one_of


@dataclass(frozen=True)
class Scale(Rule):
    """The gradient, or its momentum, with every row (or every column) brought to an RMS of 1.

    The paper's: rows, one per output, for every matrix; the head after a momentum of 0.9; an embedding's columns, along
    its vocabulary. No bias correction: what is normalised has no size.

    When: No state is to be kept but the head's momentum. Rates are far below AdamW's: search them.

    Evidence: As the rule of embedding and head together with APOLLO: +14.5 % perplexity, one seed (`docs/rest.md`). The
    step is the paper's (`tests/optim/test_rest.py`). Of everything, as the paper has it, 19.6 % above AdamW
    (`llama-4m`, one seed, `docs/race.md`).
    """

    name: ClassVar[str] = "scale"
    title: ClassVar[str] = "SCALE"
    paper: ClassVar[str] = "arXiv 2506.16659"
    summary: ClassVar[str] = "The gradient, each row brought to one size; state 0, or dn with a momentum."
    view: ClassVar = "matrix"
    stacks: ClassVar = True
    by_kind: ClassVar = {
        "embedding": {"normalize": "columns"},
        "head": {"normalize": "rows", "momentum": 0.9},
        "others": {"normalize": "rows"},
    }

    normalize: str = knob(one_of("rows", "columns"), "What is brought to an RMS of 1.", "rows")
    momentum: float = knob(BETA, "Decay of the gradient's average, which is normalised instead of it; 0: none.", 0.0)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {"exp_avg": Slot(shape, "mean")} if self.momentum else {}

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        return {"new": 1 - self.momentum, "size": 1.0}

    def observe(self, grad: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        dim = -1 if self.normalize == "rows" else -2

        def squares(block: Tensor, at: Block) -> Tensor:
            square = self.direction(block, self._average(block, state.at(at), s), s).square()
            # rows in two halves: torch 2.13 for CPUs cannot compile one sum over a row of what is written back, too
            halves = (*square.shape[:-1], 2, square.shape[-1] // 2)
            return square.reshape(halves).sum(-1) if dim == -1 and square.shape[-1] % 2 == 0 else square

        return {"mean_square": sum_blocks(squares, grad, place, dim) / place.shape[dim]}

    def update(self, grad: Tensor, state: State, s: Scalars) -> Update:
        average = self._average(grad, state, s)
        factor = s["size"] / (state["mean_square"].sqrt() + TINY)
        return Update(self.direction(grad, average, s), factor, {"exp_avg": average} if self.momentum else {})

    def direction(self, grad: Tensor, average: Tensor, s: Scalars) -> Tensor:
        """What is normalised, fp32."""
        return average

    def _average(self, grad: Tensor, state: State, s: Scalars) -> Tensor:
        return lerp(state["exp_avg"], grad, s["new"]) if self.momentum else grad.float()

    def describe(self) -> str:
        return f"{self.title} ({self.normalize}{f', momentum {self.momentum:g}' if self.momentum else ''})"
