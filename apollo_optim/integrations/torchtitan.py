"""torchtitan: a container of our optimizers in the place of its own, one for each part of a pipelined model.

>>> from apollo_optim.integrations.torchtitan import ApolloContainer
>>> config.optimizer = ApolloContainer.Config(name="apollo-mini", knobs={"lr": 0.00125, "rest_lr": 0.02})
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer

from apollo_optim.core.errors import InputError
from apollo_optim.core.names import unwrapped
from apollo_optim.optim.recipes import build_optimizer

__all__ = ["ApolloContainer"]


class ApolloContainer(OptimizersContainer):
    """`build_optimizer` for every part of the model, in torchtitan's container: its loop, schedule and checkpoints.

    torchtitan makes it when the model is sharded; groups are `param_groups`' choice, by what a tensor is.

    Raises InputError for what torchtitan's own container takes and this one does not (`param_groups`), and as
    `build_optimizer` does.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Which optimizer, and what else `build_optimizer` takes."""

        name: str = "apollo-mini"
        """Any rule or recipe."""
        knobs: dict[str, Any] = field(default_factory=dict)
        """`lr`, `rest_lr`, `rank`, `weight_decay`, ...; `targets` is "all-linear" by default."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.param_groups:
            raise InputError("param_groups: ApolloContainer makes its groups itself; say targets=... in knobs instead")
        self.model_parts = model_parts
        knobs: dict[str, Any] = {"targets": "all-linear", **config.knobs}  # its models have no `attn` and `mlp`
        self.optimizers = [build_optimizer(config.name, part, **knobs) for part in model_parts]
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in groups:  # torchtitan saves state under these names, whatever wraps the layers of the run at hand
            group["param_names"] = [unwrapped(name) for name in group["param_names"]]
        trained = [p for group in groups for p in group["params"]]
        Optimizer.__init__(self, trained, {})  # for the hooks that torchtitan registers; the groups are the optimizers'
