"""Low-bit weights. `apollo_optim` hands these names on."""

from apollo_optim.quant import memory, operations, processes, products  # noqa: F401 - each registers what it implements
from apollo_optim.quant.quantize import quantize_weights
from apollo_optim.quant.tally import Tally, tallied
from apollo_optim.quant.weight import LowBitWeight

__all__ = ["LowBitWeight", "Tally", "quantize_weights", "tallied"]
