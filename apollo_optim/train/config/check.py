"""What a config may hold, and what of it may be another in a run that goes on."""

from __future__ import annotations

from typing import Any

from apollo_optim.core.errors import InputError
from apollo_optim.core.printing import is_unicode
from apollo_optim.optim.groups import rule_and_codec
from apollo_optim.optim.knobs import GENERAL
from apollo_optim.optim.recipes import check_knobs, find_optimizer
from apollo_optim.parallel.world import World
from apollo_optim.train.config.io import from_dict, to_dict
from apollo_optim.train.config.sections import OptimConfig, RunConfig

# What may differ between a run and its continuation: where it lies, what is measured, kept and shown, the number of
# threads, and whether it steps inside the backward pass (which changes no bit). The number of steps is judged by the
# schedule instead (loop.py): it may change as long as no step that was made would have had another rate.
MAY_CHANGE = (
    "out",
    "quant.tally",
    "eval",
    "checkpoint",
    "log",
    "parallel.timeout",
    "train.threads",
    "train.release",
    "train.steps",
    "train.epochs",  # what it makes of the steps
    "data.cache_dir",
    "data.source",  # judged by the hash of the text, where it has one
    "data.validation_source",
    "data.chat_template",  # by that of the template
)

# What computes the same in another order: a continued run may change it (after an out-of-memory, on another device),
# but is not bit-for-bit equal any more, and says so.
ONLY_ROUNDS = (
    "model.attention",
    "model.compile",
    "model.gradient_checkpointing",
    "optim.compile",
    "parallel.mode",
    "parallel.replicas",
    "parallel.tensor",
    "train.deterministic",
    "train.device",
    "train.loss",
    "train.matmul_precision",
    "train.micro_batch",
)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys in which two plain configs differ."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(prefix + key)
    return found


def may_change(key: str) -> bool:
    """Whether a continued run may have another value here."""
    return any(key == allowed or key.startswith(allowed + ".") for allowed in MAY_CHANGE)


def only_rounds(key: str) -> bool:
    """Whether another value here computes the same, but for the rounding."""
    return key in ONLY_ROUNDS


def check(cfg: RunConfig) -> None:
    """Refuse what makes no sense, each in one line: the optimizer by its rules, as the library does.

    The data check their own keys. A config that was made in Python has its types checked as a file's.
    """
    plain = to_dict(cfg)
    check_texts(plain)
    from_dict(plain)
    check_optimizer(cfg.optim)
    positive: dict[str, int | float | None] = {
        "train.steps": cfg.train.steps,
        "train.epochs": cfg.train.epochs,
        "train.batch_size": cfg.train.batch_size,
        "train.micro_batch": cfg.train.micro_batch,
        "train.clip": cfg.train.clip,
        "train.clip_tensor": cfg.train.clip_tensor,
        "train.threads": cfg.train.threads,
        "eval.every": cfg.eval.every,
        "eval.tokens": cfg.eval.tokens,
        "eval.batch_size": cfg.eval.batch_size,
        "checkpoint.every": cfg.checkpoint.every,
        "checkpoint.keep": cfg.checkpoint.keep,
        "log.every": cfg.log.every,
        "parallel.timeout": cfg.parallel.timeout,
        "parallel.replicas": cfg.parallel.replicas,
        "parallel.tensor": cfg.parallel.tensor,
        "quant.tally": cfg.quant.tally,
        "model.vocab_size": cfg.model.vocab_size,
    }
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise InputError(f"{key}={value}: must be greater than 0")
    for key, fraction in {"schedule.min_lr": cfg.schedule.min_lr, "schedule.decay": cfg.schedule.decay}.items():
        if not 0 <= fraction <= 1:
            raise InputError(f"{key}={fraction}: a fraction between 0 and 1")
    if cfg.train.epochs is not None and cfg.data.format == "text":
        raise InputError(f"train.epochs={cfg.train.epochs:g}: only rows of answers are counted; say train.steps")
    if not cfg.schedule.warmup >= 0:
        raise InputError(
            f"schedule.warmup={cfg.schedule.warmup}: a fraction below 1 or a number of steps, not negative"
        )
    if cfg.schedule.warmup > cfg.train.steps:
        raise InputError(
            f"schedule.warmup={cfg.schedule.warmup} is longer than the run (train.steps={cfg.train.steps})"
        )
    if cfg.train.clip is not None and cfg.train.release:
        raise InputError(
            f"train.clip={cfg.train.clip}: train.release steps the first weight before the total norm of all gradients "
            "is known; use train.clip_tensor, each gradient's own norm (the norm-growth limiter of APOLLO bounds the "
            "matrices' steps without either)"
        )
    if cfg.train.clip is not None and cfg.train.clip_tensor is not None:
        raise InputError("train.clip and train.clip_tensor: choose one of them")


