"""Fira: "Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", Chen et al., arXiv 2410.01623."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.blocks import Block, part
from apollo_optim.core.matrix import channel_norms, factors, limit_growth, projected_back, ratio, sum_blocks
from apollo_optim.core.place import Place
from apollo_optim.rules.apollo import Apollo
from apollo_optim.rules.base import Scalars, Slot, State, Update, preset
from apollo_optim.rules.galore import Galore


@dataclass(frozen=True)
class Fira(Galore):
    """Algorithm 1 of the paper: GaLore, and what its subspace leaves out of the gradient, stretched as Adam would.

    Of each channel (a row or a column, along the longer side) `phi = ||N|| / ||R||` is how much Adam stretches what it
    sees. `S = limit(phi (G - R P^T))`, whose norm may grow by 1 % a step, and
    `W <- (1 - lr wd) W - lr c_t (scale N P^T + S)`. The paper's residual is this one; the authors' code (fira 1.0.2)
    takes scale R P^T off the gradient instead of R P^T.

    When: To compare with the paper; a step of full rank at GaLore's state.

    Evidence: The authors' step to 3e-7 of its length, with their residual (`results/parity/rivals.md`). No quality
    run of it is in the logs yet; the race (`docs/race.md`) has it in its queue.
    """

    name: ClassVar[str] = "fira"
    title: ClassVar[str] = "Fira"
    paper: ClassVar[str] = "arXiv 2410.01623"
    summary: ClassVar[str] = "GaLore, and the gradient's rest rescaled by channel; state 2nr + dr + 1 per matrix."

    norm_growth: float | None = preset(Apollo, "norm_growth", 1.01)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        return {**super().slots(shape), "prev_norm": Slot(shape[:-2])}

    def step_of(
        self, grad_ck: Tensor, low_cr: Tensor, adam_cr: Tensor, basis: Tensor, state: State, s: Scalars, place: Place
    ) -> dict[str, Tensor]:
        low_c1r, basis_1kr = factors(low_cr, basis, grad_ck, place)
        phi_c1 = place.from_channels(ratio(channel_norms(adam_cr), channel_norms(low_cr)))

        def squares(block: Tensor, at: Block) -> Tensor:
            return (block.float() - projected_back(part(low_c1r, at), part(basis_1kr, at))).square()

        rest_c1 = phi_c1.square() * sum_blocks(squares, grad_ck, place, -1)
        new = {}
        if self.norm_growth is not None:
            norm = place.along(-1).sum(rest_c1.sum(-2, keepdim=True), -2).sqrt()[..., 0, 0]
            limit, new["prev_norm"] = limit_growth(norm, state["prev_norm"], self.norm_growth)
            phi_c1 = phi_c1 * limit[..., None, None]
        # scale N P^T + phi (G - R P^T) in one product
        low_c1r = place.from_channels(adam_cr * s["scale"]).unsqueeze(-2) - phi_c1.unsqueeze(-1) * low_c1r
        return {**new, "low": low_c1r, "high": basis_1kr, "factor": phi_c1}

    def update(self, grad_ck: Tensor, state: State, s: Scalars) -> Update:
        rest = grad_ck.float() * state["factor"]
        return Update(rest + projected_back(state["low"], state["high"]), s["size"])
