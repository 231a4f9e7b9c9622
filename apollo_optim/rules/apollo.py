"""APOLLO: the gradient itself, each channel rescaled as Adam would have rescaled its random sketch.

"APOLLO: SGD-like Memory, AdamW-level Performance", Zhu et al., MLSys 2025, arXiv 2412.05270.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apollo_optim.core.matrix import (
    adam_moments,
    bias_corrections,
    channel_norms,
    limit_growth,
    matrix_norm,
    project_with_norms,
    ratio,
)
from apollo_optim.core.place import Place
from apollo_optim.rules.base import Scalars, Slot, State, Update, knob, preset
from apollo_optim.rules.knobs import BETAS, EPS, SWITCH, either, number, one_of
from apollo_optim.rules.projected import Projected


@dataclass(frozen=True)
class Apollo(Projected):
    """Algorithm 1 of the paper, with the limiter folded into one factor per channel (or per tensor).

    The moments of Adam are kept for R = G P alone, the gradient's random sketch of r columns. What they say about each
    channel (a row or a column, along the longer side) - how much Adam would have stretched it, s = ||N|| / ||R||
    (eq. 5) - is applied to the gradient itself: `W <- (1 - lr wd) W - lr sqrt(scale) c_t limit(s G)`, where c_t is
    Adam's bias correction. Nothing is projected back, so a step has full rank.

    When: Optimizer state does not fit, from scratch or in full fine-tuning, and a rank is affordable: at d/4 it
    keeps a quarter of AdamW's moments of a square matrix. Think of embedding and head then, too (`docs/rest.md`).

    Evidence: `llama-4m`, AdamW tuned as hard: +3.7 % perplexity at rank d/4 (one seed, `docs/race.md`); by the race's
    former protocol +3.4 % (three seeds, +2.5 to +4.0 %), +5.2 % at d/8 (`results/README.md`). The step is
    apollo-torch's to 6e-7 of its length (`results/parity.md`).
    """

    name: ClassVar[str] = "apollo"
    title: ClassVar[str] = "APOLLO"
    paper: ClassVar[str] = "arXiv 2412.05270"
    summary: ClassVar[str] = (
        "The gradient, each channel rescaled as Adam would have rescaled its random sketch; state 2nr per matrix."
    )
    stacks: ClassVar = True
    per_step: ClassVar[frozenset[str]] = frozenset({"betas"})
    lr: ClassVar[float] = 1e-2

    scale: float | str = knob(
        either("auto", number(0, above=True), "d / rank"),
        "Its square root multiplies a step (the paper's alpha). A sketch of r columns underestimates s by sqrt(r / d) "
        '(theorem 4.2); "auto" undoes that with d / r.',
        1.0,
    )
    scale_type: str = knob(
        one_of("channel", "tensor"),
        "One factor for each channel, or one for the whole matrix (APOLLO-Mini).",
        "channel",
    )
    scale_front: bool = knob(
        SWITCH,
        "Scale before the limiter instead of after it. The limiter is homogeneous: only roundings differ.",
        False,
    )
    norm_growth: float | None = knob(
        either(None, number(1), "no limit"),
        "A step's norm may be at most this times the one before (Fira's limiter).",
        1.01,
    )
    betas: tuple[float, float] = knob(BETAS, "Decay of the two moments of the sketch.", (0.9, 0.999))
    eps: float = knob(EPS, "Added to the root of the uncorrected second moment, as in the papers' code.", 1e-6)

    def slots(self, shape: tuple[int, ...]) -> dict[str, Slot]:
        *stack, c, _ = shape
        low_cr = (*stack, c, self.rank)
        return {
            "exp_avg": Slot(low_cr, "mean", "channels"),
            "exp_avg_sq": Slot(low_cr, "square", "channels"),
            "prev_norm": Slot(tuple(stack)),
            **super().slots(shape),
        }

    def scalars(self, step: int, shape: tuple[int, ...]) -> dict[str, float]:
        alpha = float(shape[-1] / self.rank if self.scale == "auto" else self.scale) ** 0.5
        correction1, correction2 = bias_corrections(step, self.betas)
        return {
            "new1": 1 - self.betas[0],
            "new2": 1 - self.betas[1],
            "size": alpha * correction2 / correction1,
            "front": alpha,
        }

    def observe(self, grad_ck: Tensor, state: State, s: Scalars, place: Place) -> dict[str, Tensor]:
        channels = place.channels
        basis = self.basis(grad_ck, state, s, place)
        low_cr, low_c1, grad_c1 = project_with_norms(grad_ck, basis, self.rank, place)
        exp_avg, exp_avg_sq = adam_moments(low_cr, state["exp_avg"], state["exp_avg_sq"], s["new1"], s["new2"])
        adam_c1 = channel_norms(exp_avg / (exp_avg_sq.sqrt() + self.eps))

        if self.scale_type == "tensor":
            factor = ratio(matrix_norm(adam_c1, channels), matrix_norm(low_c1, channels))[..., None, None]
        else:
            factor = ratio(adam_c1, low_c1)
        new = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad_norm": matrix_norm(grad_c1, channels)}
        if self.norm_growth is not None:
            norm = matrix_norm(factor * grad_c1, channels)
            norm = norm * s["front"] if self.scale_front else norm
            limit, new["prev_norm"] = limit_growth(norm, state["prev_norm"], self.norm_growth)
            factor = factor * limit[..., None, None]
        if s["phase"]:
            new["basis"] = basis
        factor = factor * s["size"]
        return {**new, "factor": factor if self.scale_type == "tensor" else place.from_channels(factor)}

    def update(self, grad_ck: Tensor, state: State, s: Scalars) -> Update:
        return Update(grad_ck, state["factor"])


@dataclass(frozen=True)
class ApolloMini(Apollo):
    """APOLLO-Mini (section 4.3): one factor for the whole matrix, for which a sketch of one column is enough.

    `scale` 128 is the papers' for 60M and 130M and all fine-tuning; as one column is cheap, `proj` is "gaussian".

    When: Memory for next to no state: two vectors for a matrix, whatever its size. Embedding and head are then
    nearly all that is kept; store their moments in 8 bits or take Adafactor (`docs/rest.md`).

    Evidence: `llama-4m`, AdamW tuned as hard: +7.8 % perplexity (one seed, `docs/race.md`); by the race's former
    protocol +14.5 % (three seeds, +12.6 to +15.9 %). LLaMA-7B in 8 bits trains in 8.1 GB of memory
    (`results/README.md`). The step is apollo-torch's to 7e-7 (`results/parity.md`).
    """

    name: ClassVar[str] = "apollo-mini"
    title: ClassVar[str] = "APOLLO-Mini"
    paper: ClassVar[str] = "arXiv 2412.05270, section 4.3"
    summary: ClassVar[str] = "APOLLO with one factor per matrix and rank 1; state 2n per matrix."

    rank: int = preset(Apollo, "rank", 1)
    scale: float | str = preset(Apollo, "scale", 128.0)
    scale_type: str = preset(Apollo, "scale_type", "tensor")
    proj: str = preset(Apollo, "proj", "gaussian")


@dataclass(frozen=True)
class ApolloSvd(Apollo):
    """APOLLO on the gradient's top singular vectors instead of random ones (section 5).

    When: To compare with the paper's SVD variant. A random sketch keeps less (no basis) and needs no decomposition.

    Evidence: The step is apollo-torch's to 7e-7 (`results/parity.md`). No quality run of it is in the logs yet.
    """

    name: ClassVar[str] = "apollo-svd"
    title: ClassVar[str] = "APOLLO-SVD"
    paper: ClassVar[str] = "arXiv 2412.05270, section 5"
    summary: ClassVar[str] = (
        "APOLLO on the gradient's top singular vectors, refreshed every 200 steps; state 2nr + dr per matrix."
    )

    proj: str = preset(Apollo, "proj", "svd")
