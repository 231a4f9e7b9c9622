"""What a step sends to other processes: by torch's engine for weights and gradients, and by the optimizer besides.

The optimizer's part is asked of its own step (`optim.sends`). The engine's is arithmetic on the way that DDP, FSDP2 and
tensor parallelism work, and is held to what a run of several processes really sends (`tests/parallel/test_traffic.py`).
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from apollo_optim.core.collectives import Collective
from apollo_optim.core.errors import InputError
from apollo_optim.core.place import is_sharded, local
from apollo_optim.core.placements import assembled, cuts
from apollo_optim.core.storage import parts, rebuilt
from apollo_optim.optim.knobs import Group
from apollo_optim.optim.optimizer import RuleOptimizer
from apollo_optim.optim.parameter import Shared
from apollo_optim.optim.sends import Stepped, next_sends, stepped
from apollo_optim.plan.shards import Parallel, blocks_of, first_part, gradient_bytes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes from which DDP's reducer begins another one
TENSOR = "tensor"  # of a mesh: the dimension over which matrices are split for their products


class Traffic(NamedTuple):
    """Collectives of one process."""

    sent: tuple[Collective, ...] = ()

    @property
    def collectives(self) -> int:
        """How many."""
        return len(self.sent)

    @property
    def nbytes(self) -> int:
        """Of their tensors: of the larger of what goes in and what comes out of each."""
        return sum(one.nbytes for one in self.sent)

    @property
    def wire(self) -> int:
        """Bytes that leave each process, if collectives are rings."""
        return sum(one.sent for one in self.sent)

    @property
    def kinds(self) -> dict[str, int]:
        """How many of each kind."""
        return dict(sorted(Counter(one.kind for one in self.sent).items()))

    def line(self) -> dict[str, Any]:
        """For a log."""
        return {"collectives": self.collectives, "bytes": self.nbytes, "wire": self.wire, "kinds": self.kinds}


@dataclass(frozen=True)
class Sends:
    """What one process sends in a step."""

    weights: Traffic
    """Weights, gradients, outputs of split matrices: whatever torch's engine sends for the model."""
    optimizer: Traffic
    """What the optimizer's second step sends besides."""
    first: Traffic
    """What its first one does: where that is more, each that makes a basis anew."""
    adamw: Traffic
    """What AdamW's would, of the same parameters."""

    def line(self) -> dict[str, Any]:
        """For a log."""
        found = {"weights": self.weights, "optimizer": self.optimizer, "adamw": self.adamw}
        found |= {"optimizer_first": self.first} if self.first != self.optimizer else {}
        return {name: traffic.line() for name, traffic in found.items()}


def sends(
    optimizer: RuleOptimizer,
    weights: Traffic,
    stand_in: Callable[[Tensor], Tensor] | None,
    device_type: str,
    **how: Any,
) -> Sends:
    """All of it. `stand_in`, ...: as of `optimizer_sends`; None where every process steps all of them itself (DDP)."""
    if stand_in is None:
        return Sends(weights, Traffic(), Traffic(), Traffic())
    first, second = optimizer_sends(optimizer, stand_in, device_type, **how)
    _, adamw = optimizer_sends(optimizer, stand_in, device_type, rule="adamw", **how)
    return Sends(weights, second, first, adamw)


def planned_sends(
    model: nn.Module,
    optimizer: RuleOptimizer,
    parallel: Parallel,
    *,
    micro_batches: int = 1,
    release: bool = False,
    device: str = "cpu",
) -> Sends:
    """What each process sends in a step of ``optimizer``, which is built on ``model``, on the meta device.

    Args:
        micro_batches: Of a step, on each process.
        release: The step is made inside the backward: each parameter's by itself.
        device: "cpu" or "cuda", which put together more at a time.

    Raises InputError within processes that have met and are others.
    """
    if parallel.kind == "ddp":
        return sends(optimizer, ddp_sends(model.parameters(), parallel.gpus), None, device)
    weights = fsdp2_sends(model, parallel.gpus, micro_batches=micro_batches)
    with pretended(parallel.gpus) as mesh:
        return sends(optimizer, weights, lambda p: first_part(p, mesh), device, one_by_one=release)


# --- the optimizer ---


def optimizer_sends(
    optimizer: RuleOptimizer,
    stand_in: Callable[[Tensor], Tensor],
    device_type: str,
    *,
    rule: str | None = None,
    one_by_one: bool = False,
    compiler: bool = True,
) -> tuple[Traffic, Traffic]:
    """What the first step of an optimizer sends, and what the second one does.

    Args:
        stand_in: A parameter -> one without memory, which lies as it will when it is trained.
        rule: Of all parameters, with its defaults, in the place of their groups'.
        device_type, one_by_one: As of `next_sends`.
        compiler: Is there one, where steps are to be compiled?
    """
    every = list[Stepped]()
    for group in optimizer.param_groups:
        ours = group if rule is None else {**_defaults(rule), "view": group["view"]}
        looks, known = dict[Any, Stepped](), dict[Any, Shared]()
        for p in (p for p in group["params"] if p.requires_grad):
            look = p.shape, p.dtype, type(local(p)), getattr(p, "placements", ()), getattr(p, "device_mesh", None)
            if look not in looks:
                own = stand_in(p)
                own.grad = _empty_like(own)
                looks[look] = stepped(own, ours, known)
            every.append(looks[look])
    compile = optimizer.compile if compiler else False
    first, second = (next_sends(every, compile, device_type, one_by_one=one_by_one) for _ in range(2))
    return Traffic(tuple(first)), Traffic(tuple(second))


