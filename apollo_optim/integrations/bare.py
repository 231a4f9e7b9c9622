"""Classes for tools that take `pkg.Class` and hand it bare parameters: litgpt, torchtune, kohya, timm's registry.

    litgpt finetune_full ... --optimizer apollo_optim.integrations.bare.ApolloMini

Bare parameters say nothing of what they are: an embedding looks like a matrix. These classes find the module that holds
the parameters, and make the groups that `build_optimizer(name, model)` makes.
"""

import gc
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from apollo_optim.core.errors import InputError
from apollo_optim.optim.knobs import GENERAL, Group, nearest
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.optim.recipes import build_optimizer
from apollo_optim.rules import RULES


class Bare(RuleOptimizer):
    """`build_optimizer` of the module that holds these parameters, for them alone.

    Args:
        params: All of a model's parameters, those that are trained, or groups of them. What a group says itself (`lr`,
            `weight_decay`, ...) goes before what the rule's own groups say.
        lr: Of the matrices, and of all else without a rate of its own; None: the rule's.
        weight_decay: Of all but norms, biases and what else is 1-D.
        **knobs: All else that `build_optimizer` takes: `rank`, `targets`, `rest_lr`, `state_dtype`, ...

    Raises InputError where no module holds them all, and as `build_optimizer` does.
    """

    rule: ClassVar[str]

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor | None = None, weight_decay: float = 0.0, **knobs: Any
    ) -> None:
        entries = list(params)
        given = entries if any(isinstance(entry, dict) for entry in entries) else [{"params": entries}]
        theirs = [{**group, "params": _tensors(group["params"])} for group in given]
        model = find_module([p for group in theirs for p in group["params"]], type(self).__name__)
        made = build_optimizer(self.rule, model, lr=lr, weight_decay=weight_decay, **knobs)  # type: ignore[arg-type]
        groups = [_common(mine, group) for group in theirs for mine in made.param_groups]
        settings = made.defaults["lr"], weight_decay
        super().__init__([group for group in groups if group["params"]], self.rule, *settings, compile=made.compile)


def find_module(params: list[Tensor], owner: str) -> nn.Module:
    """The smallest module alive that holds all of these. Raises InputError where none does."""
    wanted = set(params)
    found: list[tuple[int, int, nn.Module]] = []
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module) and wanted <= (held := set(thing.parameters())):
            found.append((len(held), sum(1 for _ in thing.modules()), thing))
    if not found:
        raise InputError(
            f"{owner}: no module holds all of these {len(wanted)} parameters, so nothing says what they are: use "
            "apollo_optim.build_optimizer(name, model) instead"
        )
    return min(found, key=lambda entry: entry[:2])[2]


def _tensors(params: Any) -> list[Tensor]:
    entries = [params] if isinstance(params, Tensor) else list(params)
    return [entry[1] if isinstance(entry, tuple) else entry for entry in entries]


def _common(mine: Group, theirs: Group) -> Group:
    """What two groups have in common, with what theirs says of its own."""
    wanted = set(theirs["params"])
    pairs = zip(mine["params"], mine["param_names"], strict=True)
    common = [(p, name) for p, name in pairs if p in wanted]
    own = {key: value for key, value in theirs.items() if key in GENERAL or key not in mine}
    lists = {"params": [p for p, _ in common], "param_names": [name for _, name in common]}
    return {**mine, **own, **lists}


def __getattr__(name: str) -> type[Bare]:
    """The class of a rule, by the name of the rule's own class: `ApolloMini`, `Muon`, ..., `Mine` if registered."""
    rules = {cls.__name__: rule for rule, cls in RULES.items()}
    if name not in rules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. {nearest(name, rules)}")
    doc = f"""`build_optimizer("{rules[name]}", model)`, of the module that holds the parameters: see `Bare`."""
    globals()[name] = made = type(name, (Bare,), {"rule": rules[name], "__module__": __name__, "__doc__": doc})
    return made
