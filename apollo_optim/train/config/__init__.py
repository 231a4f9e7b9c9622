"""A run is a file: its sections, reading and writing it, and what it may hold."""

from apollo_optim.data.config import DataConfig
from apollo_optim.train.config.check import check, differences, may_change, only_rounds
from apollo_optim.train.config.io import from_dict, load_config, read_run_file, save_config, to_dict
from apollo_optim.train.config.sections import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "QuantConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "check",
    "differences",
    "from_dict",
    "load_config",
    "may_change",
    "only_rounds",
    "read_run_file",
    "save_config",
    "to_dict",
]
