"""Checkpoints that a kill, a full disk or a truncated copy cannot turn into a wrong run.

    RUN/checkpoints/step-00000100/          one checkpoint
        manifest.json                       format, version, and size and CRC-32 of every other file and of itself
        run.json                            the run's configuration, as it was made with
        config.json                         the transformers config (and generation_config.json)
        weights-00001-of-00001.safetensors  the weights in their native form; of a low-bit one its NAME.codes,
                                            NAME.scales (quant/format.py) and NAME.shape
        state-00001-of-00001.safetensors    every tensor of the training state ...
        state.json                          ... and everything else in it, with references to the tensors
    RUN/checkpoints/latest                  a link to the newest one, for people and tools

It is written to a hidden directory, flushed to the disk, and renamed: a directory called step-* is complete, unless it
holds a file .unfinished (core/disk.py: not every file system renames directories). The newest
step-* is the one that `--resume` takes. What the manifest lists is read, and nothing else. Nothing in here is pickled:
a checkpoint cannot run code.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from apollo_optim.core import disk
from apollo_optim.core.errors import Damaged, InputError
from apollo_optim.core.manifest import NAME, check_files, read_manifest, write_manifest
from apollo_optim.core.reading import read_json
from apollo_optim.data.foreign import check_size, explained, reason
from apollo_optim.train.checkpoint.shards import CHECKPOINT, failing_in_one_line, read_shards, weights, write_shards
from apollo_optim.train.checkpoint.tree import pack, unpack
from apollo_optim.train.config import RunConfig, from_dict, load_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")
LARGEST_STATE = 1 << 30  # bytes of state.json
LEFTOVER = re.compile(rf"{disk.OURS.pattern}|\.tmp-(old-)?step-\d+")  # of a process that was killed


# --- which checkpoints there are ---


def checkpoints(run: Path) -> dict[int, Path]:
    """Step -> directory, in order. Only complete ones have this name."""
    found = {}
    for path in (run / "checkpoints").glob("step-*"):
        if (match := re.fullmatch(r"step-(\d{1,18})", path.name)) and path.is_dir() and disk.is_finished(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def newest(run: Path) -> Path | None:
    """The checkpoint that a resumed run starts from."""
    return next(reversed(checkpoints(run).values()), None)


# --- writing ---


def save(
    run: Path,
    step: int,
    model: PreTrainedModel,
    state: dict[str, Any],
    keep: int,
    config: dict[str, Any] | None = None,
    best: int | None = None,
) -> Path:
    """Write one checkpoint, then drop all but the newest `keep` and that of step `best`.

    `config`: the run's, as plain data; without it, export and resume take RUN/config.yaml.

    On failure (SaveFailed) the old ones are intact and nothing is left lying around.
    """
    root = run / "checkpoints"
    final = root / f"step-{step:08d}"
    with failing_in_one_line(f"the checkpoint of step {step}", root):
        disk.check_lock(run)
        sweep(run)
        with disk.new_folder(final) as folder:
            plain, tensors = pack(state)
            write_shards(folder, "weights", weights(model))
            write_shards(folder, "state", tensors)
            disk.write(folder / "state.json", json.dumps(plain))
            if config is not None:
                disk.write(folder / "run.json", json.dumps(config, indent=1))
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
            write_manifest(folder, CHECKPOINT, step=step)
    disk.link(root / "latest", final.name)
    there = checkpoints(run)
    for number in list(there)[:-keep]:
        if number == best:
            continue
        old = there[number]
        try:
            disk.remove(old)
        except OSError as error:
            disk.go_without(f"{old} could not be removed", error)
    return final


def sweep(run: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for path in (run / "checkpoints").glob(".tmp-*"):
        if LEFTOVER.fullmatch(path.name):
            disk.remove(path)
    for path in (run / "checkpoints").glob("step-*"):
        if path.is_dir() and not disk.is_finished(path):
            disk.remove(path)


def set_aside(run: Path, step: int) -> None:
    """Rename checkpoints that are newer than that of `step`, from which the run goes on: all of them are damaged."""
    there = checkpoints(run)
    newer = [number for number in there if number > step]
    for damaged in (there[number] for number in newer):
        ends = itertools.chain([""], (f"-{again}" for again in itertools.count(1)))
        names = (damaged.with_name(f"damaged-{damaged.name}{end}") for end in ends)
        disk.put_in_place(damaged, next(path for path in names if not path.exists()))
        if damaged.exists():  # its files were moved one by one
            disk.remove(damaged)
    if newer and step in there:
        disk.link(run / "checkpoints" / "latest", there[step].name)


# --- reading ---


def from_newest(run: Path, read: Callable[[Path], T]) -> tuple[Path, T, list[str]] | None:
    """The newest checkpoint that is whole, what `read` makes of it, and what is wrong with each newer one.

    None where there is no checkpoint. Raises Damaged if none is whole, and what else `read` raises.
    """
    damaged: list[str] = []
    there = list(checkpoints(run).values())
    for path in reversed(there):
        try:
            return path, read(path), damaged
        except Damaged as error:
            if path is there[0]:
                raise
            damaged.append(f"{error.path} is damaged: {error.what}")  # `set_aside` renames it later
    return None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Check the whole checkpoint, then read the training state that was given to `save`."""
    verify(checkpoint)
    path = checkpoint / "state.json"
    with _or_an_older(checkpoint):
        # out of the mapped files, into memory of its own
        tensors = {name: tensor.clone() for name, tensor in read_shards(checkpoint, "state")}
        try:
            state = unpack(read_json(path, LARGEST_STATE), tensors)
        except Damaged:
            raise
        except (InputError, TypeError, ValueError, RecursionError) as error:
            # as it was written: an older one would hide that
            raise InputError(f"{path} makes no sense: {reason(error)}") from error
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        if not isinstance(state, dict):
            raise InputError(f"{path} makes no sense: it holds no state")
        return state


