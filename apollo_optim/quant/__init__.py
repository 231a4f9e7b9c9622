"""Low-bit weights. `apollo_optim` hands these names on."""

from apollo_optim.quant import memory, operations, processes, products  # noqa: F401 - each registers what it implements
from apollo_optim.quant.quantize import quantize_weights
from apollo_optim.quant.stats import RoundingStats, rounding_stats
from apollo_optim.quant.weight import LowBitWeight

__all__ = ["LowBitWeight", "RoundingStats", "quantize_weights", "rounding_stats"]
