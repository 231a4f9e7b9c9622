"""Which group uses which rule, and what it keeps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apollo_optim.core.errors import InputError
from apollo_optim.core.storage import nbytes
from apollo_optim.optim.knobs import Group
from apollo_optim.optim.parameter import chosen_rule, init_state, static_of

if TYPE_CHECKING:
    from apollo_optim.optim.optimizer import RuleOptimizer


def rule_of(parameter: Tensor, group: Group) -> str:
    """The name of the rule that steps `parameter` in `group`, one of an optimizer's `param_groups`.

    It is the group's `rule`, or its `otherwise` where that one does not apply to the parameter's shape.

    Raises InputError for a group that is no optimizer's yet, and where neither rule applies.
    """
    if not {"rule", "otherwise"} <= group.keys():
        raise InputError("rule_of: this group names no rule; give one of optimizer.param_groups")
    return chosen_rule(parameter, group).name


def describe(optimizer: RuleOptimizer) -> str:
    """The table of groups: rule, storage and bytes of the optimizer state, per group and shape.

    The bytes are counted on the state that the optimizer itself makes, on the meta device; what is frozen has none.
    """
    head = ("group", "rule", "state", "tensors", "shape", "parameters", "state bytes", "lr")
    rows: list[tuple[str, ...]] = [head]
    totals = [0, 0, 0]
    for number, group in enumerate(optimizer.param_groups):
        kinds: dict[tuple[tuple[int, ...], str, str], list[Tensor]] = {}
        for p in (p for p in group["params"] if p.requires_grad):
            kinds.setdefault((tuple(p.shape), *what_follows(p, group)), []).append(p)
        for (shape, follows, stored), params in kinds.items():
            size = sum(state_bytes(p, group) for p in params)
            counts = len(params), sum(p.numel() for p in params), size
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            dims = " x ".join(map(str, shape)) or "scalar"
            name, lr = str(group.get("name", number)), float(group["lr"])
            rows.append((name, follows, stored, f"{counts[0]:,}", dims, f"{counts[1]:,}", f"{size:,}", f"{lr:g}"))
    rows.append(("total", "", "", f"{totals[0]:,}", "", f"{totals[1]:,}", f"{totals[2]:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    align = "<<<><>>>"
    lines = ["  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def what_follows(p: Tensor, group: Group) -> tuple[str, str]:
    """The rule that steps `p` in this group, and how its moments are stored, in the table's words."""
    rule = chosen_rule(p, group)
    static = static_of(torch.empty(p.shape, device="meta"), group, rule)
    codecs = sorted({stored.codec.name for _, stored in static.slots if stored.slot.kind in ("mean", "square")})
    stored = "/".join(codecs) or ("float32" if static.slots else "none")
    asked = group["state_dtype"]
    if codecs == ["float32"] and asked != "float32" and p.ndim > 1:
        stored += f" (does not fit {asked})"
    said = rule.describe()
    follows = said if rule.name == group["rule"] or p.ndim < 2 else f"{said} (not {group['rule']}: too small)"
    return follows, stored


def state_bytes(p: Tensor, group: Group) -> int:
    """Bytes that `p` will keep between steps, all of its tensors counted, `step` too."""
    state: Any = init_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), group).values()
    return sum(nbytes(t) for t in state if isinstance(t, Tensor))


HIDDEN = ("matrices", "others")  # the groups of `param_groups` that hidden weights are in
NOT_HIDDEN = ("embedding", "head", "norms")


def warn_of_others(name: str, rule: str | None, groups: Sequence[Group]) -> None:
    """Warn where more than half of the hidden weights do not use the rule that was asked for.

    For the groups that `param_groups` makes, that is `rule`, or what `matrices` name; for all others - unless they
    follow what is there for the rest, as groups without a rank do - the one that the group names itself.
    """
    if rule is None:
        rule = next((group["rule"] for group in groups if str(group.get("name", "")).startswith("matrices")), None)
    total = left = 0
    for group in groups:
        kind = str(group.get("name", ""))
        asked = rule if rule is not None and kind.startswith(HIDDEN) else group["rule"]
        if kind.startswith(NOT_HIDDEN) or asked == group["otherwise"]:
            continue
        for p in (p for p in group["params"] if p.ndim > 1 and p.requires_grad):
            total += p.numel()
            left += p.numel() if chosen_rule(p, group).name != asked else 0
    if left > total / 2:
        warnings.warn(
            f"{name}: {left / total:.0%} of the hidden weights use another rule than the one asked for (see "
            'apollo_optim.describe): widen targets, for example to "all-linear", or lower the rank',
            stacklevel=4,
        )
