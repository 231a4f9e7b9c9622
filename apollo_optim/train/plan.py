"""The plan of a run: the model, the optimizer and the loss of a run file, without a byte of theirs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.plan import Budget, Parallel, Plan, Traces, trace_step
from apollo_optim.train.config import RunConfig
from apollo_optim.train.evaluate import summed_loss
from apollo_optim.train.loop import make_optimizer
from apollo_optim.train.models import check_context, model_config, recompute, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def planned(cfg: RunConfig, *, vocab_size: int | None = None) -> Plan:
    """The bytes of one step of this run, before anything of it exists.

    >>> planned(RunConfig(model=ModelConfig("llama-7b", dtype="bfloat16"))).total

    `vocab_size`: of a size by name, where the run file leaves it to the tokenizer.
    Raises InputError for what the user can put right.
    """
    return budget_of(cfg, vocab_size=vocab_size).at(traces_of(cfg, vocab_size).at(micro_batch(cfg)))


def budget_of(
    cfg: RunConfig,
    *,
    vocab_size: int | None = None,
    release: bool | None = None,
    bits: int | None = None,
    parallel: Parallel | None = None,
    batch: int | None = None,
) -> Budget:
    """All of a run's plan but for its trace. What is None is as the run file says."""
    model = float_model(cfg, vocab_size)
    quantise(model, cfg, bits)
    return Budget(
        model,
        make_optimizer(cfg.optim, model),
        name=cfg.optim.name,
        release=bool(getattr(cfg.train, "release", False)) if release is None else release,
        accumulate=(batch or micro_batch(cfg)) < cfg.train.batch_size,
        parallel=parallel,
    )


def micro_batch(cfg: RunConfig) -> int:
    """Rows of one forward pass."""
    return min(cfg.train.micro_batch or cfg.train.batch_size, cfg.train.batch_size)


def traces_of(cfg: RunConfig, vocab_size: int | None = None) -> Traces:
    """Forward and backward of the run's model at any micro-batch, traced when they are asked for."""
    model = float_model(cfg, vocab_size)
    return Traces(lambda batch: trace_step(model, summed_loss, batch, cfg.data.seq_len))


def float_model(cfg: RunConfig, vocab_size: int | None = None) -> PreTrainedModel:
    """The run's model on the meta device, with plain weights."""
    config = model_config(cfg.model, vocab_size)
    check_context(cfg.model, config, cfg.data.seq_len)
    model = skeleton(cfg.model, config)
    if cfg.model.gradient_checkpointing:
        recompute(model)
    return model


def quantise(model: torch.nn.Module, cfg: RunConfig, bits: int | None = None) -> None:
    """Give the model the low-bit weights that the run file (or ``bits``) asks for, if any."""
    section = getattr(cfg, "quant", None)
    bits = bits or getattr(section, "bits", None)
    if bits is None:
        return
    try:
        quant = importlib.import_module("apollo_optim.quant")
    except ModuleNotFoundError:
        raise InputError(f"quant.bits={bits}: this version has no low-bit weights") from None
    settings = {key: getattr(section, key) for key in ("group_size", "targets") if hasattr(section, key)}
    quant.quantize_weights(model, bits=bits, **settings)
