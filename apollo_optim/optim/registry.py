"""Every optimizer by name: to be registered is to be tested, planned, benched and documented."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from apollo_optim.core.errors import InputError
from apollo_optim.core.storage import writes_itself
from apollo_optim.optim.adamw import AdamW
from apollo_optim.optim.apollo import Apollo, ApolloMini
from apollo_optim.optim.base import MatrixOptimizer
from apollo_optim.optim.groups import param_groups
from apollo_optim.optim.knobs import REST_KNOBS, nearest
from apollo_optim.optim.step import follows_rule


class OptimizerInfo(NamedTuple):
    name: str
    cls: type[Apollo] | type[AdamW]
    summary: str
    paper: str
    defaults: dict[str, Any]  # what this entry sets; the class's own defaults fill the rest
    bits: int | None = None  # of the weights it is for: quantize_weights(model, bits) comes first


_REGISTRY = {
    info.name: info
    for info in (
        OptimizerInfo(
            "apollo",
            Apollo,
            "The gradient, each channel rescaled as Adam would have rescaled its random sketch; state 2nr per matrix.",
            "arXiv 2412.05270",
            {"rank": "auto"},
        ),
        OptimizerInfo(
            "apollo-mini",
            ApolloMini,
            "APOLLO with one factor per matrix and rank 1; state 2n per matrix.",
            "arXiv 2412.05270, section 4.3",
            {"rank": 1},
        ),
        OptimizerInfo(
            "apollo-svd",
            Apollo,
            "APOLLO on the gradient's top singular vectors, refreshed every 200 steps; state 2nr + dr per matrix.",
            "arXiv 2412.05270, section 5",
            {"rank": "auto", "proj": "svd"},
        ),
        OptimizerInfo(
            "q-apollo",
            Apollo,
            "APOLLO on weights of 8 bits (quantize_weights): no float copy of them exists.",
            "arXiv 2412.05270, section 5.3",
            {"rank": "auto"},
            bits=8,
        ),
        OptimizerInfo(
            "q-apollo-mini",
            ApolloMini,
            "APOLLO-Mini on weights of 8 bits (quantize_weights): no float copy of them exists.",
            "arXiv 2412.05270, section 5.3",
            {"rank": 1},
            bits=8,
        ),
        OptimizerInfo("adamw", AdamW, "torch.optim.AdamW's arithmetic; state 2dn per matrix.", "arXiv 1711.05101", {}),
    )
}


def list_optimizers() -> list[OptimizerInfo]:
    """What ``build_optimizer`` knows, in the order of registration."""
    return list(_REGISTRY.values())


def find_optimizer(name: str) -> OptimizerInfo:
    """The entry of this name. Raises InputError, naming the nearest, where there is none."""
    if name not in _REGISTRY:
        raise InputError(f"no optimizer is called {name!r}. {nearest(name, _REGISTRY)}")
    return _REGISTRY[name]


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float | None = None,
    rest_lr: float | None = None,
    embedding_lr: float | None = None,
    head_lr: float | None = None,
    norm_lr: float | None = None,
    rest: str = "adamw",
    rest_rank: int | None = None,
    rank: int | str | None = None,
    targets: str | Sequence[str] = ("attn", "mlp"),
    exclude: str | Sequence[str] = (),
    no_decay: str | Sequence[str] = ("bias", "norm"),
    compile: bool | None = None,
    **knobs: Any,
) -> MatrixOptimizer:
    """The optimizer of this name on ``param_groups(model, ...)``; ``None`` means its own default.

    Args:
        name: One of ``list_optimizers()``.
        lr: Of the matrices, and of everything else unless ``rest_lr`` says otherwise.
        embedding_lr, head_lr, norm_lr: Of these apart; each falls back to ``rest_lr``, and that to ``lr``.
        rest, rest_rank: What embedding, head and other matrices follow; see ``param_groups``.
        rank: A whole number, or "auto" (a quarter of the most common small side).
        **knobs: Any group key of the optimizer; see its docstring.

    Raises InputError for an unknown name or knob (naming the nearest), a target that matches nothing, a rank at which
    no matrix would follow the rule, the rate of a group that the model does not have, and for a float model where the
    optimizer is one for low-bit weights.
    """
    info = find_optimizer(name)
    if info.bits is not None and not any(writes_itself(p) for p in model.parameters()):
        raise InputError(
            f"{name} is for low-bit weights and this model has none: call "
            f"apollo_optim.quantize_weights(model, bits={info.bits}) first (4 bits are possible, too)"
        )
    known = info.cls.knobs - REST_KNOBS - (set() if "rank" in info.cls.knobs else {"view"})
    for key in knobs:
        if key not in known:
            raise InputError(f"optimizer {name!r} takes no {key!r}. {nearest(key, known)}")
    settings = {**info.defaults, **knobs} | ({} if lr is None else {"lr": lr})
    if "rank" not in info.cls.knobs and rank is not None:
        raise InputError(f"optimizer {name!r} has no rank: leave the key out")
    if "rank" not in info.cls.knobs and rest == "apollo":
        raise InputError(f"optimizer {name!r} has no rank, so rest='apollo' has no rule to follow. Choose another rest")
    default_rank = settings.pop("rank", None)
    groups = param_groups(
        model,
        rank=default_rank if rank is None else rank,
        targets=targets,
        exclude=exclude,
        no_decay=no_decay,
        rest=rest,
        rest_rank=rest_rank,
        rest_lr=rest_lr,
        embedding_lr=embedding_lr,
        head_lr=head_lr,
        norm_lr=norm_lr,
        **settings,
    )
    optimizer = info.cls(groups, compile=compile)
    in_force = [follows_rule(p, group) for group in optimizer.param_groups for p in group["params"]]
    if default_rank is not None and not any(in_force):
        raise InputError(
            f"{name}: no matrix follows the rule at rank {optimizer.param_groups[0].get('rank')}: every small side is "
            "no larger. Choose a smaller rank"
        )
    return optimizer
