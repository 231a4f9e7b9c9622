"""Weights and other tensors as safetensors files of a bounded size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from apollo_optim.core.errors import Damaged, InputError
from apollo_optim.core.manifest import Format, read_manifest
from apollo_optim.core.place import whole
from apollo_optim.core.storage import parts
from apollo_optim.data.foreign import reason
from apollo_optim.optim.loading import split_as
from apollo_optim.train.checkpoint.tree import pack

CHECKPOINT = Format("apollo-optim checkpoint", 3, "a checkpoint of apollo-optim")
# 2: low-bit weights; 3: the manifest has a checksum of its own, and the run's config is in the checkpoint
SHAPE = ".shape"  # of a low-bit weight: its codes are padded
SHARD_BYTES = 256 * 10**6  # loaded one shard at a time: the pages of a mapped file count as resident


class SaveFailed(OSError):
    """A checkpoint or an export could not be written; what was there before is untouched."""


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The plain tensors that parameters and persistent buffers are made of, by name, tied ones once."""
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in named_weights(model).items():
        made_of = parts(tensor)
        plain |= {f"{name}.{part}" if part else name: own for part, own in made_of.items()}
        if "" not in made_of:
            plain[name + SHAPE] = torch.tensor(tensor.shape)
    return plain


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers as they are, by name; tied ones once, by the first of their names."""
    named: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor))
    return dict(named.values())


def lend(*trees: Any) -> None:
    """Give one's parts of all sharded tensors to the process that writes, which asks for them in the same order."""
    for tree in trees:
        for tensor in pack(tree)[1].values():
            whole(tensor)


def write_shards(directory: Path, part: str, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    shards = in_shards({name: tensor.nbytes for name, tensor in tensors.items()})
    for number, names in enumerate(shards, 1):
        path = directory / shard_name(part, number, len(shards))
        save_file({name: own_memory(tensors[name]) for name in names}, path)


def shard_name(part: str, number: int, of: int) -> str:
    """weights-00001-of-00002.safetensors"""
    return f"{part}-{number:05d}-of-{of:05d}.safetensors"


def in_shards(sizes: dict[str, int]) -> list[list[str]]:
    """Names in order, as many to a shard as fit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, more in sizes.items():
        size += more
        if shards[-1] and size > SHARD_BYTES:
            shards.append([])
            size = more
        shards[-1].append(name)
    return shards


def own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """As safetensors wants it: on the CPU, contiguous, all of it, not a piece of something else."""
    tensor = whole(tensor.detach()).cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@contextlib.contextmanager
def failing_in_one_line(what: str, folder: Path) -> Iterator[None]:
    """A failure to write `what` into a folder becomes SaveFailed."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise SaveFailed(f"could not write {what} in {folder}: {reason}") from error


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Copy the weights into the model, one after the other; the names, shapes and kinds must be the same."""
    into = weights(model)
    seen = set()
    with torch.no_grad():
        for name, tensor in read_shards(checkpoint, "weights"):
            fits = name in into and into[name].shape == tensor.shape and into[name].dtype == tensor.dtype
            if not fits or (name.endswith(SHAPE) and not torch.equal(into[name], tensor)):
                raise InputError(f"{checkpoint} belongs to another model: its {name} ({_looks(tensor)}) does not fit")
            into[name].copy_(split_as(tensor.to(into[name].device), into[name]))
            seen.add(name)
    if missing := into.keys() - seen:
        raise InputError(f"{checkpoint} belongs to another model: it has no {min(missing)}")


def read_shards(checkpoint: Path, part: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name after name; a tensor lies in the mapped file, which is closed when the next shard is asked for.

    `part`: `weights` or `state`. Shards that the manifest does not list are not read.

    Raises InputError if a shard lacks or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    listed = sorted(name for name in read_manifest(checkpoint, CHECKPOINT)["files"] if name.startswith(part + "-"))
    if not listed or listed != [shard_name(part, number, len(listed)) for number in range(1, len(listed) + 1)]:
        raise InputError(f"{checkpoint} is incomplete: of its {part}, there is only {', '.join(listed) or 'nothing'}")
    for name in listed:
        path = checkpoint / name
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    yield key, file.get_tensor(key)
        except FileNotFoundError:
            raise InputError(f"{checkpoint} was changed while it was read: {name} is gone") from None
        except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            raise Damaged(path, reason(error)) from error


def _looks(tensor: torch.Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"
