"""What a run saves, and the model that it leaves for everybody else."""

from apollo_optim.train.checkpoint.export import check_export, export, run_tokenizer, save_tokenizer, write_model
from apollo_optim.train.checkpoint.shards import SaveFailed, lend, load_weights, weights
from apollo_optim.train.checkpoint.store import (
    checkpoints,
    from_newest,
    load_state,
    newest,
    restore_generation,
    save,
    saved_config,
    saved_identity,
    saved_run,
    set_aside,
    sweep,
    verify,
)
from apollo_optim.train.checkpoint.tree import pack, restore_optimizer, unpack

__all__ = [
    "SaveFailed",
    "check_export",
    "checkpoints",
    "export",
    "from_newest",
    "lend",
    "load_state",
    "load_weights",
    "newest",
    "pack",
    "restore_generation",
    "restore_optimizer",
    "run_tokenizer",
    "save",
    "save_tokenizer",
    "saved_config",
    "saved_identity",
    "saved_run",
    "set_aside",
    "sweep",
    "unpack",
    "verify",
    "weights",
    "write_model",
]
