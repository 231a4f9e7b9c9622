"""Low-bit weights. `apollo_optim` hands these names on."""

from apollo_optim.quant import operations as _operations
from apollo_optim.quant import products as _products
from apollo_optim.quant.quantize import quantize_weights
from apollo_optim.quant.tally import Tally, tallied
from apollo_optim.quant.weight import LowBitWeight

_HANDLERS = _operations, _products  # what torch does to a low-bit weight; importing them registers it

__all__ = ["LowBitWeight", "Tally", "quantize_weights", "tallied"]
