"""GaLore: "Memory-Efficient LLM Training by Gradient Low-Rank Projection", Zhao et al., ICML 2024, arXiv 2403.03507."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.matrix import adam_moments, bias_corrections, factors, project, projected_back
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Scalars, Slot, State, Update, knob
from apollo_optim.rules.knobs import BETAS, EPS, number, one_of
from apollo_optim.rules.projected import Projected


@dataclass(frozen=True)
class Galore(Projected):
    """Algorithm 2 of the paper: Adam within a subspace of the small side, the gradient's top r singular vectors P.

    `R = G P`, Adam's moments of R, `N = M / (sqrt(V) + eps)`, `W <- (1 - lr wd) W - lr scale c_t N P^T`, c_t being
    Adam's bias correction. The moments stay as they are when P changes. So that they go on meaning the same, each
    singular vector has a positive largest entry; the authors' code takes the signs as they come.

    When: To compare with the paper. APOLLO at the same rank keeps no basis and needs no decomposition.

    Evidence: galore-torch's step to 4e-7 of its length (`results/parity/rivals.md`). At rank d/4, tuned as hard, it
    ends 3.7 % above AdamW's perplexity, level with APOLLO (`llama-4m`, one seed, `docs/race.md`).
    """

    name: ClassVar[str] = "galore"
    title: ClassVar[str] = "GaLore"
    paper: ClassVar[str] = "arXiv 2403.03507"
    summary: ClassVar[str] = "Adam in the subspace of the gradient's top singular vectors; state 2nr + dr per matrix."
    per_step: ClassVar[frozenset[str]] = frozenset({"betas", "scale"})
    lr: ClassVar[float] = 1e-2

    proj: str = knob(
        one_of("svd", "gaussian", "rademacher"),
        '"svd" (the gradient\'s top singular vectors, kept as state), or random: "gaussian" or "rademacher".',
        "svd",
    )
    scale: float = knob(number(0, above=True), "Multiplies a step (the paper's alpha).", 0.25)
    betas: tuple[float, float] = knob(BETAS, "Decay of the two moments of the projected gradient.", (0.9, 0.999))
    eps: float = knob(EPS, "Added to the root of the uncorrected second moment, as in the papers' code.", 1e-6)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        low_cr = (*shape[:-1], self.rank)
        moments = {"exp_avg": Slot(low_cr, "mean", "channels"), "exp_avg_sq": Slot(low_cr, "square", "channels")}
        return {**moments, **super().slots(shape)}

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        correction1, correction2 = bias_corrections(step, self.betas)
        new1, new2 = (1 - beta for beta in self.betas)
        return {"new1": new1, "new2": new2, "scale": self.scale, "size": correction2 / correction1}

    def observe(self, grad_ck: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        basis = self.basis(grad_ck, state, s, place)
        low_cr = project(grad_ck, basis, self.rank, place)
        exp_avg, exp_avg_sq = adam_moments(low_cr, state["exp_avg"], state["exp_avg_sq"], s["new1"], s["new2"])
        adam_cr = exp_avg / (exp_avg_sq.sqrt() + self.eps)
        new = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq} | ({"basis": basis} if s["phase"] else {})
        return {**new, **self.step_of(grad_ck, low_cr, adam_cr, basis, state, s, place)}

    def step_of(
        self, grad_ck: Tensor, low_cr: Tensor, adam_cr: Tensor, basis: Tensor, state: State, s: Scalars, place: Place
    ) -> dict[str, Tensor]:
        """What `update` needs, of R and N, of this rank's channels."""
        low_c1r, basis_1kr = factors(adam_cr * s["scale"], basis, grad_ck, place)
        return {"low": low_c1r, "high": basis_1kr}

    def update(self, grad_ck: Tensor, state: State, s: Scalars) -> Update:
        return Update(projected_back(state["low"], state["high"]), s["size"])
