"""Who steps in `bench step`: ours and the installed peers, each as two optimizers, of the matrices and of the rest.

To add one is to add a line. Peers are called through their public constructors; one that is not installed or that
crashes is a row of the table that says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from torch.nn import Parameter
from torch.optim import Optimizer

from apollo_optim.optim import AdamW, Apollo, ApolloMini
from apollo_optim.optim.groups import rule_and_codec

Params = Sequence[Parameter]
Build = Callable[[Params, int], Optimizer]
"""(parameters, rank) -> the optimizer that steps them."""


class Halves(NamedTuple):
    """The optimizers of one contender."""

    matrices: Build
    rest: Build


LR = 1e-4  # finite weights after any number of steps, and moved in bf16 as well
GAP = 200  # steps between two projections


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    package: str
    """The distribution that must be installed."""
    says: str
    halves: Halves
    rank: int | None = None
    """1, or 0 for the rank of the run; None: it has none."""
    reads: tuple[int, int] = (1, 1)
    """How often the gradient of a matrix, and of the rest, must come from memory: once more for each thing that has to
    be known of all of it before the weight can be written."""
    keeps: float = 2.0
    """Numbers that it keeps for each entry of a matrix, about, where it has no rank."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    rival: str | None = None
    """apollo-torch's row of the same rule."""

    def missing(self) -> bool:
        """Is its package not installed? (What is installed and cannot be imported is a crash.)"""
        try:
            version(self.package)
        except PackageNotFoundError:
            return self.package != "apollo-optim"  # which also runs from a checkout
        return False


def ours(cls: type[Apollo], *, compile: bool = True, rest: str = "adamw", **knobs: Any) -> Halves:
    """Both halves of one of our optimizers: a group with a rank, and one without, which follows ``rest``."""
    knobs = {"lr": LR, "update_proj_gap": GAP, "stochastic_rounding": False} | knobs
    return Halves(
        lambda params, rank: cls([{"params": params, "rank": rank}], compile=compile, **knobs),
        lambda params, _: cls([{"params": params, "rank": None, **rule_and_codec(rest)}], compile=compile, **knobs),
    )


def our_adamw(params: Params, _: int) -> Optimizer:
    """AdamW, for both halves."""
    return AdamW(params, lr=LR, stochastic_rounding=False, compile=True)


def peer(module: str, name: str, group: dict[str, Any] | None = None, **knobs: Any) -> Halves:
    """Both halves of a package's optimizer; ``group`` are the keys of its low-rank group, beside the rank."""

    def build(params: Params, rank: int, keys: dict[str, Any] | None) -> Optimizer:
        cls = getattr(importlib.import_module(module), name)
        ranked = {} if keys is None else {key: rank if value is RANK else value for key, value in keys.items()}
        optimizer: Optimizer = cls([{"params": list(params), **ranked}], lr=LR, **knobs)
        return optimizer

    return Halves(lambda params, rank: build(params, rank, group), lambda params, rank: build(params, rank, None))


RANK = object()  # in a group's keys: the rank of the run
FUSED = peer("torch.optim", "AdamW", fused=True)
GALORE: dict[str, Any] = {"rank": RANK, "update_proj_gap": GAP, "proj_type": "std"}
APOLLO_TORCH = GALORE | {"proj": "random", "scale_type": "channel", "scale": 1.0}
APOLLO_TORCH_MINI = APOLLO_TORCH | {"scale_type": "tensor", "scale": 128.0}
PYTORCH_OPTIMIZER = {"rank": RANK, "update_proj_gap": GAP, "projection_type": "std"}
MINI: dict[str, Any] = {"rank": 1, "reads": (2, 2), "rival": "apollo-torch-mini"}
FULL: dict[str, Any] = {"rank": 0, "reads": (2, 2), "rival": "apollo-torch"}  # the rest's, too: is its norm finite?

