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

import contextlib
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.core.storage import parts, writes_itself
from apollo_optim.data.foreign import drop_code, reason
from apollo_optim.train import disk

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FORMAT = "apollo-optim checkpoint"
VERSION = 2  # 2: low-bit weights
SHAPE = ".shape"  # of a low-bit weight: its codes are padded
SHARD_BYTES = 256 * 10**6  # loaded one shard at a time: the pages of a mapped file count as resident


class SaveFailed(OSError):
    """A checkpoint or an export could not be written; what was there before is untouched."""


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
    with _failing_cleanly(temporary, f"the checkpoint of step {step}"):
        sweep(run)
        temporary.mkdir(parents=True)
        plain, tensors = pack(state)
        _write_shards(temporary, "weights", weights(model))
        _write_shards(temporary, "state", tensors)
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


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The plain tensors that parameters and persistent buffers are made of, by name, tied ones once."""
    named: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), (name, tensor))
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in named.values():
        made_of = parts(tensor)
        plain |= {f"{name}.{part}" if part else name: own for part, own in made_of.items()}
        if "" not in made_of:
            plain[name + SHAPE] = torch.tensor(tensor.shape)
    return plain


def _write_shards(directory: Path, part: str, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    shards = _shards({name: tensor.nbytes for name, tensor in tensors.items()})
    for number, names in enumerate(shards, 1):
        path = directory / f"{part}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _own_memory(tensors[name]) for name in names}, path)


def _shards(sizes: dict[str, int]) -> list[list[str]]:
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


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """As safetensors wants it: on the CPU, contiguous, not a piece of something else."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


@contextlib.contextmanager
def _failing_cleanly(temporary: Path, what: str) -> Iterator[None]:
    """Whatever happens, the half-written directory goes; a failure to write becomes one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise SaveFailed(f"could not write {what} in {temporary.parent}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- reading ---


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Check the whole checkpoint, then read the training state that was given to `save`."""
    verify(checkpoint)
    plain = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    # out of the mapped files, into memory of its own
    state = unpack(plain, {name: tensor.clone() for name, tensor in _read_shards(checkpoint, "state")})
    return dict(state)


def load_weights(checkpoint: Path, model: torch.nn.Module) -> None:
    """Copy the weights into the model, one after the other; the names, shapes and kinds must be the same."""
    into = weights(model)
    seen = set()
    with torch.no_grad():
        for name, tensor in _read_shards(checkpoint, "weights"):
            fits = name in into and into[name].shape == tensor.shape and into[name].dtype == tensor.dtype
            if not fits or (name.endswith(SHAPE) and not torch.equal(into[name], tensor)):
                raise InputError(f"{checkpoint} belongs to another model: its {name} ({_looks(tensor)}) does not fit")
            into[name].copy_(tensor)
            seen.add(name)
    if missing := into.keys() - seen:
        raise InputError(f"{checkpoint} belongs to another model: it has no {min(missing)}")


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


