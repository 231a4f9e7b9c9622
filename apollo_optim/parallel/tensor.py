"""Tensor parallelism: the matrices of attention and MLP split over processes that see the same rows of a batch.

Megatron's way (https://arxiv.org/abs/1909.08053, section 3), by torch's own `parallelize_module`: what widens is split
by its outputs and what narrows by its inputs, so that a block has one sum for attention and one for the MLP, forward
and backward. Embedding, head and norms stay whole in each of the processes, which make the same steps of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from apollo_optim.core.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

WIDENS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
NARROWS = ("self_attn.o_proj", "mlp.down_proj")


def split_matrices(blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Make DTensors of the matrices of blocks that `check_split` has let pass, in place; `mesh`: of one dimension."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    # What is split twice along one dimension (fully_shard, too) is gathered in two steps, and torch says so of each.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    for block in blocks:
        plan: dict[str, Any] = {name: ColwiseParallel() for name in WIDENS}
        parallelize_module(block, mesh, plan | {name: RowwiseParallel() for name in NARROWS})


def check_split(blocks: Iterable[nn.Module], config: Any, size: int) -> None:
    """Refuse what `size` processes cannot split, or what would be wrong when it is split.

    Args:
        config: Of transformers.

    Raises InputError for blocks of another form than LLaMA's (a norm of the heads would see a part of its gradient),
    and for numbers of heads or widths that `size` does not divide.
    """
    for block in blocks:
        known = {f"{name}.{own}" for name in (*WIDENS, *NARROWS) for own in ("weight", "bias")}
        names = {name for name, _ in block.named_parameters() if name.startswith(("self_attn.", "mlp."))}
        strange = sorted(names - known) + sorted({f"{name}.weight" for name in (*WIDENS, *NARROWS)} - names)
        if strange:
            raise InputError(
                f"parallel.mode=tp splits blocks as LLaMA has them, with {', '.join((*WIDENS, *NARROWS))} and nothing "
                f"else in self_attn and mlp: in {type(block).__name__} it is {strange[0]} that differs; choose fsdp2"
            )
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number = getattr(config, key, None)
        if number is not None and number % size:
            raise InputError(f"parallel.mode=tp: {key}={number} cannot be cut into {size} equal parts; choose fsdp2")
