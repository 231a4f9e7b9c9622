"""What follows what, and what it keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.storage import nbytes
from apollo_optim.optim.knobs import Group
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.optim.parameter import chosen_rule, codec_of, init_state, static_of


def describe(optimizer: RuleOptimizer) -> str:
    """The table of what follows what: tensors, parameters and bytes of optimizer state, per group and shape.

    The bytes are counted on the state that the optimizer itself makes, on the meta device; what is frozen has none.
    """
    rows: list[tuple[str, ...]] = [("group", "follows", "tensors", "shape", "parameters", "state bytes", "lr")]
    totals = [0, 0, 0]
    for number, group in enumerate(optimizer.param_groups):
        kinds: dict[tuple[tuple[int, ...], str], list[Tensor]] = {}
        for p in (p for p in group["params"] if p.requires_grad):
            kinds.setdefault((tuple(p.shape), what_follows(p, group)), []).append(p)
        for (shape, follows), params in kinds.items():
            size = sum(state_bytes(p, group) for p in params)
            counts = len(params), sum(p.numel() for p in params), size
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            dims = " x ".join(map(str, shape)) or "scalar"
            name, lr = str(group.get("name", number)), float(group["lr"])
            rows.append((name, follows, f"{counts[0]:,}", dims, f"{counts[1]:,}", f"{size:,}", f"{lr:g}"))
    rows.append(("total", "", *(f"{t:,}" for t in totals[:1]), "", *(f"{t:,}" for t in totals[1:]), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = "<<><>>>"
    lines = ["  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def what_follows(p: Tensor, group: Group) -> str:
    """The rule that steps `p` in this group, and how its state is stored, in the table's words."""
    rule = chosen_rule(p, group)
    static = static_of(torch.empty(p.shape, device="meta"), group, rule)
    codecs = {codec_of(name, stored.slot, group).name for name, stored in static.slots if stored.slot.kind in _STORED}
    asked = group["state_dtype"]
    said = rule.describe()
    if codecs - {"float32"}:
        said += f", {'/'.join(sorted(codecs))}"
    elif asked != "float32" and codecs and p.ndim > 1:
        said += f" (does not fit {asked})"
    return said if rule.name == group["rule"] or p.ndim < 2 else f"{said} (not {group['rule']}: too small)"


_STORED = ("mean", "square")


def state_bytes(p: Tensor, group: Group) -> int:
    """Bytes that `p` will keep between steps, all of its tensors counted, `step` too."""
    state: Any = init_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), group).values()
    return sum(nbytes(t) for t in state if isinstance(t, Tensor))
