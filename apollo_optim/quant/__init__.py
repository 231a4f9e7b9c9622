"""Low-bit weights. `apollo_optim` hands these names on."""

from apollo_optim.quant.quantize import quantize_weights
from apollo_optim.quant.weight import LowBitWeight

__all__ = ["LowBitWeight", "quantize_weights"]