def _defaults(rule: str) -> Group:
    """A group that says nothing else."""
    return RuleOptimizer([torch.empty(0, device="meta")], rule).param_groups[0]


def _empty_like(p: Tensor) -> Tensor:
    """A gradient of `p`."""

    def make(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=p.dtype, device="meta")

    return assembled(make, tuple(p.shape), p.device_mesh, list(p.placements)) if is_sharded(p) else make(tuple(p.shape))


def as_it_lies(p: Tensor) -> Tensor:
    """A stand-in for a parameter that is there, sharded or not."""
    own = rebuilt(local(p.detach()), lambda t: torch.empty_like(t, device="meta"))
    return assembled(lambda _: own, tuple(p.shape), p.device_mesh, list(p.placements)) if is_sharded(p) else own


@contextlib.contextmanager
def pretended(processes: int) -> Iterator[DeviceMesh]:
    """A mesh of processes of which only this one is there, the first; nothing may be sent but what has no memory.

    Raises InputError within processes that have met and are others.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if dist.is_initialized():
        if dist.get_world_size() != processes:
            raise InputError(f"what {processes} processes send cannot be planned among {dist.get_world_size()} others")
        yield init_device_mesh("cpu", (processes,))
        return
    from torch.testing._internal.distributed import fake_pg  # (it registers the backend)

    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=processes)
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        dist.destroy_process_group()


# --- torch's engines ---


def ddp_sends(params: Iterable[Tensor], processes: int) -> Traffic:
    """DDP: the gradients in buckets, the last ones first, which are full from a size on.

    (What arrives first comes first, from the third step on; that is nearly this order.)
    """
    filling: defaultdict[torch.dtype, int] = defaultdict(int)
    most: defaultdict[torch.dtype, int] = defaultdict(lambda: FIRST_BUCKET)
    sizes = []
    for p in reversed([p for p in _distinct(params) if p.requires_grad]):
        filling[p.dtype] += gradient_bytes(p)
        if filling[p.dtype] >= most[p.dtype]:
            sizes.append(filling.pop(p.dtype))
            most[p.dtype] = BUCKET
    return Traffic(tuple(Collective("all_reduce", size, "", processes) for size in [*sizes, *filling.values()]))


def fsdp2_sends(model: nn.Module, shards: int, replicas: int = 1, micro_batches: int = 1) -> Traffic:
    """`fully_shard` of every block and of the whole, which stays gathered until the backward pass ends.

    Args:
        shards: Processes that have all weights between them; `replicas` groups of them have the same.
        micro_batches: Of a step: weights are gathered in each, gradients sent in the last one alone.
    """
    inner = [_distinct(block.parameters()) for block in blocks_of(model)]
    in_blocks = {id(p) for block in inner for p in block}
    around = [p for p in _distinct(model.parameters()) if id(p) not in in_blocks]
    gathers, scatters = list[Collective](), list[Collective]()
    for unit, times in [(around, 1), *((block, 2) for block in inner)]:
        if not unit:
            continue
        size = sum(_padded(t, shards) for p in unit for t in parts(p.detach()).values())
        gathers += [Collective("all_gather_into_tensor", size, "", shards)] * times
        trained = [p for p in unit if p.requires_grad]
        if trained:
            size = sum(_padded(p, shards) for p in trained)
            scatters.append(Collective("reduce_scatter_tensor", size, "", shards))
            if replicas > 1:
                scatters.append(Collective("all_reduce", size // shards, "", replicas))
    return Traffic(tuple(gathers * micro_batches + scatters))


def tensor_sends(blocks: int, outputs: int, tensor: int, micro_batches: int = 1, *, recompute: bool = False) -> Traffic:
    """Tensor parallelism: sums of `outputs` bytes over the processes that have parts of the same matrices.

    Two forward; five backward, one for the input of each matrix that widens (torch sums them one by one). What is
    computed again needs the first of the forward ones again.
    """
    times = blocks * (2 + 5 + recompute) * micro_batches
    return Traffic((Collective("all_reduce", outputs, "", tensor),) * times)


def _padded(t: Tensor, shards: int) -> int:
    """Bytes of a tensor whose rows are filled up so that all shards have as many; of a low-bit weight, as floats."""
    shape = list(t.shape)
    for at, placement in enumerate(getattr(t, "placements", ())):
        mesh: DeviceMesh = t.device_mesh  # type: ignore[attr-defined]
        for dim in range(len(shape)):
            if (mesh.mesh_dim_names or {at: ""})[at] == TENSOR and cuts(placement, [dim]):
                shape[dim] //= mesh.size(at)
    rows, *others = shape or [1]
    return -(-rows // shards) * shards * prod(others) * t.element_size()


def _distinct(params: Iterable[Tensor]) -> Sequence[Tensor]:
    return list({id(p): p for p in params}.values())