def _read_shards(checkpoint: Path, part: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name after name; a tensor lies in the mapped file, which is closed when the next shard is asked for."""
    from safetensors import safe_open

    for path in sorted(checkpoint.glob(f"{part}-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


def _looks(tensor: torch.Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"


# --- a tree of Python values as JSON beside named tensors ---


def pack(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Split a tree of dicts, lists, tuples, numbers, strings, dtypes and tensors into JSON and tensors."""
    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.Tensor):
            tensors[path] = value
            return {"$tensor": path}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: plain(item, f"{path}.{key}") for key, item in value.items()}
            return {"$items": [[plain(key, path), plain(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [plain(item, f"{path}.{number}") for number, item in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        raise InputError(
            f"{path.lstrip('.')} is a {type(value).__name__}: only tensors, numbers, strings and containers of them "
            "can be saved"
        )

    return plain(tree, ""), {name.lstrip("."): tensor for name, tensor in tensors.items()}


def unpack(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:  # noqa: PLR0911 (one for each kind)
    """The inverse of `pack`."""
    if isinstance(plain, list):
        return [unpack(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if "$tensor" in plain:
        return tensors[plain["$tensor"].lstrip(".")]
    if "$dtype" in plain:
        return getattr(torch, plain["$dtype"])
    if "$tuple" in plain:
        return tuple(unpack(item, tensors) for item in plain["$tuple"])
    if "$items" in plain:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in plain["$items"]}
    return {key: unpack(item, tensors) for key, item in plain.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`load_state_dict`, but every tensor keeps the dtype it was saved in (torch would cast it to the parameter's)."""
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise InputError(f"the saved optimizer state does not fit this optimizer: {error}") from None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in saved["state"].items():
        state = optimizer.state[parameters[index]]
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)


# --- the model for everybody else ---


def export(
    run_dir: Path | str,
    step: int | None = None,
    out: Path | str | None = None,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Write a checkpoint (the newest, or that of `step`) as a directory that `from_pretrained` opens.

    It goes to RUN/model, or to `out`. Returns where it is.

    `trust_remote_code`: run the code that the checkpoint's config names, and name it in the export, too. Otherwise
    neither is done, whatever the run directory says.

    >>> model = AutoModelForCausalLM.from_pretrained(export("out/first"))
    """
    from apollo_optim.data.tokenizer import load_tokenizer
    from apollo_optim.train.config import load_config
    from apollo_optim.train.models import low_bit, with_new_weights

    run = Path(run_dir)
    there = checkpoints(run)
    if not there:
        raise InputError(f"{run} holds no checkpoint")
    if step is not None and step not in there:
        raise InputError(f"{run} holds no checkpoint of step {step}, only of {', '.join(map(str, there))}")
    checkpoint = there[max(there) if step is None else step]
    target = run / "model" if out is None else Path(out)
    if out is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already; choose another directory")
    verify(checkpoint)
    cfg = load_config(run / "config.yaml")
    config = saved_config(checkpoint, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]):  # drawing weights that are overwritten next must not disturb anybody
        model = with_new_weights(cfg.model, config, low_bit(cfg), trust_remote_code=trust_remote_code)
    load_weights(checkpoint, model)
    restore_generation(checkpoint, model)
    words = run / "tokenizer"
    tokenizer = load_tokenizer(str(words), trust_remote_code=trust_remote_code) if words.is_dir() else None
    write_model(model, tokenizer, target, keep_code=trust_remote_code)
    return target


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, target: Path, *, keep_code: bool = False
) -> None:
    """`save_pretrained`, but the directory appears complete or not at all.

    `keep_code`: a model that runs code of its own names it in its config (`auto_map`).
    """
    from transformers.utils import logging

    temporary = target.with_name(f".tmp-{target.name}")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with _failing_cleanly(temporary, "the exported model"):
            shutil.rmtree(temporary, ignore_errors=True)
            if any(writes_itself(p) for p in model.parameters()):
                _save_float(model, temporary)
            else:
                model.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            if not keep_code:
                drop_code(temporary)
            if target.exists():
                shutil.rmtree(target)
            disk.put_in_place(temporary, target)
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _save_float(model: PreTrainedModel, target: Path) -> None:
    """`save_pretrained` for low-bit weights: what they mean in the model's dtype, one shard in memory at a time."""
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    model.config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)
    whole = {id(t): (name, t) for name, t in reversed(model.state_dict(keep_vars=True).items())}  # tied ones once
    named = dict(reversed(whole.values()))
    sizes = {name: t.numel() * t.element_size() for name, t in named.items()}
    shards = _shards(sizes)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: named[name].detach() for name in names}
        save_file(
            {name: _own_memory(t.dequantize() if writes_itself(t) else t) for name, t in tensors.items()},
            target / file,
            metadata={"format": "pt"},
        )
        index |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
    (target / "model.safetensors.index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
