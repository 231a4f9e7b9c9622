"""Everything of a run at step 0: data, model, optimizer."""

from __future__ import annotations

import importlib
import os
import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from apollo_optim import Released, release
from apollo_optim.core.compile import can_compile
from apollo_optim.core.errors import InputError
from apollo_optim.optim.compiled import Graphs
from apollo_optim.optim.precompile import precompile
from apollo_optim.parallel.spread import replicated, sharded
from apollo_optim.parallel.tensor import check_split
from apollo_optim.parallel.world import ALONE, World
from apollo_optim.plan.shards import blocks_of
from apollo_optim.train import checkpoint, measure
from apollo_optim.train.config import RunConfig
from apollo_optim.train.gradients import Gradients
from apollo_optim.train.loss import Learner, check_packing
from apollo_optim.train.models import build_model, low_bit, usable_vocabulary
from apollo_optim.train.optimizer import make_optimizer
from apollo_optim.train.plan import model_of
from apollo_optim.train.run_dir import Earlier, own_tokenizer
from apollo_optim.train.state import TrainState

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from apollo_optim.data import Data


@dataclass
class Job:
    """A run that is built: what it changes (`state`), and what it needs besides, none of which is saved."""

    cfg: RunConfig
    run: Path
    """The run directory."""
    data: Data
    state: TrainState
    released: Released | None = None
    """The step inside the backward pass, if `train.release`."""
    baseline: dict[str, int] = field(default_factory=dict)
    """Bytes resident before there was a model: after the imports, and with the text open."""
    trust_remote_code: bool = False
    """Said by the call: models and tokenizers may run code of their own."""
    own_tokenizer: bool = False
    """The tokenizer was read from the run directory."""
    changed: list[str] = field(default_factory=list)
    """Keys that round otherwise than before the run was resumed, in words."""
    damaged: list[str] = field(default_factory=list)
    """What is wrong with checkpoints that are newer than the one it was resumed from."""
    ended: dict[str, int] | None = None
    """What it took of memory, if it has ended already: this process trains nothing."""
    world: World = ALONE
    learner: torch.nn.Module | None = None
    """The model and its loss, spread over several processes."""

    @property
    def model(self) -> PreTrainedModel:
        """What is trained."""
        return self.state.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What trains it."""
        return self.state.optimizer

    @property
    def gradients(self) -> Gradients:
        """What they take of memory."""
        return Gradients.of(self.model, self.cfg.train, compiled=self.cfg.model.compile, processes=self.world.size)


def build(
    cfg: RunConfig,
    run: Path,
    earlier: Earlier | None = None,
    *,
    trust_remote_code: bool = False,
    world: World = ALONE,
    data: Data | None = None,
) -> Job:
    """Data, model and optimizer at step 0; `data`: if it is open already.

    What goes on has all that it needs in its own directory: `earlier` brings the config of the model and the tokenizer,
    and weights to start from are not read again.
    """
    from apollo_optim.data import open_data

    earlier = earlier or Earlier()
    config = tokenizer = None
    if earlier.state is not None:
        config = checkpoint.saved_config(earlier.state["checkpoint"], trust_remote_code=trust_remote_code)
        tokenizer = own_tokenizer(run, earlier.state, trust_remote_code)

    device = choose_device(cfg, world)
    if cfg.train.release and device.type == "cpu":
        measure.give_back_memory()
    importlib.import_module("transformers.modeling_utils")  # what the model would import, to be counted without it
    baseline = {"imports": measure.resident_memory()}
    if data is None:
        with world.leader_first():
            data = open_data(cfg.data, tokenizer, trust_remote_code=trust_remote_code)
    baseline["data"] = measure.resident_memory()
    vocabulary = usable_vocabulary(data.tokenizer)
    mode = cfg.parallel.mode if world.size > 1 else None
    graphs: Graphs = {}
    shards = mode not in (None, "ddp")
    if not shards:  # what is sharded has other shapes
        graphs = compiled_beforehand(cfg, device, vocabulary, config, trust_remote_code=trust_remote_code)
    torch.manual_seed(cfg.train.seed)
    random.seed(cfg.train.seed)
    learner: torch.nn.Module | None = None

    def spread(model: PreTrainedModel) -> None:
        nonlocal learner
        replicas = cfg.parallel.replicas if mode == "hsdp" else 1
        if world.tensor > 1:
            check_split(blocks_of(model), model.config, world.tensor)
        learner = sharded(Learner(model, cfg.train.loss), blocks_of(model), world, device, replicas)

    packs = cfg.data.format != "text" and cfg.data.mode == "pack"
    model = build_model(
        cfg.model,
        vocabulary,
        cfg.data.seq_len,
        data.tokenizer,
        low_bit(cfg),
        config,
        trust_remote_code=trust_remote_code,
        spread=spread if shards and not packs else None,  # (a sharded model cannot be asked what it sees)
    )
    torch.nn.Module.to(model, device)
    model.train()
    if packs:
        check_packing(model)
    if cfg.model.compile and can_compile(device.type):
        # In place: the names of the parameters stay. Without the head: its loss may be made in parts.
        model.base_model.compile()
    if shards and learner is None:  # before there is an optimizer: it is given other parameters
        spread(model)
    optimizer = make_optimizer(cfg.optim, model, graphs)
    with warnings.catch_warnings():
        if world.shares == 1:  # they all have the same gradients of what is not sharded
            warnings.filterwarnings("ignore", "several processes, and parameters that are not sharded")
        released = release(model, optimizer, clip=cfg.train.clip_tensor) if cfg.train.release else None
    if mode == "ddp":
        learner = replicated(Learner(model, cfg.train.loss), unused=has_experts(model))
    return Job(
        cfg=cfg,
        run=run,
        data=data,
        state=TrainState(model, optimizer, data.train, data.identity),
        released=released,
        baseline=baseline,
        trust_remote_code=trust_remote_code,
        own_tokenizer=tokenizer is not None,
        changed=earlier.changed,
        damaged=earlier.damaged,
        ended=earlier.memory,
        world=world,
        learner=learner,
    )


def has_experts(model: PreTrainedModel) -> bool:
    """Whether tokens are routed, so that some weights may take no part in a step."""
    return any("expert" in name for name, _ in model.named_parameters())


def compiled_beforehand(
    cfg: RunConfig,
    device: torch.device,
    vocabulary: int | None = None,
    config: PretrainedConfig | None = None,
    *,
    trust_remote_code: bool = False,
) -> Graphs:
    """The compiled steps of the run's optimizer, while nothing else is in memory. (A GPU's weights are elsewhere.)"""
    if device.type != "cpu" or cfg.optim.compile is False:
        return {}
    model = model_of(cfg, vocabulary, config, trust_remote_code=trust_remote_code)
    return precompile(make_optimizer(cfg.optim, model), device)


def choose_device(cfg: RunConfig, world: World = ALONE) -> torch.device:
    """As configured, else the GPU if there is one (each process's own); sets threads and determinism."""
    if cfg.train.threads is not None:
        torch.set_num_threads(cfg.train.threads)
    torch.set_float32_matmul_precision(cfg.train.matmul_precision)
    try:
        device = torch.device(cfg.train.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None and world.size > 1:
            device = torch.device("cuda", world.local_rank)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"train.device={cfg.train.device}: {str(error).splitlines()[0]}") from None
    if cfg.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device
