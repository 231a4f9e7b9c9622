"""A run is a file: its sections, reading and writing it, and what it may hold."""

from apollo_optim.data.config import DataConfig
from apollo_optim.train.config.check import (
    check,
    check_processes,
    differences,
    may_change,
    only_rounds,
    tensor_processes,
)
from apollo_optim.train.config.io import from_dict, load_config, read_run_file, save_config, to_dict
from apollo_optim.train.config.parser import check_names, key_types, make_parser, parse, plain
from apollo_optim.train.config.sections import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
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
    "ParallelConfig",
    "QuantConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "check",
    "check_names",
    "check_processes",
    "differences",
    "from_dict",
    "key_types",
    "load_config",
    "make_parser",
    "may_change",
    "only_rounds",
    "parse",
    "plain",
    "read_run_file",
    "save_config",
    "tensor_processes",
    "to_dict",
]
