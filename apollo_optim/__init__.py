"""Train language models with a small part of AdamW's memory: APOLLO (arXiv 2412.05270), and recipes beside it.

from apollo_optim import ApolloMini, param_groups
optimizer = ApolloMini(param_groups(model, rank=1), lr=1e-2)
"""

from typing import TYPE_CHECKING, Any

from apollo_optim.core.errors import InputError

if TYPE_CHECKING:
    from apollo_optim.optim import (
        AdamW,
        Apollo,
        ApolloMini,
        Recipe,
        Released,
        RuleOptimizer,
        build_optimizer,
        describe,
        list_optimizers,
        param_groups,
        register,
        release,
        rule_of,
    )
    from apollo_optim.quant import LowBitWeight, quantize_weights

__all__ = [
    "AdamW",
    "Apollo",
    "ApolloMini",
    "InputError",
    "LowBitWeight",
    "Recipe",
    "Released",
    "RuleOptimizer",
    "build_optimizer",
    "describe",
    "list_optimizers",
    "param_groups",
    "quantize_weights",
    "register",
    "release",
    "rule_of",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The library comes with the first use of a name: `apollo-optim --help` does not wait two seconds for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from apollo_optim import optim, quant

    return getattr(quant if name in quant.__all__ else optim, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
