"""apollo-torch's names on this library's rules: what `apollo-optim shim` puts in the place of that package.

    PYTHONPATH=$(apollo-optim shim) llamafactory-cli train run.yaml

Its public interface alone is kept, as transformers, LLaMA-Factory and axolotl use it: the constructor, the keys of its
groups and their defaults, and its leniency. What cannot be honoured is said once, in a warning.
"""

import warnings
from collections.abc import Iterable
from functools import cache
from itertools import count
from typing import Any

from torch import Tensor

from apollo_optim.core.errors import InputError
from apollo_optim.core.storage import writes_itself
from apollo_optim.optim.classes import Apollo
from apollo_optim.optim.knobs import PASSED, Group, find_rule, known_keys

__all__ = ["APOLLOAdamW", "QAPOLLOAdamW"]

_alone = count(1)
"""Numbers of the optimizers of one parameter each: seeds of their own."""


class APOLLOAdamW(Apollo):
    """`Apollo`, called as apollo-torch's optimizer is.

    A group that names a `rank` uses APOLLO, with apollo-torch's defaults for `proj` ("random"), `scale_type`
    ("channel"), `scale` (1), `update_proj_gap` (200) and `proj_type` ("std"); one that names none uses AdamW. Weight
    decay is that of each group, applied before the step. Keys that mean nothing here are left out, with a warning.

    Where each parameter has an optimizer of its own (layer-wise modes), each draws a projection of its own: their seeds
    count from 1 in the order in which they are made, and are part of their state.

    Args:
        params: Groups, or parameters.
        correct_bias: Always so; False is left out, with a warning.
        no_deprecation_warning: Nothing is deprecated.
        scale_front: That of `Apollo`.
        disable_nl: True is `norm_growth=None`, no limiter.

    Raises InputError (a ValueError) for values out of range, naming the key.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        scale_front: bool = False,
        disable_nl: bool = False,
    ) -> None:
        entries = list(params)
        groups = entries if any(isinstance(entry, dict) for entry in entries) else [{"params": entries}]
        groups = [{"rank": None, **group, "params": _listed(group["params"])} for group in groups]
        size = sum(len(group["params"]) for group in groups)
        if not correct_bias:
            _warn_once("correct_bias=False: the moments' bias is always corrected")
        if size > 1 and all(group["rank"] is None for group in groups):
            _warn_once("no group names a rank, so every parameter uses AdamW")
        super().__init__(
            groups, lr, (betas[0], betas[1]), eps, weight_decay, scale_front=scale_front, proj="gaussian",
            norm_growth=None if disable_nl else 1.01, seed=next(_alone) if size == 1 else 0,
        )  # fmt: skip

    def add_param_group(self, param_group: Group) -> None:
        """As torch's, of a group with apollo-torch's keys."""
        known = known_keys([find_rule("apollo"), find_rule("adamw")]).keys() | PASSED
        group = {key: value for key, value in param_group.items() if key in known}
        for key in sorted(param_group.keys() - known - {"proj_type"}):
            _warn_once(f"the key {key!r} of a group means nothing here and is left out")
        if param_group.get("proj_type", "std") != "std":
            _warn_once(
                f'proj_type="{param_group["proj_type"]}" cannot be honoured: the side that is compressed is always the '
                'smaller one, as by "std"'
            )
        super().add_param_group({"rank": None, **group})


class QAPOLLOAdamW(APOLLOAdamW):
    """The same, for weights that `apollo_optim.quantize_weights` keeps in 8 or 4 bits.

    Raises InputError for a float matrix in a group that names a `rank`: weights that another library quantised cannot
    be stepped by this one.
    """

    def add_param_group(self, param_group: Group) -> None:
        params = _listed(param_group["params"])
        floats = [p for p in params if isinstance(p, Tensor) and p.ndim > 1 and not writes_itself(p)]
        if floats and param_group.get("rank") is not None:
            raise InputError(
                f"QAPOLLOAdamW steps weights of 8 or 4 bits, and {tuple(floats[0].shape)} is {floats[0].dtype}: call "
                "apollo_optim.quantize_weights(model) first, or use APOLLOAdamW"
            )
        super().add_param_group({**param_group, "params": params})


def _listed(params: Any) -> Any:
    """In a list, unless they are a set, which torch refuses."""
    return [params] if isinstance(params, Tensor) else params if isinstance(params, set) else list(params)


@cache
def _warn_once(what: str) -> None:
    warnings.warn(f"apollo_torch (apollo-optim's drop-in): {what}", stacklevel=4)
