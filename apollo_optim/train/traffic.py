"""What each process of a run sends in a step, planned where the run begins: nothing is sent to find it out."""

from __future__ import annotations

from apollo_optim.core.collectives import Collective
from apollo_optim.core.compile import can_compile
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.plan import Sends, Traffic
from apollo_optim.plan.draw import sized
from apollo_optim.plan.shards import blocks_of
from apollo_optim.plan.traffic import as_it_lies, ddp_sends, fsdp2_sends, sends, tensor_sends
from apollo_optim.train.build import Job
from apollo_optim.train.config import RunConfig


def sends_of_run(job: Job) -> Sends | None:
    """Of a run that is built. What tensor parallelism sends for rows of several lengths is that of the longest.

    None for an optimizer of somebody else's.
    """
    cfg, model, optimizer, world, device = job.cfg, job.model, job.optimizer, job.world, job.state.device
    if not isinstance(optimizer, RuleOptimizer):
        return None
    if cfg.parallel.mode == "ddp":
        return sends(optimizer, ddp_sends(model.parameters(), world.size), None, device.type)
    pieces = rows_of_pieces(cfg, world.shares)
    weights: tuple[Collective, ...] = ()
    if world.tensor > 1:
        blocks, text = len(blocks_of(model)), model.config.get_text_config()
        row = cfg.data.seq_len * text.hidden_size * model.dtype.itemsize
        for rows in pieces:
            again = cfg.model.gradient_checkpointing
            weights += tensor_sends(blocks, rows * row, world.tensor, recompute=again).sent
    if world.shares > 1:
        replicas = cfg.parallel.replicas if cfg.parallel.mode == "hsdp" else 1
        weights += fsdp2_sends(model, world.shares // replicas, replicas, len(pieces)).sent
    how = {"one_by_one": cfg.train.release, "compiler": can_compile(device.type)}
    return sends(optimizer, Traffic(weights), as_it_lies, device.type, **how)


def rows_of_pieces(cfg: RunConfig, shares: int) -> list[int]:
    """The rows of each micro-batch of a step, on one process."""
    rows, size = cfg.train.batch_size // shares, cfg.train.micro_batch or cfg.train.batch_size
    return [min(size, rows - at) for at in range(0, rows, size)]


def in_words(one: Sends, name: str) -> str:
    """One line; `name`: of the optimizer."""
    besides = [f"its first step {amount(one.first)}"] if one.first != one.optimizer else []
    besides += [f"AdamW's {amount(one.adamw)}"] if one.adamw.sent and name != "adamw" else []
    own = f"{amount(one.optimizer)} for {name}" + (f" ({', '.join(besides)})" if besides else "")
    wire = sized(one.weights.wire + one.optimizer.wire)
    return f"collectives of a step: {amount(one.weights)} for the model, {own}; {wire} leave each process"


def amount(traffic: Traffic) -> str:
    """Bytes and collectives."""
    return f"{sized(traffic.nbytes)} in {traffic.collectives:,}" if traffic.sent else "none"
