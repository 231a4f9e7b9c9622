"""Running averages of a gradient. Pure: what they return, the caller stores."""

import math

from torch import Tensor

Number = float | Tensor  # 0-D where a compiled step must not specialise on the value


def updated(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, new1: Number, new2: Number) -> tuple[Tensor, Tensor]:
    """Adam's two averages after this gradient, in fp32 whatever they are stored in. All three of one shape.

    ``new1 = 1 - beta1`` and ``new2 = 1 - beta2``, taken on the host: in fp32, 1 - 0.999 is wrong by 5e-5.
    """
    grad, mean, square = grad.float(), exp_avg.float(), exp_avg_sq.float()
    return mean + (grad - mean) * new1, square + (grad * grad - square) * new2


def bias_corrections(step: float, betas: tuple[float, float]) -> tuple[float, float]:
    """(1 - beta1^t, sqrt(1 - beta2^t)): young averages are too small by these factors."""
    return 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)
