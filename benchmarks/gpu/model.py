"""Models of LLaMA's shapes, made on the device at once: no float copy of what is to be low-bit, nothing drawn by a CPU.

The only file of `benchmarks.gpu` that knows how `apollo_optim.train` makes models and plans.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from apollo_optim import quantize_weights
from apollo_optim.data.config import DataConfig
from apollo_optim.plan import Plan
from apollo_optim.train.config import ModelConfig, OptimConfig, QuantConfig, RunConfig, TrainConfig
from apollo_optim.train.loss import summed_loss
from apollo_optim.train.models import SIZES, skeleton
from apollo_optim.train.plan import planned
from benchmarks.gpu.device import must_fit
from benchmarks.kit import Line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layers_of(size: str) -> int:
    """How many a model of this size has."""
    return SIZES[size].layers


def vocabulary(size: str) -> int:
    """How many tokens it knows."""
    return SIZES[size].vocab


def on_meta(size: str, dtype: str, layers: int | None = None) -> Any:
    """A LLaMA without memory; with so many layers, or all of them."""
    changes = {"num_hidden_layers": layers} if layers else {}
    return skeleton(ModelConfig(size, dtype=dtype, config=changes))  # type: ignore[arg-type]


@torch.no_grad()
def materialise(module: nn.Module, device: torch.device) -> None:
    """Give the parameters of a module on meta their memory: matrices N(0, 0.02), vectors ones. Buffers are left."""
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None and p.is_meta:
                made = torch.empty_like(p, device=device)
                owner._parameters[name] = nn.Parameter(made.normal_(std=0.02) if p.ndim > 1 else made.fill_(1.0))


def build(size: str, dtype: str, bits: int | None, device: torch.device) -> Any:
    """A LLaMA with random weights, its attention and MLP in so many bits: a layer is float until the next one is made.

    Raises DoesNotFit if its weights alone are more than the device has.
    """
    model = on_meta(size, dtype)
    matrices = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
    rest = sum(p.numel() * p.element_size() for p in model.parameters()) - matrices
    must_fit(rest + (matrices if bits is None else matrices * bits // (8 * DTYPES[dtype].itemsize)), device)
    for layer in model.model.layers:
        materialise(layer, device)
        if bits is not None:
            quantize_weights(layer, bits)
    materialise(model, device)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)  # its frequencies are no parameters
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"without memory: {left}"
    return model.train()


def run_config(config: Line, batch: int, seq: int) -> RunConfig:
    """The run that a case of the part `7b` makes a step of."""
    return RunConfig(
        model=ModelConfig(config["size"], dtype=config["dtype"]),
        data=DataConfig(seq_len=seq),
        quant=QuantConfig(bits=config["bits"]),
        optim=OptimConfig(config["optimizer"], rest=config["rest"]),
        train=TrainConfig(batch_size=batch, release=True),
    )


def plan_of(config: Line, batch: int, seq: int) -> Plan:
    """The bytes that `apollo_optim.plan` gives it. Needs seconds of a CPU, and no device."""
    return planned(run_config(config, batch, seq))


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """The mean loss of the training loop, its logits in parts where there are many."""
    return summed_loss(model, ids, ids) / max(1, ids[:, 1:].numel())
