"""Which parameter uses which rule: by name, first match wins, and an empty match is an error."""

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from apollo_optim.core.errors import InputError
from apollo_optim.core.matrix import matrix_shape
from apollo_optim.core.names import (
    ALL_LINEAR,
    as_tuple,
    head_of,
    is_linear,
    is_norm,
    is_pattern,
    is_router,
    is_vector,
    matches,
    unmatched,
    with_matrices,
)
from apollo_optim.optim.knobs import (
    GENERAL,
    PASSED,
    Group,
    check_group,
    check_parameter,
    find_rule,
    known_keys,
    make_rule,
    nearest,
)
from apollo_optim.optim.parameter import applies
from apollo_optim.rules import RULES

KINDS = ("matrices", "embedding", "head", "norms", "others")
CODES = ("8bit", "4bit")


def param_groups(
    model: nn.Module,
    *,
    rank: int | str | None,
    rule: str | None = None,
    targets: str | Sequence[str] = ("attn", "mlp"),
    exclude: str | Sequence[str] = (),
    no_decay: str | Sequence[str] = (),
    rest: str = "adamw",
    rest_rank: int | str | None = None,
    rest_lr: float | None = None,
    embedding_lr: float | None = None,
    head_lr: float | None = None,
    norm_lr: float | None = None,
    embedding: str | None = None,
    head: str | None = None,
    others: str | None = None,
    **knobs: Any,
) -> list[Group]:
    """Named groups for an optimizer of this library: `matrices` use its rule, all else AdamW (or `rest`).

    Groups are `matrices`, `embedding` (a tied head is one), `head`, `norms` (everything 0-D and 1-D) and, if there is
    something left, `others`. Every parameter is in exactly one, frozen ones too, so that they can be unfrozen later; a
    tied one counts once.

    Args:
        rank: Of the projection. "auto" is a quarter of the most common small side (the paper's d/4). None makes the
            same groups without one, for AdamW and all rules that have no rank.
        rule: Of `matrices`; matrices that it does not apply to are `others` then. None: the rule is that of the
            optimizer that the groups are for, which looks at their shapes later.
        targets: Which modules' matrices use the rule. Each is matched against the module's full name: a plain word
            as a substring, one with `* ? [` as a glob over the whole name, `re:...` as a regular expression that
            may match anywhere; `"all-linear"` is every matrix that activations are multiplied by - linear layers,
            convolutions, recurrent and attention weights, stacks of experts - but the head. A mixture's router is left
            to `others` unless a glob or a regular expression names it.
        exclude: Patterns of the same kind, over parameter names; what they match goes to `others`.
        no_decay: Patterns over parameter names; what they match has `weight_decay=0`; so has, by what it is and not by
            what it is called, all that is 0-D or 1-D, the biases of experts, a normalisation's weights, and what its
            model marks (`_no_weight_decay`, as Mamba's `A_log`).
        rest: What `embedding`, `head` and `others` use (norms and all that is 1-D always use AdamW): the name of
            a rule ("adamw"; "adafactor", second moments factored into rows and columns and no first; "scale", the
            gradient normalised - the head's rows after a momentum of 0.9, the embedding's columns, other matrices'
            rows; ...), with "8bit" or "4bit" after it if its state is to be stored so ("adamw8bit"). Where no `rule` is
            named, "apollo" is the optimizer's own, if it has a rank.
        rest_rank: Their rank, if they use a rule with one; None: the rule's own or, as "auto", a quarter of the most
            common small side of the matrices; with `rest="apollo"` the matrices'.
        rest_lr: Learning rate of all groups but `matrices`.
        embedding_lr: Of `embedding` apart; falls back to `rest_lr`, and that to the optimizer's `lr`.
        head_lr: The same of `head`.
        norm_lr: The same of `norms`.
        embedding: As `rest`, for `embedding` alone.
        head: As `rest`, for `head` alone.
        others: As `rest`, for `others` alone.
        **knobs: Go into every group that they mean something to: `lr`, `weight_decay`, ... into all, the rule's own
            (`scale`, `proj`, ...) into `matrices`, `betas` and `eps` into all that are Adam's. Where a `rule` is named,
            a knob that it does not have is one of the other groups' rules.

    Raises InputError for a knob of no rule, naming the nearest, for a target, an exclusion that matches nothing,
    listing what exists, for a `rest` that is no rule, for `rest="apollo"` without a rank, for a `rule` that no matrix
    can follow, and for the rate of a group that this model does not have.
    """
    known = {*known_keys(RULES.values()), *PASSED, "proj_type"}
    if unknown := [key for key in knobs if key not in known]:
        raise InputError(f"param_groups: unknown key {unknown[0]!r}. {nearest(unknown[0], known | ARGUMENTS)}")
    choices = {"embedding": embedding or rest, "head": head or rest, "others": others or rest, "norms": "adamw"}
    own_rule = "apollo" if rule is None else rule  # what the choices call the rule of the matrices
    if rule is None and rank is None and own_rule in choices.values():
        raise InputError("rest='apollo' is the rule of an optimizer with a rank: name a rank, or another rest")
    theirs = {choice: rule_and_codec(choice) for choice in choices.values()}
    if rest_rank is not None and not any("rank" in find_rule(their["rule"]).knobs() for their in theirs.values()):
        raise InputError(f"rest_rank={rest_rank} means nothing to rest={rest!r}, which has no rank: leave it out")
    targets, exclude, no_decay = (as_tuple(x) for x in (targets, exclude, no_decay))
    owners = _owners(model)
    output = head_of(model)
    used: Counter[str] = Counter()
    members: dict[tuple[str, bool, bool], list[tuple[str, Tensor]]] = {}
    for name, p in model.named_parameters():
        check_parameter(p, f"parameter {name!r}")  # before a flat one makes every target look like a typo
        kind = _kind(name, p, owners[p], output, model, targets, exclude, used)
        marked = getattr(p, "_no_weight_decay", False) or any(is_norm(module) for _, module in owners[p])
        decays = not (kind == "norms" or marked or any(matches(pattern, name) for pattern in no_decay))
        shaped = kind == "matrices" or (kind == "others" and choices["others"] != "adamw")
        conv = shaped and any(isinstance(module, nn.modules.conv._ConvNd) for _, module in owners[p])
        members.setdefault((kind, decays, conv), []).append((name, p))
    _check_cover(targets, exclude, used, model)

    quarter = _quarter(members)
    rest_rank = quarter if rest_rank == "auto" else rest_rank
    own = knobs | ({} if rank is None else {"rank": quarter if rank == "auto" else rank})
    elsewhere: Group = {} if rest_rank is None else {"rank": rest_rank}
    if rule is not None:
        own |= rule_and_codec(rule)
        known = {key for their in theirs.values() for key in find_rule(their["rule"]).knobs()}
        foreign = known - find_rule(own["rule"]).knobs().keys()
        elsewhere = {key: own.pop(key) for key in foreign if key in own} | elsewhere
        _move_small(members, own, shaped=choices["others"] != "adamw")
    apart = {"embedding": embedding_lr, "head": head_lr, "norms": norm_lr}
    rates = _rates(rest_lr, apart, {kind for kind, _, _ in members})
    groups = []
    for kind, decays, conv in sorted(members, key=lambda key: (KINDS.index(key[0]), not key[1], key[2])):
        alone = sum(other[0] == kind for other in members) == 1
        named = members[kind, decays, conv]
        group: Group = {
            "name": kind + ("" if alone else ("_conv" if conv else "") + ("" if decays else "_no_decay")),
            "params": [p for _, p in named],
            "param_names": [name for name, _ in named],
        }
        if kind == "matrices":
            group |= own
        elif choices[kind] == own_rule and kind != "norms":
            group |= {
                **find_rule(own.get("rule", own_rule)).by_kind.get(kind, {}),
                **own,
                **({} if rest_rank is None else {"rank": rest_rank}),
            }
        else:
            group |= _of_rest(kind, theirs[choices[kind]], knobs, elsewhere, quarter)
        group |= {"view": "conv"} if conv else {}
        group |= {} if decays else {"weight_decay": 0.0}
        group |= {} if rates.get(kind) is None else {"lr": rates[kind]}
        groups.append(group)
    return groups


