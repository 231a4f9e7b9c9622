"""The plan of a run: the model, the optimizer and the loss of a run file, without a byte of theirs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.plan import Parallel, Plan, Traces, plan, trace_step
from apollo_optim.train.config import ModelConfig, RunConfig
from apollo_optim.train.evaluate import summed_loss
from apollo_optim.train.loop import make_optimizer
from apollo_optim.train.models import SIZES, build_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def planned(
    cfg: RunConfig,
    *,
    vocab_size: int | None = None,
    release: bool | None = None,
    bits: int | None = None,
    parallel: Parallel | None = None,
    batch: int | None = None,
    traces: Traces | None = None,
) -> Plan:
    """The bytes of one step of this run, before anything of it exists.

    >>> planned(RunConfig(model=ModelConfig("llama-7b", dtype="bfloat16"))).total

    The arguments change what the run file says (None: as it says): `vocab_size`, `train.release`, `quant.bits`, and the
    rows of a micro-batch; a trace (`traces_of`) can be shared by the plans of several optimizers on one model.
    Raises InputError for what the user can put right.
    """
    release = bool(getattr(cfg.train, "release", False)) if release is None else release
    traces = traces or traces_of(cfg, vocab_size)
    model = float_model(cfg, vocab_size)
    quantise(model, cfg, bits)
    size = batch or micro_batch(cfg)
    accumulate = batch is None and size < cfg.train.batch_size
    return plan(
        model,
        make_optimizer(cfg.optim, model),
        traces.at(size),
        name=cfg.optim.name,
        release=release,
        accumulate=accumulate,
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
    fixed = cfg.model if vocab_size is None else _with_vocabulary(cfg.model, vocab_size)
    with torch.device("meta"):
        return build_model(fixed, seq_len=cfg.data.seq_len)


def _with_vocabulary(cfg: ModelConfig, vocab_size: int) -> ModelConfig:
    import dataclasses

    return dataclasses.replace(cfg, vocab_size=cfg.vocab_size or vocab_size) if cfg.name in SIZES else cfg


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
