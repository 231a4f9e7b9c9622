"""What the optimizers of the registry that are for low-bit weights want of a model."""

from torch import nn

from apollo_optim import LowBitWeight, list_optimizers, quantize_weights

BITS = {info.name: info.bits for info in list_optimizers()}


def prepare(name: str, model: nn.Module, **how) -> nn.Module:
    """Quantise the model, in place, if this optimizer is for low-bit weights; what is quantised already stays."""
    if BITS[name] and not any(isinstance(p, LowBitWeight) for p in model.parameters()):
        quantize_weights(model, BITS[name], **{"group_size": 6, "targets": "mlp", **how})
    return model