ARGUMENTS = frozenset(inspect.signature(param_groups).parameters) - {"model", "knobs"}


def _of_rest(kind: str, their: Group, knobs: Group, elsewhere: Group, quarter: int) -> Group:
    """What a group says that does not use the rule of the matrices, but `their` rule."""
    cls = find_rule(their["rule"])
    known = cls.knobs().keys() & {"betas", "eps"} | GENERAL.keys() - {"rule"}
    group = {key: value for key, value in knobs.items() if key in known} | their
    group |= cls.by_kind.get(kind, {})
    group |= {"rank": quarter} if "rank" in cls.knobs().keys() - cls.defaults().keys() else {}
    return group | {key: value for key, value in elsewhere.items() if key in cls.knobs()}


_INSTEAD = {
    "embedding": "No nn.Embedding has weights here: leave the key out",
    "head": "A head tied to the embedding goes with it (embedding_lr), one that is a target with the matrices (lr): "
    "leave the key out",
    "norms": "No parameter of it is 0-D or 1-D: leave the key out",
}


def _rates(rest_lr: float | None, apart: dict[str, float | None], kinds: set[str]) -> dict[str, float | None]:
    """Of every kind but `matrices`, its own learning rate or the rest's; None: the optimizer's."""
    for kind, lr in apart.items():
        if lr is not None:
            refuse_missing(f"{kind.removesuffix('s')}_lr={lr}", kind, kinds)
    return {kind: rest_lr if lr is None else lr for kind, lr in apart.items()} | {"others": rest_lr}