def saved_identity(checkpoint: Path) -> dict[str, Any]:
    """Which text and tokenizer the run is trained on; {} where the checkpoint does not say."""
    content = read_json(checkpoint / "state.json", LARGEST_STATE)
    found = content.get("identity") if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}


def saved_config(checkpoint: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The transformers config of a checkpoint."""
    from transformers import AutoConfig

    with explained(f"{checkpoint}: its model can't be opened"):
        config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        check_size(config, str(checkpoint))
    return config


def saved_run(run: Path, checkpoint: Path) -> RunConfig:
    """The configuration that a checkpoint was made with. (Older ones do not say: RUN/config.yaml.)"""
    path = checkpoint / "run.json"
    if "run.json" not in read_manifest(checkpoint, CHECKPOINT)["files"]:
        return load_config(run / "config.yaml")
    with _or_an_older(checkpoint):
        content = read_json(path)
        if not isinstance(content, dict):
            raise Damaged(path, "it holds no run")
    try:
        return from_dict(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def restore_generation(checkpoint: Path, model: PreTrainedModel) -> None:
    """How the model is to generate, which is no part of its config. (Older checkpoints do not say.)"""
    from transformers import GenerationConfig

    path = checkpoint / "generation_config.json"
    if path.name not in read_manifest(checkpoint, CHECKPOINT)["files"]:
        return
    content = read_json(path)
    try:
        model.generation_config = GenerationConfig.from_dict(content)
    except Exception as error:  # whatever transformers stumbles over
        raise Damaged(path, reason(error)) from error


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest, if every file is as it was written and no other is there; else one line that says which is not."""
    with _or_an_older(checkpoint):
        if not (checkpoint / NAME).exists():
            raise Damaged(checkpoint, f"{NAME} is missing")
        manifest = read_manifest(checkpoint, CHECKPOINT)
        check_files(checkpoint, manifest["files"])
        if manifest.get("step") != (named := int(checkpoint.name.removeprefix("step-"))):
            raise InputError(f"{checkpoint} holds step {manifest.get('step')}, not {named}: it was renamed")
        return manifest


@contextlib.contextmanager
def _or_an_older(checkpoint: Path) -> Iterator[None]:
    """What is wrong with a checkpoint, with what to go on from."""
    try:
        yield
    except Damaged as error:
        raise Damaged(error.path, error.what, _way_out(checkpoint)) from error
    except InputError as error:
        raise InputError(f"{error}{_way_out(checkpoint)}") from error


def _way_out(checkpoint: Path) -> str:
    older = [path for path in checkpoints(checkpoint.parent.parent).values() if path.name < checkpoint.name]
    return f"; delete {checkpoint} to go on from {older[-1].name}" if older else ""
