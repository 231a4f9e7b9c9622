"""Q-GaLore: "Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients", Zhang et al., 2024, arXiv
2407.08296."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apollo_optim.core.matrix import svd_basis
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Scalars, Slot, State, knob
from apollo_optim.rules.galore import Galore
from apollo_optim.rules.knobs import count, number, one_of


@dataclass(frozen=True)
class QGalore(Galore):
    """GaLore with its basis in 4 bits, its moments in 8, and fewer refreshes for matrices whose subspace stays.

    A refresh is due every `update_proj_gap` steps at first. When `alike` of them in a row brought a basis whose cosine
    similarity to the one before (of all entries) is `threshold` or more, the matrix waits twice as long from then on.
    State is always stored so, whatever the group's `state_dtype`, where it fits. The paper has its weights in 8 bits,
    too: `quantize_weights(model, 8)`, or `quant.bits: 8` in a run file.

    When: To compare with the paper. Q-APOLLO-Mini needs less and no decomposition.

    Evidence: GaLore's step but for the rounding, and the intervals of the paper (`tests/rules/test_more_rivals.py`). No
    quality run of it is in the logs yet; the race (`docs/race.md`) has it in its queue.
    """

    name: ClassVar[str] = "q-galore"
    title: ClassVar[str] = "Q-GaLore"
    paper: ClassVar[str] = "arXiv 2407.08296"
    summary: ClassVar[str] = "GaLore, its basis in 4 bits and rarely refreshed; state 2nr bytes + dr/2 per matrix."

    proj: str = knob(one_of("svd"), "The gradient's top singular vectors, kept as state.", "svd")
    threshold: float = knob(number(0, below=1), "Cosine similarity from which on a basis is like the last one.", 0.4)
    alike: int = knob(count(1), "So many such refreshes in a row double a matrix's interval.", 1)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        slots = super().slots(shape)
        moments = {name: slots[name]._replace(codec="8bit") for name in ("exp_avg", "exp_avg_sq")}
        counter = Slot(shape[:-2], split="whole")
        basis = slots["basis"]._replace(kind="mean", start="zeros", codec="4bit")  # zeros: the first is like none
        return {**moments, "basis": basis, "waits": counter, "in_a_row": counter, "doublings": counter}

    def observe(self, grad_ck: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        if not s["phase"]:
            return super().observe(grad_ck, state, s, place)
        old_kr, waits, in_a_row, doublings = (state[name] for name in ("basis", "waits", "in_a_row", "doublings"))
        due = waits < 1
        basis_kr = old_kr
        if torch.compiler.is_compiling() or due.is_meta or bool(due.any()):  # eagerly none is made that is not due
            fresh_kr = svd_basis(place.whole(grad_ck), self.rank)
            basis_kr = torch.where(due[..., None, None], fresh_kr, old_kr)
        sizes = (basis_kr.square().sum((-2, -1)) * old_kr.square().sum((-2, -1))).sqrt()
        like = (basis_kr * old_kr).sum((-2, -1)) >= self.threshold * sizes.clamp(min=1e-30)
        row = torch.where(due, (in_a_row + 1) * like, in_a_row)
        doublings = doublings + (row >= self.alike)
        new = {
            "doublings": doublings,
            "in_a_row": row * (row < self.alike),
            "waits": torch.where(due, doublings.exp2() - 1, waits - 1),
        }
        return {
            **super().observe(grad_ck, state.with_seen({"basis": basis_kr}), {**s, "phase": None}, place),
            **new,
            "basis": basis_kr,
        }
