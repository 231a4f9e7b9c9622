"""Which parameters follow the rule: by name, first match wins, and an empty match is an error."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apollo_optim.core.errors import InputError
from apollo_optim.core.names import as_tuple, matches, summary, with_matrices
from apollo_optim.core.storage import nbytes
from apollo_optim.optim.base import MatrixOptimizer
from apollo_optim.optim.knobs import RESTS, Group, check_parameter
from apollo_optim.optim.step import follows_rule, matrix_shape, rest_of

ALL_LINEAR = "all-linear"
HEAD_NAMES = ("lm_head", "embed_out", "output", "head", "score", "classifier")
SCALE_RULES: dict[str, Group] = {
    "embedding": {"normalize": "columns"},
    "head": {"normalize": "rows", "momentum": 0.9},
    "others": {"normalize": "rows"},
}
KINDS = ("matrices", "embedding", "head", "norms", "others")


def param_groups(
    model: nn.Module,
    *,
    rank: int | str | None,
    targets: str | Sequence[str] = ("attn", "mlp"),
    exclude: str | Sequence[str] = (),
    no_decay: str | Sequence[str] = ("bias", "norm"),
    rest: str = "adamw",
    rest_rank: int | None = None,
    rest_lr: float | None = None,
    embedding_lr: float | None = None,
    head_lr: float | None = None,
    norm_lr: float | None = None,
    **knobs: Any,
) -> list[Group]:
    """Named groups for an optimizer of this library: ``matrices`` follow the rule, the rest AdamW (or ``rest``).

    Groups are ``matrices``, ``embedding`` (a tied head is one), ``head``, ``norms`` (everything 0-D and 1-D) and, if
    there is something left, ``others``. Every parameter is in exactly one, frozen ones too, so that they can be
    unfrozen later; a tied one counts once.

    Args:
        rank: Of the projection. "auto" is a quarter of the most common small side (the paper's d/4). None makes the
            same groups without a rule, for AdamW.
        targets: Which modules' matrices follow the rule. Each is matched against the module's full name: a plain word
            as a substring, one with ``* ? [`` as a glob over the whole name, ``re:...`` as a regular expression that
            may match anywhere; ``"all-linear"`` is every ``nn.Linear`` and convolution but the head.
        exclude: Patterns of the same kind, over parameter names; what they match goes to ``others``.
        no_decay: Patterns over parameter names; what they match has ``weight_decay=0``.
        rest: What ``embedding``, ``head`` and ``others`` follow (norms and all that is 1-D always follow AdamW).
            "adamw"; "adamw8bit", its moments in 8 bits; "adafactor", second moments factored into rows and columns and
            no first (1804.04235); "scale", the gradient normalised - the head's rows after a momentum of 0.9, the
            embedding's columns, other matrices' rows (2506.16659); "apollo", the optimizer's own rule.
        rest_rank: With ``rest="apollo"``, their rank; None: the matrices'.
        rest_lr: Learning rate of all groups but ``matrices``.
        embedding_lr, head_lr, norm_lr: Learning rates of ``embedding``, ``head`` and ``norms`` apart; each falls back
            to ``rest_lr``, and that to the optimizer's ``lr``.
        **knobs: Go into every group that they mean something to: ``lr``, ``weight_decay``, ... into all, the rule's own
            (``scale``, ``proj``, ...) into ``matrices``.

    Raises InputError for a target, an exclusion that matches nothing, listing what exists, for a ``rest`` that is none
    of these, for ``rest="apollo"`` without a rank, and for the rate of a group that this model does not have.
    """
    if rest not in RESTS:
        raise InputError(f"rest={rest!r}, but it must be one of {', '.join(map(repr, RESTS))}")
    if rest == "apollo" and rank is None:
        raise InputError("rest='apollo' is the rule of an optimizer with a rank: name a rank, or choose another rest")
    if rest != "apollo" and rest_rank is not None:
        raise InputError(f"rest_rank={rest_rank} means nothing to rest={rest!r}: only rest='apollo' has a rank")
    targets, exclude, no_decay = (as_tuple(x) for x in (targets, exclude, no_decay))
    owners = _owners(model)
    head = _head_of(model)
    used: Counter[str] = Counter()
    members: dict[tuple[str, bool, bool], list[tuple[str, Tensor]]] = {}
    for name, p in model.named_parameters():
        check_parameter(p, f"parameter {name!r}")  # before a flat one makes every target look like a typo
        kind = _kind(name, p, owners[p], head, targets, exclude, used)
        decays = not any(matches(pattern, name) for pattern in no_decay)
        shaped = kind == "matrices" or (kind == "others" and rest != "adamw")
        conv = shaped and any(isinstance(module, nn.modules.conv._ConvNd) for _, module in owners[p])
        members.setdefault((kind, decays, conv), []).append((name, p))
    _check_cover(targets, exclude, used, model)
    apart = {"embedding": embedding_lr, "head": head_lr, "norms": norm_lr}
    rates = _rates(rest_lr, apart, {kind for kind, _, _ in members})

    rule = None if rank is None else {"rank": _quarter(members) if rank == "auto" else rank}
    shared = {key: knobs.pop(key) for key in [*knobs] if key in _EVERYWHERE}
    groups = []
    for kind, decays, conv in sorted(members, key=lambda key: (KINDS.index(key[0]), not key[1], key[2])):
        alone = sum(other[0] == kind for other in members) == 1
        named = members[kind, decays, conv]
        group: Group = {
            "name": kind + ("" if alone else ("_conv" if conv else "") + ("" if decays else "_no_decay")),
            "params": [p for _, p in named],
            **shared,
        }
        if not decays:
            group["weight_decay"] = 0.0
        if kind == "matrices":
            group |= knobs | (rule or {}) | ({"view": "conv"} if conv and rule else {})
        elif kind != "norms" and rest != "adamw":
            group |= {"rest": rest} | ({"view": "conv"} if conv else {})
            if rest == "scale":
                group |= SCALE_RULES[kind]
            elif rest == "apollo":
                group |= knobs | (rule or {}) | ({} if rest_rank is None else {"rank": rest_rank})
        if (lr := rates.get(kind)) is not None:
            group["lr"] = lr
        groups.append(group)
    return groups


_EVERYWHERE = {"lr", "betas", "eps", "weight_decay", "state_dtype", "stochastic_rounding", "seed", "maximize"}
_INSTEAD = {
    "embedding": "No nn.Embedding has weights here: leave the key out",
    "head": "A head tied to the embedding follows embedding_lr, one that is a target follows lr: leave the key out",
    "norms": "No parameter of it is 0-D or 1-D: leave the key out",
}


def _rates(rest_lr: float | None, apart: dict[str, float | None], kinds: set[str]) -> dict[str, float | None]:
    """Of every kind but ``matrices``, its own learning rate or the rest's; None: the optimizer's."""
    for kind, lr in apart.items():
        if lr is not None and kind not in kinds:
            raise InputError(f"{kind.removesuffix('s')}_lr={lr}: this model has no such group. {_INSTEAD[kind]}")
    return {kind: rest_lr if lr is None else lr for kind, lr in apart.items()} | {"others": rest_lr}


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[str, nn.Module]]]:
    """Every module that holds a parameter directly, with its name: more than one where weights are tied."""
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append((name, module))
    return owners


def _head_of(model: nn.Module) -> nn.Module | None:
    """The output layer: as transformers names it, else a last child with one of the customary names."""
    if callable(getattr(model, "get_output_embeddings", None)):
        head = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, nn.Module):
            return head
    by_name = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    return next((by_name[name] for name in HEAD_NAMES if name in by_name), None)


def _kind(
    name: str,
    p: Tensor,
    owners: list[tuple[str, nn.Module]],
    head: nn.Module | None,
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    used: Counter[str],
) -> str:
    excluded = [pattern for pattern in exclude if matches(pattern, name)]
    used.update(excluded)
    if p.ndim < 2:
        return "norms"
    if any(isinstance(module, nn.Embedding) for _, module in owners):
        return "embedding"
    for module_name, module in owners:
        is_head = module is head
        for target in targets:
            linear = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not is_head
            if (linear if target == ALL_LINEAR else matches(target, module_name)) and not excluded:
                used[target] += 1
                return "matrices"
        if is_head:
            return "head"
    return "others"


def _check_cover(targets: tuple[str, ...], exclude: tuple[str, ...], used: Counter[str], model: nn.Module) -> None:
    modules = with_matrices(model.named_parameters(remove_duplicate=False))
    # a second target may find all its modules taken by the first one: that is no typo
    idle = [t for t in targets if not used[t] and not any(matches(t, name) for name in modules)]
    idle += [pattern for pattern in exclude if not used[pattern]]
    if idle:
        raise InputError(f"{idle[0]!r} matches nothing in this model. Modules with matrices: {summary(modules)}")


def _quarter(members: dict[tuple[str, bool, bool], list[tuple[str, Tensor]]]) -> int:
    sides = Counter(
        min(matrix_shape(tuple(p.shape), "conv" if conv else None)[-2:])
        for (kind, _, conv), named in members.items()
        if kind == "matrices"
        for _, p in named
    )
    return max(1, sides.most_common(1)[0][0] // 4)


def describe(optimizer: MatrixOptimizer) -> str:
    """The table of what follows what: tensors, parameters and bytes of optimizer state, per group and shape.

    The bytes are counted on the state that the optimizer itself makes, on the meta device.
    """
    rows: list[tuple[str, ...]] = [("group", "follows", "tensors", "shape", "parameters", "state bytes", "lr")]
    totals = [0, 0, 0]
    for number, group in enumerate(optimizer.param_groups):
        kinds: dict[tuple[tuple[int, ...], bool], list[Tensor]] = {}
        for p in group["params"]:
            kinds.setdefault((tuple(p.shape), follows_rule(p, group)), []).append(p)
        for (shape, _), params in kinds.items():
            size = sum(state_bytes(optimizer, p, group) for p in params)
            counts = len(params), sum(p.numel() for p in params), size
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            follows = what_follows(optimizer, params[0], group)
            dims = " x ".join(map(str, shape)) or "scalar"
            name = str(group.get("name", number))
            rows.append((name, follows, f"{counts[0]:,}", dims, f"{counts[1]:,}", f"{size:,}", f"{group['lr']:g}"))
    rows.append(("total", "", *(f"{t:,}" for t in totals[:1]), "", *(f"{t:,}" for t in totals[1:]), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = "<<><>>>"
    lines = ["  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def what_follows(optimizer: MatrixOptimizer, p: Tensor, group: Group) -> str:
    """The rule that ``p`` follows in this group, in the table's words."""
    if follows_rule(p, group):
        return f"{type(optimizer).__name__} r={group['rank']}"
    rest = rest_of(p, group)
    if rest == "scale":
        momentum = f", momentum {group['momentum']}" if group.get("momentum") else ""
        return f"SCALE ({group.get('normalize', 'rows')}{momentum})"
    if rest != "adamw":
        return {"adamw8bit": "AdamW 8-bit", "adafactor": "Adafactor"}[rest]
    if group.get("rank") and p.ndim > 1:
        return "AdamW (small side <= rank)"
    return "AdamW (not in 8 bits)" if group.get("rest") == "adamw8bit" and p.ndim > 1 else "AdamW"


def state_bytes(optimizer: MatrixOptimizer, p: Tensor, group: Group) -> int:
    """Bytes that ``p`` will keep between steps, all of its tensors counted, ``step`` too."""
    stand_in = torch.empty(p.shape, dtype=p.dtype, device="meta")
    state: Iterable[Any] = optimizer.init_state(stand_in, group).values()
    return sum(nbytes(t) for t in state if isinstance(t, Tensor))