def kind_of(group: Group) -> str:
    """Of a group of `param_groups`, whose name begins with it: `head` of `head_no_decay`."""
    return str(group["name"]).partition("_")[0]


def refuse_missing(said: str, kind: str, kinds: set[str]) -> None:
    """Raise InputError for what is `said` of the group of a kind that the model does not have."""
    if kind not in kinds:
        raise InputError(f"{said}: this model has no such group. {_INSTEAD[kind]}")


def rule_and_codec(choice: str) -> Group:
    """What "adamw" or "adamw8bit" means for a group. Raises InputError where no rule is called so."""
    codec = next((codec for codec in CODES if choice.endswith(codec)), None)
    rule = find_rule(choice if codec is None else choice.removesuffix(codec))
    return {"rule": rule.name} | ({} if codec is None else {"state_dtype": codec})


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[str, nn.Module]]]:
    """Every module that holds a parameter directly, with its name: more than one where weights are tied."""
    owners: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append((name, module))
    return owners


def _kind(
    name: str,
    p: Tensor,
    owners: list[tuple[str, nn.Module]],
    head: nn.Module | None,
    model: nn.Module,
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    used: Counter[str],
) -> str:
    excluded = [pattern for pattern in exclude if matches(pattern, name)]
    used.update(excluded)
    if is_vector(name, p):
        return "norms"
    if any(isinstance(module, nn.Embedding) for _, module in owners):
        return "embedding"
    for module_name, module in owners:
        is_head = module is head
        linear, router = not is_head and is_linear(module, module_name, p), is_router(module, module_name, model)
        for target in targets:
            if router and not is_pattern(target):
                continue
            if (linear if target == ALL_LINEAR else matches(target, module_name)) and not excluded:
                used[target] += 1
                return "matrices"
        if is_head:
            return "head"
    return "others"


def _check_cover(targets: tuple[str, ...], exclude: tuple[str, ...], used: Counter[str], model: nn.Module) -> None:
    modules = with_matrices(model.named_parameters(remove_duplicate=False))
    # a second target may find all its modules taken by the first one: that is no typo
    for target in targets:
        if not used[target] and not any(matches(target, name) for name in modules):
            raise InputError(unmatched(target, modules))
    for pattern in exclude:
        if not used[pattern]:
            raise InputError(unmatched(pattern, modules, target=False))


def _quarter(members: dict[tuple[str, bool, bool], list[tuple[str, Tensor]]]) -> int:
    trained = any(p.requires_grad for (kind, _, _), named in members.items() if kind == "matrices" for _, p in named)
    sides = Counter(
        min(matrix_shape(tuple(p.shape), "conv" if conv else None)[-2:])
        for (kind, _, conv), named in members.items()
        if kind == "matrices"
        for _, p in named
        if p.requires_grad or not trained
    )
    return max(1, sides.most_common(1)[0][0] // 4) if sides else 1


def _move_small(members: dict[tuple[str, bool, bool], list[tuple[str, Tensor]]], own: Group, shaped: bool) -> None:
    """Make `others` of the matrices that their rule does not apply to."""
    group = {"otherwise": "adamw", **own, "params": []}
    check_group(group, "param_groups")
    rule = make_rule(group["rule"], group)
    for _, decays, conv in [key for key in members if key[0] == "matrices"]:
        for named in members.pop(("matrices", decays, conv)):
            fits = applies(rule, named[1], "conv" if conv else group.get("view"))
            key = ("matrices", decays, conv) if fits else ("others", decays, conv and shaped)
            members.setdefault(key, []).append(named)
    if not any(kind == "matrices" for kind, _, _ in members):
        why = ": every small side is no larger. Choose a smaller rank"
        why = f" at rank {group['rank']}{why}" if "rank" in group else ""
        raise InputError(f"{rule.name}: no matrix uses the rule{why}")
