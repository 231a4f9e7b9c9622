"""A saved state, brought into the form of the optimizer that loads it, or refused before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.errors import InputError
from apollo_optim.core.place import is_sharded, whole
from apollo_optim.optim.knobs import Group, check_group, find_rule, is_lr, known_keys, make_rule
from apollo_optim.optim.parameter import init_state
from apollo_optim.rules import RULES

State = dict[str, Any]


def fit_groups(ours: list[Group], saved: list[Group] | None, owner: str) -> list[Group]:
    """The saved groups, their parameters in our order where both sides have names, new keys at their present values.

    Raises InputError for groups that are not of this library, or use another rule, or keep something else.
    """
    if saved is None:
        raise InputError(f"this is no state of an optimizer: it has no param_groups. {owner}.state_dict() makes one")
    if len(saved) != len(ours):
        raise InputError(
            f"the saved state has {len(saved)} parameter groups, this {owner} {len(ours)}. Build the model and its "
            "param_groups as they were when it was saved"
        )
    fitted, everywhere = [], _keys(saved)
    for number, (mine, theirs) in enumerate(zip(ours, saved, strict=True)):
        if "rule" not in theirs:
            raise InputError(f"this state is not {owner}'s: its param_groups name no rule")
        if theirs["rule"] != mine["rule"]:
            raise InputError(
                f"group {number} uses {mine['rule']!r} here and {theirs['rule']!r} in the saved state: build the "
                "optimizer as it was when it was saved"
            )
        if len(theirs["params"]) != len(mine["params"]):
            raise InputError(
                f"group {number} has {len(mine['params'])} parameters here and {len(theirs['params'])} in the saved "
                "state. Build the model and its param_groups as they were when it was saved"
            )
        strange = everywhere - _keys([theirs])  # torch's OneCycleLR gives its `momentum` to every group
        group = {**{key: value for key, value in mine.items() if key not in ("params", "param_names")}, **theirs}
        group = {key: value for key, value in group.items() if key not in strange}
        check_group({**group, "params": []}, f"{owner}, saved state")
        if not is_lr(peak := group.get("initial_lr", 0.0)):
            raise InputError(
                f"{owner}, saved state: initial_lr={peak!r} of group {number}, but it must be a number >= 0"
            )
        if (here := _kept(mine)) != (there := _kept(group)):
            raise InputError(
                f"group {number} keeps {here} of a matrix here and {there} in the saved state: build the "
                "optimizer as it was when it was saved"
            )
        if "param_names" in mine and sorted(mine["param_names"]) == sorted(theirs.get("param_names", ())):
            ids = dict(zip(theirs["param_names"], theirs["params"], strict=True))
            group["params"], group["param_names"] = [ids[name] for name in mine["param_names"]], mine["param_names"]
        fitted.append(group)
    return fitted


def _kept(group: Group) -> str:
    """What its rule keeps, in words: `muon` has a momentum, or is stateless."""
    cls = find_rule(group["rule"])
    if not group.keys() >= cls.knobs().keys() - cls.defaults().keys():  # it has no matrices, and so no rank
        return "nothing"
    return ", ".join(make_rule(cls.name, group).slots((8, 8))) or "nothing"


def _keys(groups: list[Group]) -> Set[str]:
    """What groups of all the rules that these name may say."""
    names = {group.get(key) for group in groups for key in ("rule", "otherwise")}
    return known_keys(rule for name, rule in RULES.items() if name in names).keys()


def fit_state(p: Tensor, group: Group, saved: State, label: Any, owner: str) -> State:
    """The saved state of one parameter, every tensor of it a new one, in the dtype, split and place that it has here.

    Raises InputError where it is the state of another rule or of another shape.
    """
    expected = init_state(_like(p), group, 0)
    ours, theirs = ({k: tuple(getattr(v, "shape", ())) for k, v in s.items()} for s in (expected, saved))
    if ours != theirs:
        raise InputError(
            f"the saved state of parameter {label}, {tuple(p.shape)}, does not fit {find_rule(group['rule']).title}: "
            f"expected {ours}, found {theirs}. Build the model and its param_groups as they were when it was saved"
            if set(ours) & set(theirs)
            else f"the saved state of parameter {label} is not {owner}'s, and does not fit: it has {', '.join(theirs)}"
        )
    for name, value in saved.items():
        if _kind(value) != _kind(expected[name]):
            raise InputError(
                f"the saved state of parameter {label}: its {name} is {_kind(value)}, not {_kind(expected[name])}"
            )
    return {name: _fit(name, value, expected[name], p.device) for name, value in saved.items()}


def split_as(t: Tensor, like: Tensor) -> Tensor:
    """`t`, of which every rank has all, split as `like` of the same shape is."""
    if not is_sharded(like):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "a tensor of fractions" if value.is_floating_point() else "a tensor of whole numbers"


def _like(p: Tensor) -> Tensor:
    """On the meta device, where no state takes memory."""
    return p.detach().to("meta") if is_sharded(p) else torch.empty(p.shape, dtype=p.dtype, device="meta")


def _fit(name: str, value: Any, like: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    value = value.detach()
    if name == "step":
        return value.to("cpu", torch.float32, copy=True)
    if is_sharded(like):
        return value.to(device, copy=True) if is_sharded(value) else split_as(value.to(device), like)
    own = whole(value)  # in memory as the new state lies there, for which steps are compiled
    return torch.empty_like(like, dtype=own.dtype, device=device).copy_(own)
