"""Bytes before anything is allocated: the code that will run, on tensors that have a shape and no memory."""

from apollo_optim.plan.budget import PARTS, Budget, Moment, Plan, plan
from apollo_optim.plan.choose import CANDIDATES, Candidate, Choice, choose
from apollo_optim.plan.fit import Fit, cards_for, fit
from apollo_optim.plan.largest import largest_batch
from apollo_optim.plan.pace import Pace
from apollo_optim.plan.shards import Parallel, held_weights
from apollo_optim.plan.trace import Block, Trace, Traces, trace_step
from apollo_optim.plan.traffic import Sends, Traffic, planned_sends

__all__ = [
    "CANDIDATES",
    "PARTS",
    "Block",
    "Budget",
    "Candidate",
    "Choice",
    "Fit",
    "Moment",
    "Pace",
    "Parallel",
    "Plan",
    "Sends",
    "Trace",
    "Traces",
    "Traffic",
    "cards_for",
    "choose",
    "fit",
    "held_weights",
    "largest_batch",
    "plan",
    "planned_sends",
    "trace_step",
]
