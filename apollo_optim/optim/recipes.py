"""Every optimizer by name: to be registered is to be tested, planned, benched and documented.

Every rule is one: matrices use it, all else AdamW. A recipe says more: other rules for the rest, low-bit weights.
`full`, `lite` and `nano` come from the race, for three budgets (docs/race.md). `a+b` is a recipe of two rules, made
when it is asked for: see `combined`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from apollo_optim.core.errors import InputError
from apollo_optim.core.storage import writes_itself
from apollo_optim.optim.classes import AdamW, Apollo, ApolloMini, ApolloSvd
from apollo_optim.optim.groups import KINDS, kind_of, param_groups, refuse_missing, rule_and_codec
from apollo_optim.optim.knobs import Group, check_idle, check_keys, find_rule, known_keys, nearest, tidy
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.optim.parameter import chosen_rule
from apollo_optim.rules import RULES, Rule

CLASSES: dict[str, type[Any]] = {cls.rule: cls for cls in (Apollo, ApolloMini, ApolloSvd, AdamW)}


class Recipe(NamedTuple):
    """An optimizer by name.

    >>> Recipe("mine", "muon", groups={"embedding": "scale", "head": "adamw8bit", "nesterov": False})

    Attributes:
        rule: Of the matrices.
        groups: What else is not as by default, as arguments of `param_groups`: the rules of `embedding`, `head` and
            `others`, or of all of them (`rest`), and knobs.
        bits: Of the weights it is for: `quantize_weights(model, bits)` comes first.
        rates: What is taken where nobody says an `lr`: rates, and averages that were tuned with them, as arguments of
            `build_optimizer`.
    """

    name: str
    rule: str
    summary: str = ""
    paper: str = ""
    groups: Mapping[str, Any] = MappingProxyType({})
    bits: int | None = None
    rates: Mapping[str, Any] = MappingProxyType({})

    @property
    def cls(self) -> type[Rule]:
        """The rule's class."""
        return find_rule(self.rule)

    @property
    def rules(self) -> list[type[Rule]]:
        """All that its parameters may follow, that of the matrices first."""
        rest = (rule_and_codec(self.groups[key])["rule"] for key in ("rest", *KINDS) if key in self.groups)
        return [find_rule(name) for name in dict.fromkeys((self.rule, *rest, "adamw"))]

    @property
    def defaults(self) -> dict[str, Any]:
        """Keys of its matrices' group: the rule's, and the learning rate."""
        own = {"lr": self.cls.lr, "weight_decay": 1e-2 if self.rule == "adamw" else 0.0, **self.cls.defaults()}
        said = {**self.groups, **self.rates}
        own |= {key: value for key, value in said.items() if key == "lr" or key in self.cls.knobs()}
        return {"rank": "auto", **own} if "rank" in self.cls.knobs() else own

    def choosing(self, asked: Mapping[str, Any]) -> Recipe:
        """The same with the rules of the rest that are `asked` for: their knobs may be said, too."""
        return self.with_groups({**self.groups} | {k: asked[k] for k in ("rest", *KINDS) if asked.get(k) is not None})

    def with_groups(self, groups: Mapping[str, Any]) -> Recipe:
        """The same with these. A knob of a rule that is no longer among them goes with it."""
        made = self._replace(groups=groups)
        before, after = ({key for cls in one.rules for key in cls.knobs()} for one in (self, made))
        return made._replace(groups={key: value for key, value in groups.items() if key not in before - after})