def tensor_processes(cfg: RunConfig, world: World) -> int:
    """How many processes see the same rows, each with its part of the matrices."""
    if cfg.parallel.mode == "tp":
        return world.size
    return cfg.parallel.tensor if cfg.parallel.mode == "tp+fsdp2" and world.size > 1 else 1


def check_processes(cfg: RunConfig, world: World) -> None:
    """Refuse what several processes cannot do."""
    tensor = tensor_processes(cfg, world)
    if world.size % tensor:
        raise InputError(f"parallel.tensor={tensor}: {world.size} processes cannot be cut into groups of so many")
    if cfg.train.batch_size % (world.size // tensor):
        who = f"{world.size} processes" if tensor == 1 else f"{world.size // tensor} groups of processes"
        raise InputError(
            f"train.batch_size={cfg.train.batch_size}: {who} cannot share it equally; choose a multiple, or another "
            "number of processes"
        )
    if world.size == 1:
        return
    if tensor > 1 and (cfg.quant.bits or find_optimizer(cfg.optim.name).bits):
        raise InputError(
            f"parallel.mode={cfg.parallel.mode} with low-bit weights, whose blocks have one scale: choose "
            "--parallel.mode fsdp2, which cuts between rows"
        )
    if tensor > 1 and cfg.model.compile:
        raise InputError(
            f"model.compile with parallel.mode={cfg.parallel.mode} has not been tried: leave it out, or choose fsdp2"
        )
    if cfg.parallel.mode == "ddp" and cfg.train.release:
        raise InputError(
            "train.release: with parallel.mode=ddp gradients are averaged after it has stepped; choose "
            "--parallel.mode fsdp2, which also has a part of the weights in each process, or leave release out"
        )
    if cfg.parallel.mode == "hsdp" and world.size % cfg.parallel.replicas:
        raise InputError(
            f"parallel.replicas={cfg.parallel.replicas}: {world.size} processes cannot be cut into so many equal groups"
        )


def check_texts(plain: Any, key: str = "") -> None:
    """Refuse names that no file can have and that cannot be written: they must read back as they are."""
    if isinstance(plain, dict):
        for name, value in plain.items():
            check_texts(value, f"{key}.{name}".lstrip("."))
    elif isinstance(plain, (list, tuple)):
        for value in plain:
            check_texts(value, key)
    elif isinstance(plain, str) and ("\0" in plain or not is_unicode(plain)):
        raise InputError(f"{key}={plain!r}: not a name that can be written; give it another")


def check_optimizer(cfg: OptimConfig) -> None:
    """Refuse an unknown name, a knob that means nothing to its rules, and values that they do not take."""
    recipe = find_optimizer(cfg.name)
    for choice in (cfg.rest, cfg.embedding, cfg.head):
        if choice is not None:
            rule_and_codec(choice)
    asked = {key: value for key, value in cfg.flat().items() if value is not None}
    check_knobs(
        recipe.choosing(asked), {key: value for key, value in asked.items() if key in GENERAL or key in cfg.knobs}
    )
