"""The model for everybody else: a directory that `from_pretrained` opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from apollo_optim.core.errors import InputError
from apollo_optim.core.place import is_sharded
from apollo_optim.core.storage import writes_itself
from apollo_optim.data.foreign import drop_code
from apollo_optim.data.tokenizer import load_tokenizer
from apollo_optim.train import disk
from apollo_optim.train.checkpoint.shards import failing_cleanly, in_shards, load_weights, named_weights, own_memory
from apollo_optim.train.checkpoint.store import checkpoints, restore_generation, saved_config, verify
from apollo_optim.train.config import load_config
from apollo_optim.train.models import low_bit, with_new_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        with failing_cleanly(temporary, "the exported model"):
            shutil.rmtree(temporary, ignore_errors=True)
            if any(writes_itself(p) or is_sharded(p) for p in model.parameters()):
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
    """`save_pretrained` for low-bit and for sharded weights: what they mean, one file of them in memory at a time."""
    from safetensors.torch import save_file

    target.mkdir(parents=True)
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
            {name: own_memory(t.dequantize() if writes_itself(t) else t) for name, t in tensors.items()},
            target / file,
            metadata={"format": "pt"},
        )
        index |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
    (target / "model.safetensors.index.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
