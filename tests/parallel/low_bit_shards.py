"""What the processes of `test_low_bit_shards.py` do: low-bit weights under FSDP2, beside those of one process."""

import contextlib
import math
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import GAMES, Found, everywhere, fsdp, optimizer_for, refusal, same, walk, whole, zoo
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from apollo_optim import build_optimizer, quantize_weights, release
from apollo_optim.core.storage import parts, unsharded, writes_itself
from benchmarks.collectives import Counter

PLAYED = (
    "apollo gaussian",
    "apollo-mini",
    "adamw",
    "normuon",
)  # (8-bit AdamW's moments are no other with such weights)
N, HIDDEN, OUT, GROUP = 48, 31, 18, 16  # 31 rows: no number of processes has equal parts


def quantised(bits: int, model: nn.Module | None = None) -> nn.Module:
    model = zoo() if model is None else model
    quantize_weights(model, bits, group_size=6, targets="mlp")
    return model


def stored(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Codes and scales of every low-bit weight, all of them."""
    low = {name: p for name, p in model.named_parameters() if writes_itself(p)}
    return {name: {part: whole(t).clone() for part, t in parts(p).items()} for name, p in low.items()}


def unequal(ours: dict[str, Tensor], its: dict[str, Tensor]) -> float:
    """The share of the codes that are others; of all, if a scale is."""
    if not torch.equal(ours["scales"], its["scales"]):
        return 1.0
    return (ours["codes"] != its["codes"]).double().mean().item()


def given_gradients() -> Found:
    """Steps from the same gradients, of every shape, uneven and empty parts among them."""
    size = dist.get_world_size()
    layouts = {"fsdp": fsdp(size)} | ({"hsdp": fsdp(2, 2)} if size == 4 else {})
    for where, split in layouts.items():
        for bits in (8, 4):
            for game in PLAYED:
                model, single = split(quantised(bits)), quantised(bits)
                start = stored(single)
                assert stored(model).keys() == start.keys()
                cut = max(unequal(codes, start[name]) for name, codes in stored(model).items())
                for m in (model, single):
                    walk(m, optimizer_for(m, game), range(1, 6))
                for name, its in stored(single).items():
                    row = {"layout": where, "bits": bits, "game": game, "tensor": name, "cut": cut}
                    ours = stored(model)[name]
                    yield "given", {**row, "unequal": unequal(ours, its), "stepped": unequal(its, start[name])}


def one(bits: int | None = 8, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(N, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=False), nn.RMSNorm(OUT)
    model = nn.Sequential(*layers).to(dtype)
    if bits:
        quantize_weights(model, bits, group_size=GROUP, targets="all-linear")
    return model


def split_in_two(model: nn.Module, **how: Any) -> nn.Module:
    fully_shard(model[0], **how)
    fully_shard(model, **how)
    return model


def trained(
    model: nn.Module,
    part: slice,
    *,
    game: str = "apollo-mini",
    inside: bool = False,
    synced: bool = True,
) -> Any:
    """Two micro-batches a step, added up in the shards or (not `synced`) in whole gradients. Returns the optimizer."""
    torch.manual_seed(2)
    inputs, targets = torch.randn(4, 2, 12, N), torch.randn(4, 2, 12, OUT)
    name, own = GAMES[game]
    optimizer = build_optimizer(name, model, targets="all-linear", lr=1e-2, **own)
    handle = release(model, optimizer, clip=0.5) if inside else None
    for xs, ys in zip(inputs, targets, strict=True):
        for micro, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(synced or micro == 1)
            with handle.accumulate() if handle and micro == 0 else contextlib.nullcontext():
                nn.functional.mse_loss(model(x[part]), y[part]).backward()
        if handle is None:
            for p in model.parameters():
                nn.utils.clip_grad_norm_([p], 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def mine() -> slice:
    """My rows of a batch of 12."""
    rows = 12 // dist.get_world_size()
    return slice(rows * dist.get_rank(), rows * (dist.get_rank() + 1))


def through_fully_shard() -> Found:
    """Forward and backward of gathered codes, half of the batch a process, against one process with all of it."""
    for bits in (8, 4):
        for synced in (True, False):
            model, single = split_in_two(one(bits)), one(bits)
            start = stored(single)
            trained(model, mine(), synced=synced)
            trained(single, slice(None))
            for name, its in stored(single).items():
                row = {"bits": bits, "synced": synced, "tensor": name}
                ours = stored(model)[name]
                yield "trained", {**row, "unequal": unequal(ours, its), "stepped": unequal(its, start[name])}


def inside_backward() -> Found:
    """The step inside backward is the step after it, to the bit."""
    for game in ("apollo-mini", "adamw"):
        for synced in (True, False):
            model, stepped = split_in_two(one()), split_in_two(one())
            ours = trained(model, mine(), game=game, synced=synced, inside=True)
            its = trained(stepped, mine(), game=game, synced=synced)
            for (name, p), (_, q) in zip(model.named_parameters(), stepped.named_parameters(), strict=True):
                state = [key for key, value in its.state[q].items() if not everywhere(same(value, ours.state[p][key]))]
                equal = all(torch.equal(whole(t), whole(parts(q)[part])) for part, t in parts(p).items())
                yield "released", {"game": game, "synced": synced, "tensor": name, "equal": equal, "state": state}


def gathered() -> Found:
    """The bytes of what a forward pass gathers: of the low-bit form, and beside it those of bf16."""
    for bits in (8, 4, None):
        model = split_in_two(one(bits, torch.bfloat16))
        with Counter() as counter, torch.no_grad():
            model(torch.zeros(1, N, dtype=torch.bfloat16))
        yield "gathered", {"bits": bits, "sent": [one.nbytes for one in counter.sent if "gather" in one.kind]}
    model = split_in_two(one())
    local = model[0].weight.to_local()
    yield "kept", {"rows": len(local), "bytes": local.codes.nbytes + local.scales.nbytes}


def mixed_precision() -> Found:
    """Gathered weights may stand for another dtype, in which products are made and gradients come."""
    model = split_in_two(one(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    seen = []
    model[2].register_forward_hook(lambda module, args, out: seen.append((str(module.weight.dtype), str(out.dtype))))
    model(torch.randn(2, N, dtype=torch.bfloat16)).float().sum().backward()
    yield "mixed", {"seen": seen[0], "grad": str(model[2].weight.grad.dtype)}


def non_finite() -> Found:
    """An inf in the last process's part of a gradient: nobody takes that step."""

    def spoil(name: str, step: int, full: Tensor) -> None:
        if step == 1:
            full.view(-1)[-1] = math.inf

    model = fsdp(dist.get_world_size())(quantised(8))
    start, optimizer = stored(model), optimizer_for(model, "apollo-mini")
    walk(model, optimizer, range(1, 2), spoil)
    for name, p in model.named_parameters():
        if name in start:
            row = {"tensor": name, "ndim": p.ndim, "skipped": whole(optimizer.state[p]["skipped"]).sum().item()}
            yield "non-finite", {**row, "unequal": unequal(stored(model)[name], start[name])}


def drawn_later() -> Found:
    """A model that is quantised and cut on the meta device, and gets its memory and its weights then."""
    with torch.device("meta"):
        model = one()
    split_in_two(model).to_empty(device="cpu")
    p, value = model[0].weight, one(None)[0].weight
    rows = -(-HIDDEN // dist.get_world_size())
    with torch.no_grad():
        p.to_local().copy_(value[rows * dist.get_rank() :][:rows])
    back, reference = parts(unsharded(p)), parts(one()[0].weight)
    equal = {name: torch.equal(t, reference[name]) for name, t in back.items()}
    yield "drawn", {"low": writes_itself(p), "equal": equal}


def distributed_checkpoint() -> Found:
    """What `torch.distributed.checkpoint` saves, in new shards; the test reads it in one process."""
    folder = os.environ["SHARDED_FOLDER"]
    model, other = split_in_two(one()), split_in_two(one())
    trained(model, mine())
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/dcp")
    codes = stored(model)
    torch.save(codes, f"{folder}/codes-{dist.get_rank()}.pt")
    saved = get_model_state_dict(other)
    dcp.load(saved, checkpoint_id=f"{folder}/dcp")
    set_model_state_dict(other, saved)
    ours, x = stored(other), torch.ones(2, N)
    for name, its in codes.items():
        row = {"tensor": name, "unequal": unequal(ours[name], its), "same": torch.equal(model(x), other(x))}
        yield "checkpoint", {**row, "folder": folder}


def refusals() -> Found:
    """What cuts rows, makes one vector of all, or writes as if they were float, says so in one line."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def columns() -> None:
        fully_shard(one(), mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))

    def another_optimizer(foreach: bool) -> None:
        model = split_in_two(one())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(model.parameters(), foreach=foreach).step()

    ways = {
        "AdamW of torch": lambda: another_optimizer(False),
        "AdamW of torch, in lists": lambda: another_optimizer(True),
        "columns": columns,
        "fsdp1": lambda: FullyShardedDataParallel(one(), device_id=torch.device("cpu")),
        "tensor parallelism": lambda: parallelize_module(one(), mesh, {"0": ColwiseParallel()}),
    }
    for way, what in ways.items():
        yield "refused", {"way": way, "said": refusal(what)}


CHECKS = {
    1: [through_fully_shard],
    2: [
        given_gradients,
        inside_backward,
        gathered,
        mixed_precision,
        non_finite,
        drawn_later,
        distributed_checkpoint,
        refusals,
    ],
    3: [through_fully_shard],
    4: [given_gradients],
}
