"""Bytes before anything is allocated: the code that will run, on tensors that have a shape and no memory."""

from apollo_optim.plan.budget import PARTS, Budget, Moment, Plan, plan
from apollo_optim.plan.largest import largest_batch
from apollo_optim.plan.shards import Parallel
from apollo_optim.plan.trace import Block, Trace, Traces, trace_step

__all__ = [
    "PARTS",
    "Block",
    "Budget",
    "Moment",
    "Parallel",
    "Plan",
    "Trace",
    "Traces",
    "largest_batch",
    "plan",
    "trace_step",
]
