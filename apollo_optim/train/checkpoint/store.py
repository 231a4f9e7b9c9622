"""Checkpoints that a kill, a full disk or a truncated copy cannot turn into a wrong run.

    RUN/checkpoints/step-00000100/          one checkpoint
        manifest.json                       format, version, and size and CRC-32 of every other file
        config.json                         the transformers config (and generation_config.json)
        weights-00001-of-00001.safetensors  the weights in their native form; of a low-bit one its NAME.codes,
                                            NAME.scales (quant/format.py) and NAME.shape
        state-00001-of-00001.safetensors    every tensor of the training state ...
        state.json                          ... and everything else in it, with references to the tensors
    RUN/checkpoints/latest                  a link to the newest one, for people and tools

It is written to a hidden directory, flushed to the disk, and renamed: a directory called step-* is complete, unless it
holds a file .unfinished (disk.py: not every file system renames directories). The newest
step-* is the one that `--resume` takes. Nothing in here is pickled: a checkpoint cannot run code.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apollo_optim.core.errors import InputError
from apollo_optim.data.foreign import reason
from apollo_optim.train import disk
from apollo_optim.train.checkpoint.shards import failing_cleanly, read_shards, weights, write_shards
from apollo_optim.train.checkpoint.tree import pack, unpack

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FORMAT = "apollo-optim checkpoint"
VERSION = 2  # 2: low-bit weights


# --- which checkpoints there are ---


def checkpoints(run: Path) -> dict[int, Path]:
    """Step -> directory, in order. Only complete ones have this name."""
    found = {}
    for path in (run / "checkpoints").glob("step-*"):
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and disk.is_finished(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def newest(run: Path) -> Path | None:
    """The checkpoint that a resumed run starts from."""
    return next(reversed(checkpoints(run).values()), None)


# --- writing ---


def save(run: Path, step: int, model: PreTrainedModel, state: dict[str, Any], keep: int) -> Path:
    """Write one checkpoint, then drop all but the newest `keep`.

    On failure (SaveFailed) the old ones are intact and nothing is left lying around.
    """
    root = run / "checkpoints"
    final = root / f"step-{step:08d}"
    temporary = root / f".tmp-{final.name}"
    with failing_cleanly(temporary, f"the checkpoint of step {step}"):
        sweep(run)
        temporary.mkdir(parents=True)
        plain, tensors = pack(state)
        write_shards(temporary, "weights", weights(model))
        write_shards(temporary, "state", tensors)
        (temporary / "state.json").write_text(json.dumps(plain), encoding="utf-8")
        model.config.save_pretrained(temporary)
        if model.can_generate():
            model.generation_config.save_pretrained(temporary)
        files = {path.name: {"bytes": path.stat().st_size, "crc32": _crc(path)} for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            disk.flush(path)
        disk.put_in_place(temporary, final)
        disk.flush(root)
    disk.link(root / "latest", final.name)
    for old in list(checkpoints(run).values())[:-keep]:
        try:
            disk.remove(old)
        except OSError as error:
            disk.go_without(f"{old} could not be removed", error)
    return final


def sweep(run: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for path in (run / "checkpoints").glob(".tmp-*"):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    for path in (run / "checkpoints").glob("step-*"):
        if not disk.is_finished(path):
            shutil.rmtree(path)


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Check the whole checkpoint, then read the training state that was given to `save`."""
    verify(checkpoint)
    plain = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    # out of the mapped files, into memory of its own
    state = unpack(plain, {name: tensor.clone() for name, tensor in read_shards(checkpoint, "state")})
    return dict(state)


def saved_config(checkpoint: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The transformers config of a checkpoint."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint}: its model can't be opened: {reason(error)}") from error
    return config


def restore_generation(checkpoint: Path, model: PreTrainedModel) -> None:
    """How the model is to generate, which is no part of its config. (Older checkpoints do not say.)"""
    from transformers import GenerationConfig

    path = checkpoint / "generation_config.json"
    if path.exists():
        model.generation_config = GenerationConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest, if every file is as it was written; else one line that says which is not."""
    path = checkpoint / "manifest.json"
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{checkpoint} is not a checkpoint of apollo-optim: it has no manifest.json{_way_out(checkpoint)}"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise InputError(f"{path} is damaged{_way_out(checkpoint)}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{checkpoint} is not a checkpoint of apollo-optim{_way_out(checkpoint)}")
    if manifest["version"] > VERSION:
        raise InputError(
            f"{checkpoint} was written by a newer apollo-optim (format {manifest['version']}, this one reads {VERSION})"
        )
    for name, written in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise InputError(f"{checkpoint} is incomplete: {name} is missing{_way_out(checkpoint)}")
        if (size := file.stat().st_size) != written["bytes"]:
            raise InputError(f"{file} has {size} bytes instead of {written['bytes']}{_way_out(checkpoint)}")
        if _crc(file) != written["crc32"]:
            raise InputError(f"{file} is damaged: its checksum is wrong{_way_out(checkpoint)}")
    return manifest


def _way_out(checkpoint: Path) -> str:
    older = [path for path in checkpoints(checkpoint.parent.parent).values() if path.name < checkpoint.name]
    return f"; delete {checkpoint} to go on from {older[-1].name}" if older else ""