SLIM: Mapping[str, Any] = {"embedding": "slimadam", "averaged": False, "head": "adam-mini8bit"}
"""One second moment a token, and of the head a momentum of a byte: for LLaMA-7B 0.13 GB instead of AdamW's 2.1."""
# Of the race at 4,096 tokens a step, on a model of 3.3 million parameters. A momentum of 0.8145 is a half-life of
# 13,840 tokens, a beta2 of 0.99938 one of 4.6 million (docs/rates.md).
OF_FULL = {"lr": 0.008, "rest_lr": 0.04, "embedding_lr": 0.32, "norm_lr": 0.02, "momentum": 0.8145}
OF_LITE = {"lr": 0.016, "rest_lr": 0.01, "embedding_lr": 0.64, "norm_lr": 0.02, "momentum": 0.8145}
OF_NANO = {"lr": 0.032, "rest_lr": 0.02, "embedding_lr": 0.64, "norm_lr": 0.02, "betas": (0.9, 0.99938)}
RECIPES = (
    Recipe(
        "full",
        "muon",
        "A winner of the race: Muon on a momentum of a byte a weight, 8-bit AdamW for embedding and head.",
        "docs/race.md; arXiv 2502.16982, 1711.05101",
        groups=MappingProxyType({"rest": "adamw8bit", "state_dtype": "8bit"}),
        rates=MappingProxyType(OF_FULL),
    ),
    Recipe(
        "lite",
        "muon",
        "The race's lowest so far in half a byte a weight: Muon on 4 bits, one second moment a token of the rest.",
        "docs/race.md; arXiv 2502.16982, 2503.01843, 2406.16793",
        groups=MappingProxyType({**SLIM, "state_dtype": "4bit"}),
        rates=MappingProxyType(OF_LITE),
    ),
    Recipe(
        "nano",
        "muon",
        "The race's lowest so far in next to no state: Muon without a momentum, one second moment a token of the rest.",
        "docs/race.md; arXiv 2502.16982, 2503.01843, 2406.16793",
        groups=MappingProxyType({**SLIM, "stateless": True}),
        rates=MappingProxyType(OF_NANO),
    ),
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
    """The entry of this name, or `a+b`. Raises InputError, naming the nearest, where there is none."""
    if not isinstance(name, str):
        raise InputError(f'an optimizer\'s name is a string, such as "lite", or a Recipe: {name!r} is neither')
    known = {recipe.name: recipe for recipe in list_optimizers()}
    first, plus, second = name.partition("+")
    if first not in known:
        within = f" (in {name!r})" if plus else ""
        raise InputError(f"no optimizer is called {first!r}{within}. {nearest(first, known)}")
    return combined(known[first], second) if plus else known[first]


def combined(first: Recipe, second: str) -> Recipe:
    """`a+b`: the hidden matrices use `a`; embedding, head and all matrices that `a` is not for use `b`.

    `a` is an optimizer by name; `b` a rule, with "8bit" or "4bit" after it if its state is to be stored so. What
    neither is a rule for - norms, biases, all that is 1-D - uses AdamW. So `lr` is the rate of what uses `a`, and
    `rest_lr` that of all else. A knob that `a` has is its own (`betas` and `eps` are Adam's, wherever it is), and one
    that only `b` has is `b`'s; `rest_rank` is `b`'s rank.
    """
    name = f"{first.name}+{second}"
    if not second or "+" in second:
        raise InputError(f"{name!r}: a+b is of two rules, that of the hidden matrices and that of all others")
    try:
        rest = find_rule(rule_and_codec(second)["rule"])
    except InputError as error:
        raise InputError(f"{name!r}: {error}") from None
    summary = f"{first.cls.title} for the hidden matrices, {rest.title} for embedding, head and other matrices."
    own = {key: value for key, value in first.groups.items() if key not in ("rest", *KINDS)}
    made = first.with_groups({**own, "rest": second})
    return made._replace(name=name, summary=summary, paper=f"{first.paper}; {rest.paper}", rates={})


def check_knobs(recipe: Recipe, knobs: Group) -> None:
    """Refuse knobs that mean nothing to this optimizer's rules, and values out of range, as its groups would."""
    where = f"optimizer {recipe.name!r}"
    if "rule" in knobs:
        raise InputError(f"{where} has its rule: leave rule={knobs['rule']!r} out, or ask for another optimizer")
    knobs = {key: value for key, value in knobs.items() if (key, value) != ("rank", "auto")}
    tidy(knobs)
    rules = recipe.rules + ([find_rule(knobs["otherwise"])] if "otherwise" in knobs else [])
    check_keys(knobs, rules, where, "optimizer", ARGUMENTS)
    check_idle(knobs, recipe.cls, {**recipe.groups, **knobs}, where)


def build_optimizer(
    name: str | Recipe,
    model: nn.Module,
    *,
    lr: float | None = None,
    rest_lr: float | None = None,
    embedding_lr: float | None = None,
    head_lr: float | None = None,
    norm_lr: float | None = None,
    rest: str | None = None,
    rest_rank: int | str | None = None,
    embedding: str | None = None,
    head: str | None = None,
    rank: int | str | None = None,
    targets: str | Sequence[str] = ("attn", "mlp"),
    exclude: str | Sequence[str] = (),
    no_decay: str | Sequence[str] = (),
    compile: bool | None = None,
    **knobs: Any,
) -> RuleOptimizer:
    """The optimizer of this name on `param_groups(model, ...)`; `None` means its own default.

    Args:
        name: One of `list_optimizers()`; two rules, as in "muon+adamw" (see `combined`); or a recipe of your own.
        lr: Of the matrices, and of everything else unless `rest_lr` says otherwise. None: the rule's own, or for
            `full`, `lite` and `nano` what the race found for each group of a new model, with its averages
            (`Recipe.rates`; docs/rates.md).
        rest_lr: Of embedding, head, norms and all else that does not use the optimizer's rule.
        embedding_lr: Of the embedding apart; falls back to `rest_lr`, and that to `lr`. So do `head_lr` and `norm_lr`.
        head_lr: Of the head.
        norm_lr: Of norms and biases.
        rest: What embedding, head and other matrices use; see `param_groups`, also for the next three.
        rest_rank: Their rank.
        embedding: What the embedding uses.
        head: What the head uses.
        rank: A whole number, or "auto" (a quarter of the most common small side).
        **knobs: Any group key of the optimizer; see its docstring.

    Raises InputError for an unknown name or knob (naming the nearest), a target that matches nothing, a rank at which
    no matrix would use the rule, a second rule that nothing uses, the rate of a group that the model does not
    have, and for a float model where the optimizer is one for low-bit weights.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            "build_optimizer(name, model): the whole model comes second, whose modules say what to step how; "
            f"{type(model).__name__} is none"
        )
    recipe = name if isinstance(name, Recipe) else find_optimizer(name)
    name = recipe.name
    if recipe.bits is not None and not any(writes_itself(p) for p in model.parameters()):
        raise InputError(
            f"{name} is for low-bit weights and this model has none: call "
            f"apollo_optim.quantize_weights(model, bits={recipe.bits}) first (4 bits are possible, too)"
        )
    ranked = "rank" in recipe.cls.knobs()
    if rank is not None and not any("rank" in rule.knobs() for rule in recipe.rules):
        raise InputError(f"optimizer {name!r} has no rank: leave the key out")
    if rest is not None and ("rest" in recipe.groups or {"embedding", "head"} <= recipe.groups.keys()):
        raise InputError(f"optimizer {name!r} says what embedding and head use: leave rest={rest!r} out")
    if not ranked and rest == "apollo":
        raise InputError(f"optimizer {name!r} has no rank, so rest='apollo' has no rule to use. Choose another rest")
    asked = {
        "rest": rest, "embedding": embedding, "head": head, "rest_rank": rest_rank, "rest_lr": rest_lr,
        "embedding_lr": embedding_lr, "head_lr": head_lr, "norm_lr": norm_lr,
    }  # fmt: skip
    chosen = recipe.choosing(asked)
    check_knobs(chosen, knobs)
    asked = {key: value for key, value in asked.items() if value is not None}
    tuned = recipe.rates if lr is None else {}
    averages = {key: value for key, value in tuned.items() if not key.endswith("lr")}
    given = {**chosen.groups, **averages, **asked, **knobs}
    given["rank"] = recipe.defaults["rank"] if ranked and rank is None else rank
    of_others = knobs.keys() - known_keys([recipe.cls, find_rule("adamw")])  # `param_groups` must know whose they are
    given["rule"] = recipe.rule if recipe.groups or of_others else None
    groups = param_groups(model, targets=targets, exclude=exclude, no_decay=no_decay, **given)
    kinds = {kind_of(group) for group in groups}
    for kind in ("embedding", "head"):
        if kind in asked:
            refuse_missing(f"{kind}={asked[kind]!r}", kind, kinds)
    if tuned:
        _set_rates(groups, tuned, leave=asked)
    settings: dict[str, Any] = {"lr": recipe.defaults["lr"] if lr is None else lr, "compile": compile}
    later = recipe.cls.knobs().keys() - {"rank"} | {"state_dtype"}  # for groups that are added
    settings |= {key: value for key, value in given.items() if key in later}
    make = CLASSES.get(recipe.rule, partial(RuleOptimizer, rule=recipe.rule))
    optimizer: RuleOptimizer = make(groups, **settings)
    if not _is_followed(recipe.rule, optimizer, ndim=2):
        rank = next((group["rank"] for group in optimizer.param_groups if "rank" in group), rank)
        why = f" at rank {rank}: every small side is no larger. Choose a smaller rank" if ranked else ""
        raise InputError(f"{name}: no matrix uses the rule{why}")
    if "+" in name and "rest" in recipe.groups:  # somebody asked for this second rule
        rest = rule_and_codec(recipe.groups["rest"])["rule"]
        if not _is_followed(rest, optimizer):
            raise InputError(
                f"{name}: nothing uses {rest}: there is no embedding, head or other matrix that it is a rule for. "
                f"Ask for {name.partition('+')[0]} alone"
            )
    return optimizer


ARGUMENTS = frozenset(inspect.signature(build_optimizer).parameters) - {"name", "model", "knobs"}


def _set_rates(groups: list[Group], tuned: Mapping[str, Any], leave: Mapping[str, Any]) -> None:
    """Of all that is not of the matrices, but for what is asked for: another rule there, or another rate."""
    for group in groups:
        kind = kind_of(group)
        if kind != "matrices" and not leave.keys() & {kind, "rest"}:
            group.setdefault("lr", tuned.get(f"{kind.removesuffix('s')}_lr", tuned["rest_lr"]))


def _is_followed(rule: str, optimizer: RuleOptimizer, ndim: int = 0) -> bool:
    """Does a parameter of a group of this rule follow it? One that is trained, or they are to be unfrozen later."""
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"] if group["rule"] == rule]
    pairs = [(p, group) for p, group in pairs if p.ndim >= ndim]
    trained = [(p, group) for p, group in pairs if p.requires_grad]
    return any(chosen_rule(p, group).name == rule for p, group in trained or pairs)
