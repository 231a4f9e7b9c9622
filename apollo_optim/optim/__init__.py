"""Optimizers: a rule for the matrices, AdamW for the rest. `apollo_optim` hands these names on."""

from apollo_optim.optim.adamw import AdamW
from apollo_optim.optim.apollo import Apollo, ApolloMini
from apollo_optim.optim.groups import describe, param_groups
from apollo_optim.optim.registry import OptimizerInfo, build_optimizer, list_optimizers
from apollo_optim.optim.release import Released, release

__all__ = [
    "AdamW",
    "Apollo",
    "ApolloMini",
    "OptimizerInfo",
    "Released",
    "build_optimizer",
    "describe",
    "list_optimizers",
    "param_groups",
    "release",
]
