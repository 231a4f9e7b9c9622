"""Every optimizer by name: to be registered is to be tested, planned, benched and documented.

Every rule is one: matrices follow it, the rest AdamW. A recipe says more: other rules for the rest, low-bit weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from apollo_optim.core.errors import InputError
from apollo_optim.core.storage import writes_itself
from apollo_optim.optim.classes import AdamW, Apollo, ApolloMini, ApolloSvd
from apollo_optim.optim.groups import param_groups
from apollo_optim.optim.knobs import find_rule, known_keys, nearest
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.optim.parameter import chosen_rule
from apollo_optim.rules import RULES, Rule

CLASSES: dict[str, type[Any]] = {cls.rule: cls for cls in (Apollo, ApolloMini, ApolloSvd, AdamW)}


class Recipe(NamedTuple):
    """An optimizer by name.

    Attributes:
        rule: Of the matrices.
        groups: Arguments of `param_groups`: what this entry says of the rest.
        bits: Of the weights it is for: `quantize_weights(model, bits)` comes first.
    """

    name: str
    rule: str
    summary: str
    paper: str
    groups: Mapping[str, Any] = MappingProxyType({})
    bits: int | None = None

    @property
    def cls(self) -> type[Rule]:
        """The rule's class."""
        return find_rule(self.rule)

    @property
    def defaults(self) -> dict[str, Any]:
        """Keys of its matrices' group: the rule's, and the learning rate."""
        own = {"lr": self.cls.lr, "weight_decay": 1e-2 if self.rule == "adamw" else 0.0, **self.cls.defaults()}
        return {"rank": "auto", **own} if "rank" in self.cls.knobs() else own


RECIPES = (
    Recipe(
        "q-apollo",
        "apollo",
        "APOLLO on weights of 8 bits (quantize_weights): no float copy of them exists.",
        "arXiv 2412.05270, section 5.3",
        bits=8,
    ),
    Recipe(
        "q-apollo-mini",
        "apollo-mini",
        "APOLLO-Mini on weights of 8 bits (quantize_weights): no float copy of them exists.",
        "arXiv 2412.05270, section 5.3",
        bits=8,
    ),
)


def list_optimizers() -> list[Recipe]:
    """What `build_optimizer` knows: the rules in the order of registration, then the recipes."""
    return [*(Recipe(rule.name, rule.name, rule.summary, rule.paper) for rule in RULES.values()), *RECIPES]


def find_optimizer(name: str) -> Recipe:
    """The entry of this name. Raises InputError, naming the nearest, where there is none."""
    known = {recipe.name: recipe for recipe in list_optimizers()}
    if name not in known:
        raise InputError(f"no optimizer is called {name!r}. {nearest(name, known)}")
    return known[name]


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float | None = None,
    rest_lr: float | None = None,
    embedding_lr: float | None = None,
    head_lr: float | None = None,
    norm_lr: float | None = None,
    rest: str | None = None,
    rest_rank: int | None = None,
    embedding: str | None = None,
    head: str | None = None,
    rank: int | str | None = None,
    targets: str | Sequence[str] = ("attn", "mlp"),
    exclude: str | Sequence[str] = (),
    no_decay: str | Sequence[str] = ("bias", "norm"),
    compile: bool | None = None,
    **knobs: Any,
) -> RuleOptimizer:
    """The optimizer of this name on `param_groups(model, ...)`; `None` means its own default.

    Args:
        name: One of `list_optimizers()`.
        lr: Of the matrices, and of everything else unless `rest_lr` says otherwise.
        embedding_lr, head_lr, norm_lr: Of these apart; each falls back to `rest_lr`, and that to `lr`.
        rest, embedding, head, rest_rank: What embedding, head and other matrices follow; see `param_groups`.
        rank: A whole number, or "auto" (a quarter of the most common small side).
        **knobs: Any group key of the optimizer; see its docstring.

    Raises InputError for an unknown name or knob (naming the nearest), a target that matches nothing, a rank at which
    no matrix would follow the rule, the rate of a group that the model does not have, and for a float model where the
    optimizer is one for low-bit weights.
    """
    recipe = find_optimizer(name)
    if recipe.bits is not None and not any(writes_itself(p) for p in model.parameters()):
        raise InputError(
            f"{name} is for low-bit weights and this model has none: call "
            f"apollo_optim.quantize_weights(model, bits={recipe.bits}) first (4 bits are possible, too)"
        )
    known = known_keys([recipe.cls, find_rule(knobs.get("otherwise", "adamw"))]).keys() - {"rule"}
    for key in knobs:
        if key not in known:
            raise InputError(f"optimizer {name!r} takes no {key!r}. {nearest(key, known)}")
    ranked = "rank" in recipe.cls.knobs()
    if not ranked and rank is not None:
        raise InputError(f"optimizer {name!r} has no rank: leave the key out")
    if not ranked and rest == "apollo":
        raise InputError(f"optimizer {name!r} has no rank, so rest='apollo' has no rule to follow. Choose another rest")
    asked = {
        "rest": rest, "embedding": embedding, "head": head, "rest_rank": rest_rank, "rest_lr": rest_lr,
        "embedding_lr": embedding_lr, "head_lr": head_lr, "norm_lr": norm_lr,
    }  # fmt: skip
    groups = param_groups(
        model,
        rank=(recipe.defaults["rank"] if rank is None else rank) if ranked else None,
        targets=targets,
        exclude=exclude,
        no_decay=no_decay,
        **{**recipe.groups, **{key: value for key, value in asked.items() if value is not None}},
        **knobs,
    )
    settings: dict[str, Any] = {"lr": recipe.cls.lr if lr is None else lr, "compile": compile}
    make = CLASSES.get(recipe.rule, partial(RuleOptimizer, rule=recipe.rule))
    optimizer: RuleOptimizer = make(groups, **settings)
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    matrices = [(p, group) for p, group in pairs if group["rule"] == recipe.rule and p.ndim > 1]
    trained = [(p, group) for p, group in matrices if p.requires_grad]  # none: they are to be unfrozen later
    if not any(chosen_rule(p, group).name == recipe.rule for p, group in trained or matrices):
        rank = optimizer.param_groups[0].get("rank")
        why = f" at rank {rank}: every small side is no larger. Choose a smaller rank" if ranked else ""
        raise InputError(f"{name}: no matrix follows the rule{why}")
    return optimizer
