"""The keys of a parameter group: whose they are, what each may be, and what a wrong one is told."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.codecs import CODECS
from apollo_optim.core.errors import InputError, closest
from apollo_optim.rules import RULES, Rule
from apollo_optim.rules.base import Knob
from apollo_optim.rules.knobs import SWITCH, is_whole, number, one_of

Group = dict[str, Any]
RANDOM = "random"  # apollo-torch's name for what it draws, a Gaussian
_AT_LEAST_0 = number(0)
_CODEC = one_of(*CODECS)


def is_lr(x: Any) -> bool:
    return (isinstance(x, Tensor) and x.numel() == 1) or _AT_LEAST_0.fits(x)


def _is_state_dtype(x: Any) -> bool:
    return all(map(_CODEC.fits, x.values())) if isinstance(x, Mapping) else _CODEC.fits(x)


# What every group has, whatever its rule. The order is that of the docs.
GENERAL: dict[str, Knob] = {
    "rule": Knob("the name of a rule", lambda x: isinstance(x, str)),
    "otherwise": Knob("the name of a rule", lambda x: isinstance(x, str)),
    "lr": Knob("a number >= 0", is_lr),
    "weight_decay": _AT_LEAST_0,
    "state_dtype": Knob(f"{_CODEC.wanted}, or a dict of them by slot", _is_state_dtype),
    "stochastic_rounding": SWITCH,
    "seed": Knob("a whole number", is_whole),
    "view": one_of(None, "stack", "conv"),
    "maximize": SWITCH,
    "grad_power": number(0, above=True),
    "cautious_decay": SWITCH,
}

# keys that torch, its schedulers, timm and our own `param_groups` put into a group; they pass unchecked
PASSED = frozenset(
    {"params", "param_names", "name", "foreach", "fused", "capturable", "differentiable"}
    | {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "lr_scale", "group_name"}
)

PER_STEP = PASSED | {"lr", "weight_decay"}  # may change between two steps: nothing is made anew for it


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the known word most like this one, or the list of them all."""
    close = closest(word, known)
    return f"Known: {', '.join(sorted(known))}." if close is None else f"Did you mean {close!r}?"


def find_rule(name: str) -> type[Rule]:
    """The rule of this name. Raises InputError, naming the nearest, where there is none."""
    if name not in RULES:
        raise InputError(f"no rule is called {name!r}. {nearest(str(name), RULES)}")
    return RULES[name]


@lru_cache(1 << 12)
def _made(cls: Callable[..., Rule], knobs: tuple[tuple[str, Any], ...]) -> Rule:
    return cls(**dict(knobs))


def make_rule(name: str, group: Group) -> Rule:
    """The rule of this name with the knobs that a group has for it. Equal knobs give the same object."""
    cls = find_rule(name)
    knobs = ((key, group[key]) for key in cls.knobs() if key in group)
    plain = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in knobs)
    return _made(cls, plain)  # type: ignore[arg-type]


def known_keys(rules: Iterable[type[Rule]]) -> dict[str, Knob]:
    """What a group of these rules may say."""
    return {**GENERAL, **{key: kind for rule in rules for key, kind in rule.knobs().items()}}


def tidy(group: Group) -> None:
    """Bring other spellings of values into the form in which they are kept."""
    if group.get("proj") == RANDOM:
        group["proj"] = "gaussian"
    if isinstance(group.get("state_dtype"), torch.dtype):
        group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")


def check_keys(
    keys: Mapping[str, Any], rules: Sequence[type[Rule]], where: str, what: str = "group", arguments: Iterable[str] = ()
) -> None:
    """Refuse a key that none of these rules knows, naming its owners or the nearest, and a value out of range.

    `arguments`: what else can be said where the keys are, so that it is suggested, too.
    """
    known = known_keys(rules)
    for key, value in keys.items():
        if key not in known:
            owners = [rule.name for rule in RULES.values() if key in rule.knobs()]
            hint = nearest(key, {*known, *arguments})
            if owners:
                hint = f"It is a key of {', '.join(owners)}; this {what} uses {rules[0].name!r}. Leave it out"
            raise InputError(f"{where}: unknown key {key!r}. {hint}")
        if not known[key].fits(value):
            raise InputError(f"{where}: {key}={value!r}, but it must be {known[key].wanted}")


def check_idle(said: Mapping[str, Any], rule: type[Rule], group: Group, where: str) -> None:
    """Refuse a knob that was said although a switch of the group leaves it nothing to do (`Rule.idle`)."""
    for switch, knobs in rule.idle.items():
        if group.get(switch) and (idle := sorted(knobs & said.keys())):
            raise InputError(
                f"{where} is {switch}: {idle[0]}={said[idle[0]]!r} would change nothing. Leave it out, or ask for "
                f"{switch}=False"
            )


def check_group(group: Group, owner: str) -> None:
    """Refuse what a group must not say, naming the key, and bring it into the form in which it is kept.

    Raises InputError (a ValueError) for an unknown rule or key, a key of another rule, a value out of range, a key that
    its rule needs and lacks, and parameters that no step could be right for.
    """
    where = f"{owner}, group {group['name']!r}" if "name" in group else owner
    rules = [find_rule(group[key]) for key in ("rule", "otherwise")]
    if group.pop("proj_type", "std") != "std":
        raise InputError(
            f'{where}: proj_type must be "std": the side to compress is always the smaller one (the paper\'s rule), so '
            "the other types of apollo-torch have nothing to choose; leave the key out"
        )
    tidy(group)
    check_keys({key: value for key, value in group.items() if key not in PASSED}, rules, where)
    lacking = [key for key in rules[0].knobs() if key not in group and key not in rules[0].defaults()]
    if lacking:
        raise InputError(f"{where}: the rule {group['rule']!r} needs {lacking[0]}")
    for entry in group["params"]:
        check_parameter(entry[1] if isinstance(entry, tuple) else entry, where)


def check_parameter(p: Any, where: str) -> None:
    """Refuse FSDP1's flat parameters and what is not a float of at most 32 bits."""
    if not isinstance(p, Tensor):
        return  # torch says it better
    if hasattr(p, "_fsdp_flattened"):
        raise InputError(
            f"{where}: a flat parameter of FSDP1, of which no matrix can be seen. Shard with FSDP2 instead: "
            "torch.distributed.fsdp.fully_shard (transformers and accelerate: fsdp_version: 2)"
        )
    if not p.is_floating_point():
        raise InputError(f"{where}: a parameter of dtype {p.dtype}; only real floating-point ones can be stepped")
    if p.dtype is torch.float64:
        raise InputError(f"{where}: a parameter of dtype torch.float64; steps compute in float32: convert the model")


def refuse_flat(p: Tensor, group: Group, owner: str) -> None:
    """Raise InputError where other tools have put flat partitions in the place of a group's matrices.

    Their rule applies to none of them, so that everything would use `otherwise` without a word.
    """
    if p.ndim > 1 or find_rule(group["rule"]).view == "any" or any(q.ndim > 1 for q in group["params"]):
        return
    raise InputError(
        f"{owner}: flat parameters (partitions of DeepSpeed ZeRO, FSDP1) took the place of the matrices of group "
        f"{group.get('name', '')!r}, and {group['rule']!r} needs rows and columns. Shard with FSDP2 instead "
        "(torch.distributed.fsdp.fully_shard), or let the group use adamw"
    )
