"""The keys of a parameter group: what each may be, and what a wrong one is told."""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apollo_optim.core.errors import InputError
from apollo_optim.core.project import PROJECTIONS

Group = dict[str, Any]


class Knob(NamedTuple):
    wanted: str
    fits: Callable[[Any], bool]


def _number(low: float, *, above: bool = False, below: float = math.inf) -> Callable[[Any], bool]:
    def fits(x: Any) -> bool:
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            return False
        return (x > low if above else x >= low) and x < below

    return fits


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda x: any(x is v or (isinstance(v, str) and x == v) for v in values)


def _is_lr(x: Any) -> bool:
    return (isinstance(x, Tensor) and x.numel() == 1) or _number(0)(x)


def _are_betas(x: Any) -> bool:
    return isinstance(x, (tuple, list)) and len(x) == 2 and all(_number(0, below=1)(b) for b in x)


def _count(low: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= low


def _or(value: Any, fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is value or (isinstance(value, str) and x == value) or fits(x)


RESTS = ("adamw", "adamw8bit", "adafactor", "scale", "apollo")
REST_KNOBS = frozenset({"rest", "normalize", "momentum"})  # what a group without a rank may say (optim/rest.py)
RANDOM = "random"  # apollo-torch's name for what it draws, a Gaussian
KNOBS: dict[str, Knob] = {
    "lr": Knob("a number >= 0", _is_lr),
    "betas": Knob("two numbers in [0, 1)", _are_betas),
    "eps": Knob("a number >= 0", _number(0)),
    "weight_decay": Knob("a number >= 0", _number(0)),
    "rank": Knob("a whole number >= 1, or None for AdamW", _or(None, _count(1))),
    "scale": Knob('a number > 0, or "auto" (d / rank)', _or("auto", _number(0, above=True))),
    "scale_type": Knob('"channel" or "tensor"', _one_of("channel", "tensor")),
    "scale_front": Knob("True or False", _one_of(True, False)),
    "proj": Knob(f"one of {', '.join(map(repr, (*PROJECTIONS, RANDOM)))}", _one_of(*PROJECTIONS, RANDOM)),
    "proj_type": Knob(
        '"std": the side to compress is always the smaller one (the paper\'s rule), so the other types of apollo-torch '
        "have nothing to choose; leave the key out",
        _one_of("std"),
    ),
    "update_proj_gap": Knob("a whole number >= 1", _count(1)),
    "keep_proj": Knob("True or False", _one_of(True, False)),
    "norm_growth": Knob("a number >= 1, or None for no limit", _or(None, _number(1))),
    "state_dtype": Knob("torch.float32 or torch.bfloat16", _one_of(torch.float32, torch.bfloat16)),
    "stochastic_rounding": Knob("True or False", _one_of(True, False)),
    "seed": Knob("a whole number", lambda x: isinstance(x, int) and not isinstance(x, bool)),
    "rest": Knob(f"one of {', '.join(map(repr, RESTS))}", _one_of(*RESTS)),
    "normalize": Knob('"rows" or "columns"', _one_of("rows", "columns")),
    "momentum": Knob("a number in [0, 1)", _number(0, below=1)),
    "view": Knob('None, "stack" or "conv"', _one_of(None, "stack", "conv")),
}
ADAMW_KNOBS = (
    frozenset({"lr", "betas", "eps", "weight_decay", "state_dtype", "stochastic_rounding", "seed", "view"}) | REST_KNOBS
)

# keys that torch, schedulers and our own param_groups put into a group; they pass unchecked
PASSED = frozenset(
    {"params", "param_names", "name", "initial_lr", "maximize", "foreach", "fused", "capturable", "differentiable"}
)


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the known word most like this one, or the list of them all."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def check_group(group: Group, defaults: Group, known: frozenset[str], owner: str) -> None:
    """Refuse what a group, or the constructor in its place, must not say, naming the key; resolve aliases.

    Raises InputError (a ValueError) for an unknown key, a value out of range, and parameters that no step could be
    right for: FSDP1's flat ones, complex and integer ones.
    """
    where = f"{owner}, group {group['name']!r}" if "name" in group else owner
    for key, value in {**defaults, **group}.items():
        if key in PASSED:
            continue
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}. {nearest(key, known)}")
        if not KNOBS[key].fits(value):
            raise InputError(f"{where}: {key}={value!r}, but it must be {KNOBS[key].wanted}")
    if group.get("proj", defaults.get("proj")) == RANDOM:
        group["proj"] = "gaussian"
    if group.get("rest") == "apollo" and group.get("rank", defaults.get("rank")) is None:
        raise InputError(
            f"{where}: rest='apollo' needs a rank of its own: the group then follows its optimizer's rule. "
            "param_groups(..., rest='apollo', rest_rank=...) names one; AdamW has none"
        )
    if isinstance(group["params"], set):
        return  # torch refuses it: a set has no order
    group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    for entry in group["params"]:
        check_parameter(entry[1] if isinstance(entry, tuple) else entry, where)


def check_parameter(p: Any, where: str) -> None:
    if not isinstance(p, Tensor):
        return  # torch says it better
    if hasattr(p, "_fsdp_flattened"):
        raise InputError(
            f"{where}: a flat parameter of FSDP1, of which no matrix can be seen. Shard with FSDP2 instead: "
            "torch.distributed.fsdp.fully_shard (transformers and accelerate: fsdp_version: 2)"
        )
    if not p.is_floating_point():
        raise InputError(f"{where}: a parameter of dtype {p.dtype}; only real floating-point ones can be stepped")


def decide_rank(params: Iterable[Any], defaults: Group, owner: str) -> tuple[list[Any], Group]:
    """Only a group that names ``rank`` follows the rule; the constructor's applies where no group names one."""
    entries = list(params)
    if "rank" not in defaults:
        return entries, defaults
    if any(isinstance(entry, dict) and "rank" in entry for entry in entries):
        return entries, {**defaults, "rank": None}
    if defaults["rank"] is None:
        raise InputError(
            f"{owner} has no rank: no parameter group names one, so every parameter would follow AdamW. Use "
            f"{owner}(apollo_optim.param_groups(model, rank=...)), or pass rank= to compress every matrix, "
            "embeddings included"
        )
    return entries, defaults
