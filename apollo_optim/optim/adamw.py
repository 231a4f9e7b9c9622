"""AdamW: the yardstick, in the same shell (Loshchilov & Hutter, 1711.05101)."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from apollo_optim.optim.base import MatrixOptimizer
from apollo_optim.optim.knobs import ADAMW_KNOBS


class AdamW(MatrixOptimizer):
    """torch.optim.AdamW's arithmetic and defaults, with what this library adds to every optimizer of its own:

    fp32 moments and one stochastically rounded write for bf16 weights, a non-finite gradient skipped, a checkpoint
    that keeps its dtypes. State: two numbers per parameter.
    """

    knobs: ClassVar[frozenset[str]] = ADAMW_KNOBS

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = True,
        seed: int = 0,
        maximize: bool = False,
        compile: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding, "seed": seed, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, compile=compile)
