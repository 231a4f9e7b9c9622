"""The model for everybody else: a directory that `from_pretrained` opens."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apollo_optim.core import disk
from apollo_optim.core.errors import InputError
from apollo_optim.core.manifest import NAME as MANIFEST
from apollo_optim.core.manifest import Format, check_files, read_manifest, strangers, write_manifest
from apollo_optim.core.place import is_sharded
from apollo_optim.core.reading import read_json
from apollo_optim.core.storage import unsharded, writes_itself
from apollo_optim.data.foreign import context_of, drop_code
from apollo_optim.data.tokenizer import TOKENIZER, fingerprint, own_tokenizer
from apollo_optim.train.checkpoint.shards import (
    SaveFailed,
    failing_in_one_line,
    in_shards,
    load_weights,
    named_weights,
    own_memory,
)
from apollo_optim.train.checkpoint.store import (
    checkpoints,
    newest,
    restore_generation,
    saved_config,
    saved_identity,
    saved_run,
    verify,
)
from apollo_optim.train.models import low_bit, with_new_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXPORT = Format("apollo-optim export", 3, "a model that apollo-optim exported")
LOADED = (".json", ".safetensors", ".bin", ".jinja")  # what `from_pretrained` looks for


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
    run = Path(run_dir)
    target = run / "model" if out is None else Path(out).absolute()
    if out is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already; choose another directory")
    while True:
        checkpoint = _chosen(run, step)
        try:
            model, tokenizer = _opened(run, checkpoint, trust_remote_code=trust_remote_code)
            break
        except InputError:
            if step is not None or newest(run) in (checkpoint, None):
                raise
            # The run goes on, and has dropped this checkpoint for a newer one.
    write_model(model, tokenizer, target, keep_code=trust_remote_code)
    return target


def _chosen(run: Path, step: int | None) -> Path:
    there = checkpoints(run)
    if not there:
        raise InputError(f"{run} holds no checkpoint")
    if step is not None and step not in there:
        raise InputError(f"{run} holds no checkpoint of step {step}, only of {', '.join(map(str, there))}")
    return there[max(there) if step is None else step]


def _opened(run: Path, checkpoint: Path, *, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    """The model and the tokenizer of a checkpoint, as its own files say: RUN/config.yaml is not asked."""
    verify(checkpoint)
    cfg = saved_run(run, checkpoint)
    config = saved_config(checkpoint, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]):  # drawing weights that are overwritten next must not disturb anybody
        model = with_new_weights(cfg.model, config, low_bit(cfg), trust_remote_code=trust_remote_code)
    load_weights(checkpoint, model)
    restore_generation(checkpoint, model)
    return model, run_tokenizer(run, saved_identity(checkpoint), trust_remote_code=trust_remote_code)


def run_tokenizer(run: Path, identity: dict[str, Any], *, trust_remote_code: bool = False) -> Any:
    """The run's copy of its tokenizer, None if it has none. `identity`: of the text that it was trained on.

    Raises InputError if it is not the one that the run was trained with.
    """
    words = run / "tokenizer"
    if not words.is_dir():
        return None
    tokenizer = own_tokenizer(words, trust_remote_code=trust_remote_code)
    expected = (identity.get("tokenizer") or {}).get("sha256")
    if expected not in (None, fingerprint(tokenizer)):
        raise InputError(f"{words} is not the tokenizer that {run} was trained with: put that back")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, target: Path, *, keep_code: bool = False) -> None:
    """The run's copy of its tokenizer, with a manifest."""
    with disk.new_folder(target, keep=strangers(target, TOKENIZER) if target.is_dir() else ()) as folder:
        tokenizer.save_pretrained(folder)
        if not keep_code:
            drop_code(folder)
        write_manifest(folder, TOKENIZER)


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, target: Path, *, keep_code: bool = False
) -> None:
    """`save_pretrained`, but the directory appears complete or not at all, and with a manifest.

    What was exported there before is replaced; what else lies there (a README.md) stays. Raises SaveFailed where that
    is in the way, and what it is.

    `keep_code`: a model that runs code of its own names it in its config (`auto_map`).
    """
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with failing_in_one_line("the exported model", target.parent):
            kept = strangers(target, EXPORT) if target.is_dir() and not target.is_symlink() else []
            if in_the_way := [name for name in kept if name.endswith(LOADED)]:
                raise SaveFailed(
                    f"{target / in_the_way[0]} was not written by an export, or was changed since: move it away"
                )
            with disk.new_folder(target, keep=kept) as folder:
                if any(writes_itself(p) or is_sharded(p) for p in model.parameters()):
                    _save_float(model, folder)
                else:
                    model.save_pretrained(folder)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
                    _for_other_readers(folder, model, tokenizer)
                if not keep_code:
                    drop_code(folder)
                write_manifest(folder, EXPORT)
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _for_other_readers(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say what generation and older readers ask for, where nobody has: transformers 4, pipelines, lm-eval, llama.cpp.

    The class by the name that transformers 4 knows, too; special tokens under the key of both; a pad token, padding on
    the left, the model's length; and to generate, the tokens that end and pad.
    """
    path = folder / "tokenizer_config.json"
    words = read_json(path)
    if words.get("tokenizer_class") == "TokenizersBackend":
        words["tokenizer_class"] = "PreTrainedTokenizerFast"
        words.setdefault("model_input_names", ["input_ids", "attention_mask"])  # in 4: token_type_ids as well
    if isinstance(words.get("extra_special_tokens"), list):  # of transformers 5; in 4 this key is a table
        words["additional_special_tokens"] = words.pop("extra_special_tokens")
    if words.get("pad_token") is None and words.get("eos_token") is not None:
        words["pad_token"] = words["eos_token"]
        words["padding_side"] = "left"
    context = context_of(model.config)
    if context is not None and words.get("model_max_length", 1e30) > 1e9:
        words["model_max_length"] = context
    disk.write(path, json.dumps(words, indent=2) + "\n")
    path = folder / "generation_config.json"
    if path.exists():
        how = read_json(path)
        found = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        how |= {key: token for key, token in found.items() if how.get(key) is None and token is not None}
        end = how.get("eos_token_id")
        if how.get("pad_token_id") is None and end is not None:
            pad = tokenizer.pad_token_id
            how["pad_token_id"] = pad if pad is not None else end[0] if isinstance(end, list) else end
        disk.write(path, json.dumps(how, indent=2) + "\n")


def in_float(t: torch.Tensor) -> torch.Tensor:
    """The float numbers that a weight means, all of it. Processes lend their parts of it in the form of `weights`."""
    everything = unsharded(t)
    return everything.dequantize() if writes_itself(everything) else everything


def check_export(folder: Path) -> None:
    """Compare an exported model with its manifest, where it has one. Raises InputError naming the file that differs."""
    if not (folder / MANIFEST).exists():
        return
    try:
        files = read_manifest(folder, EXPORT)["files"]
        check_files(folder, files, alone=False)
        for name in sorted(os.listdir(folder)):
            if name.endswith(LOADED) and name not in files and name != MANIFEST:
                raise InputError(f"{folder / name} is not listed in {MANIFEST}")
    except InputError as error:
        raise InputError(f"{error}; export it again, or delete {folder / MANIFEST} to use what is there") from error


def _save_float(model: PreTrainedModel, target: Path) -> None:
    """`save_pretrained` for low-bit and for sharded weights: what they mean, one file of them in memory at a time."""
    from safetensors.torch import save_file

    model.config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)
    named = named_weights(model)
    sizes = {name: t.numel() * t.element_size() for name, t in named.items()}
    shards = in_shards(sizes)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: named[name].detach() for name in names}
        save_file(
            {name: own_memory(in_float(t)) for name, t in tensors.items()},
            target / file,
            metadata={"format": "pt"},
        )
        index |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
    disk.write(target / "model.safetensors.index.json", json.dumps(content, indent=1))
