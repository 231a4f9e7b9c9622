"""Optimizers. `apollo_optim` hands these names on."""

from apollo_optim.optim.classes import AdamW, Apollo, ApolloMini
from apollo_optim.optim.describe import describe, rule_of
from apollo_optim.optim.groups import param_groups
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.optim.recipes import Recipe, build_optimizer, list_optimizers
from apollo_optim.optim.release import Released, release
from apollo_optim.rules import register

__all__ = [
    "AdamW",
    "Apollo",
    "ApolloMini",
    "Recipe",
    "Released",
    "RuleOptimizer",
    "build_optimizer",
    "describe",
    "list_optimizers",
    "param_groups",
    "register",
    "release",
    "rule_of",
]