BASELINE = "torch-adamw-fused"
CONTENDERS: dict[str, Contender] = {
    BASELINE: Contender("torch", "AdamW(fused=True)", FUSED),
    "apollo-mini": Contender("apollo-optim", "deterministic write", ours(ApolloMini), **MINI),
    "apollo-mini-sr": Contender(
        "apollo-optim",
        "stochastic rounding",
        ours(ApolloMini, stochastic_rounding=True),
        **MINI | {"dtypes": ("bfloat16",)},
    ),
    **{
        f"apollo-mini-rest-{rest}": Contender("apollo-optim", f"rest: {rest}", ours(ApolloMini, rest=rest), **MINI)
        for rest in ("adamw8bit", "adafactor")
    },
    "apollo-sketch": Contender("apollo-optim", "rank r, sketch", ours(Apollo, proj="sketch"), **FULL),
    "apollo-gaussian": Contender("apollo-optim", "rank r, gaussian", ours(Apollo, proj="gaussian"), **FULL),
    "apollo-gaussian-kept": Contender(
        "apollo-optim", "rank r, gaussian, kept", ours(Apollo, proj="gaussian", keep_proj=True), **FULL
    ),
    "apollo-mini-eager": Contender("apollo-optim", "not compiled", ours(ApolloMini, compile=False), **MINI),
    "apollo-sketch-eager": Contender(
        "apollo-optim", "rank r, sketch, not compiled", ours(Apollo, compile=False, proj="sketch"), **FULL
    ),
    "adamw": Contender("apollo-optim", "our AdamW", Halves(our_adamw, our_adamw), reads=(2, 2)),
    "apollo-torch-mini": Contender(
        "apollo-torch", "rank 1", peer("apollo_torch", "APOLLOAdamW", APOLLO_TORCH_MINI), rank=1, reads=(2, 1)
    ),
    "apollo-torch": Contender(
        "apollo-torch", "rank r", peer("apollo_torch", "APOLLOAdamW", APOLLO_TORCH), rank=0, reads=(2, 1)
    ),
    "pytorch-optimizer-apollo-mini": Contender(
        "pytorch-optimizer",
        "rank 1",
        peer("pytorch_optimizer", "APOLLO", PYTORCH_OPTIMIZER | {"scale": 128.0}, scale_type="tensor"),
        rank=1,
        reads=(2, 1),
    ),
    "pytorch-optimizer-apollo": Contender(
        "pytorch-optimizer",
        "rank r",
        peer("pytorch_optimizer", "APOLLO", PYTORCH_OPTIMIZER | {"scale": 1.0}, scale_type="channel"),
        rank=0,
        reads=(2, 1),
    ),
    "adafactor8bit-apollo": Contender(
        "adafactor8bit",
        "rank r, 8-bit moments",
        peer(
            "adafactor8bit", "Adafactor8Bit", {"apollo_rank": RANK}, beta1=0.9, relative_step=False, beta2=0.999
        ),
        rank=0,
        reads=(2, 3),
    ),
    "galore-torch": Contender(
        "galore-torch", "rank r", peer("galore_torch", "GaLoreAdamW", GALORE | {"scale": 0.25}), rank=0
    ),
    "fira": Contender(
        "fira", "rank r", peer("fira", "FiraAdamW", GALORE | {"alpha": 0.25}), rank=0, reads=(2, 1)
    ),
    "adafactor8bit": Contender(
        "adafactor8bit",
        "Adafactor, 8 bits",
        peer("adafactor8bit", "Adafactor8Bit", relative_step=False),
        reads=(3, 3),
        keeps=0.0,
    ),
    "torchao-adamw8bit": Contender("torchao", "AdamW8bit", peer("torchao.optim", "AdamW8bit"), keeps=0.6),
    "torchao-adamw4bit": Contender("torchao", "AdamW4bit", peer("torchao.optim", "AdamW4bit"), keeps=0.4),
    "bitsandbytes-adamw8bit": Contender(
        "bitsandbytes", "AdamW8bit", peer("bitsandbytes.optim", "AdamW8bit"), keeps=0.6
    ),
    "torch-adamw": Contender("torch", "AdamW, torch's default", peer("torch.optim", "AdamW")),
    "torch-adafactor": Contender(
        "torch", "Adafactor", peer("torch.optim", "Adafactor"), reads=(3, 3), keeps=0.0
    ),
    "torch-muon": Contender(
        "torch", "Muon, the rest AdamW(fused=True)", Halves(peer("torch.optim", "Muon").matrices, FUSED.rest), keeps=1.0
    ),
    # not fused: torch 2.13's fused SGD leaves bf16 weights on a CPU as they were
    "torch-sgd": Contender("torch", "SGD, no momentum", peer("torch.optim", "SGD"), keeps=0.0),
}  # fmt: skip
