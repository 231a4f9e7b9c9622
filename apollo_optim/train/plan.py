"""The plan of a run: the model, the optimizer and the loss of a run file, without a byte of theirs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from apollo_optim.optim.describe import state_bytes
from apollo_optim.plan import Budget, Parallel, Plan, Sends, Trace, planned_sends, trace_step
from apollo_optim.quant import quantize_weights
from apollo_optim.train.config import RunConfig
from apollo_optim.train.loss import summed_loss
from apollo_optim.train.models import check_context, low_bit, model_config, recompute, skeleton
from apollo_optim.train.optimizer import make_optimizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def planned(cfg: RunConfig, *, vocab_size: int | None = None, trust_remote_code: bool = False) -> Plan:
    """The bytes of one step of this run, before anything of it exists.

    >>> planned(RunConfig(model=ModelConfig("llama-7b", dtype="bfloat16"))).total

    `vocab_size`: of a size by name, where the run file leaves it to the tokenizer.
    Raises InputError for what the user can put right.
    """
    model = model_of(cfg, vocab_size, trust_remote_code=trust_remote_code)
    return budget_of(cfg, model).at(trace_of(cfg, model, micro_batch(cfg)))


def trace_of(cfg: RunConfig, model: PreTrainedModel, batch: int, device: str = "cpu") -> Trace:
    """Forward and backward of so many rows, with the run's loss, in the blocks of a "cpu" or of "cuda"."""
    return trace_step(model, functools.partial(summed_loss, how=cfg.train.loss), batch, cfg.data.seq_len, device)


def budget_of(
    cfg: RunConfig,
    model: PreTrainedModel,
    *,
    parallel: Parallel | None = None,
    batch: int | None = None,
    device: str = "cpu",
) -> Budget:
    """All of a run's plan but for the trace of `model` (`model_of`); `batch`: of its micro-batch, if not the run's.

    `device`: "cpu" or "cuda", of which the trace must be, too.
    """
    return Budget(
        model,
        make_optimizer(cfg.optim, model),
        name=cfg.optim.name,
        release=cfg.train.release,
        accumulate=(batch or micro_batch(cfg)) < cfg.train.batch_size,
        parallel=parallel,
        device=device,
    )


def sends_of(
    cfg: RunConfig, model: PreTrainedModel, parallel: Parallel, *, batch: int | None = None, device: str = "cpu"
) -> Sends:
    """What each process of a run sends in a step, by the optimizer and by whatever shares the weights.

    Arguments: as of `budget_of`.
    """
    return planned_sends(
        model,
        make_optimizer(cfg.optim, model),
        parallel,
        micro_batches=micro_batches(cfg, parallel.gpus, batch),
        release=cfg.train.release,
        device=device,
    )


def state_of(cfg: RunConfig) -> int:
    """Bytes of the optimizer's state alone, which needs no trace."""
    groups = make_optimizer(cfg.optim, model_of(cfg)).param_groups
    return sum(state_bytes(p, group) for group in groups for p in group["params"])


def micro_batch(cfg: RunConfig) -> int:
    """Rows of one forward pass."""
    return min(cfg.train.micro_batch or cfg.train.batch_size, cfg.train.batch_size)


def micro_batches(cfg: RunConfig, shares: int = 1, batch: int | None = None) -> int:
    """How many of them a step has, where so many processes share its rows."""
    rows = -(-cfg.train.batch_size // shares)
    return -(-rows // (batch or micro_batch(cfg)))


def model_of(
    cfg: RunConfig,
    vocab_size: int | None = None,
    config: PretrainedConfig | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The run's model on the meta device, its weights in the form in which they will be trained.

    `config`: of a model that is there already, as in a checkpoint.
    """
    config = config or model_config(cfg.model, vocab_size, trust_remote_code=trust_remote_code)
    check_context(cfg.model, config, cfg.data.seq_len)
    model, quant = skeleton(cfg.model, config, trust_remote_code=trust_remote_code), low_bit(cfg)
    if quant.bits is not None:
        quantize_weights(model, quant.bits, quant.group_size, quant.targets, quant.exclude)
    if cfg.model.gradient_checkpointing:
        recompute(model)
    return model
