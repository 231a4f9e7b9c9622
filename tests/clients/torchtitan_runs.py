"""torchtitan's own trainer with our container in the place of its own; the table's rows of it.

python tests/clients/torchtitan_runs.py

It is, too, what torchtitan's `--module` and `--config` name: a function a configuration.
"""

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_runs import HERE, SAVED, SPECIAL, STEPS, call, far, make_rows, make_tokens
from torch import Tensor

LAYERS = 2
MATRICES = LAYERS * 5
"""Queries, keys and values are one matrix there."""


def apollo() -> Any:
    """torchtitan's own debug model, smaller and without FlexAttention, which has no backward on a CPU."""
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.config import DebugConfig, TrainingConfig
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    from apollo_optim.integrations.torchtitan import ApolloContainer

    config = llama3_debugmodel()
    model = config.model_spec.model
    model.layers = model.layers[:LAYERS]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.hf_assets_path = "tokens"
    config.dataloader = HuggingFaceTextDataLoader.Config(dataset="c4_test", dataset_path="rows")
    config.training = TrainingConfig(
        local_batch_size=4, seq_len=64, steps=STEPS, mixed_precision_param="float32", disable_cuda_graphs=True
    )
    config.debug = DebugConfig(seed=0)
    config.checkpoint = CheckpointManager.Config(enable=True, interval=SAVED, last_save_model_only=False)
    config.parallelism.spmd_backend = "partial_dtensor"  # with torch 2.13 the newer one shards plain tensors only
    config.validator.enable = False
    config.optimizer = ApolloContainer.Config(name="apollo-mini", knobs={"lr": 1e-2, "rest_lr": 1e-3})
    return config


def still() -> Any:
    """Moves nothing: what the weights are at the start."""
    config = apollo()
    config.optimizer.knobs = {"lr": 0.0}
    return config


def unwrapped() -> Any:
    """Without activation checkpointing, which wraps layers and so changes the names of their parameters."""
    config = apollo()
    config.activation_checkpoint = None
    return config


def adamw() -> Any:
    """torchtitan's own choice."""
    from torchtitan.components.optimizer import default_adamw

    config = apollo()
    config.optimizer = default_adamw(lr=1e-3)
    config.optimizer.implementation = "for-loop"
    return config


def make_folder(folder: Path) -> Path:
    """A tokenizer and texts."""
    (folder / "tokens").mkdir()
    (folder / "rows").mkdir()
    make_tokens().save(str(folder / "tokens" / "tokenizer.json"))
    (folder / "tokens" / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    texts = [{"text": f"{row['instruction']} {row['output']}"} for row in make_rows()]
    (folder / "rows" / "train.json").write_text("\n".join(map(json.dumps, texts)))
    return folder


def train(
    folder: Path, out: str, config: str, *words: Any, start: Path | None = None, steps: int = STEPS, processes: int = 1
) -> dict[str, Any]:
    """One run of `torchtitan.train`, from the start or from a checkpoint: what its last checkpoint holds."""
    if start is not None:
        shutil.copytree(start, folder / out / "checkpoint" / start.name)
    how = ["--module", "torchtitan_runs", "--config", config, "--dump_folder", out, "--training.steps", steps]
    program = ["torchrun", "--standalone", f"--nproc_per_node={processes}", HERE / "torchtitan_cpu.py"]
    call([*program, *how, *words], folder, (HERE,))
    return load(folder / out / "checkpoint" / f"step-{steps}")


def load(checkpoint: Path) -> dict[str, Any]:
    """All of a checkpoint, in torchtitan's names; read without unpickling objects."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as name:
        dcp_to_torch_save(checkpoint, Path(name) / "all.pt")
        saved: dict[str, Any] = torch.load(Path(name) / "all.pt", weights_only=True)
    return saved


def weights(saved: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in saved.items() if isinstance(value, Tensor)}


def tensors(saved: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and state."""
    return weights(saved) | {key: value for key, value in saved["optimizer"].items() if key.startswith("state.")}


def followed(saved: dict[str, Any]) -> str:
    """How many matrices use the rule: in a group that names it, with its state."""
    found = saved["optimizer"]
    rules = {key[len("param_groups.") : -len(".rule")]: rule for key, rule in found.items() if key.endswith(".rule")}
    ruled = [name for name, rule in rules.items() if rule == "apollo-mini"]
    assert all("layers." in name and found[f"state.{name}.exp_avg"].shape[-1] == 1 for name in ruled)
    assert {int(found[f"state.{name}.step"]) for name in rules} == {STEPS}
    return f"{len(ruled)} of {MATRICES}"


def resumes(folder: Path, full: dict[str, Any], out: str, config: str, **how: Any) -> float:
    """How far a run that goes on from the middle of the run `out` is off."""
    middle = folder / out / "checkpoint" / f"step-{SAVED}"
    return far(tensors(full), tensors(train(folder, f"{out}-{config}-again", config, start=middle, **how)))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name))
        sizes = ["--training.global_batch_size", 4, "--training.local_batch_size"]
        start = weights(train(folder, "still", "still", steps=1))
        once, parts = (weights(train(folder, f"in-{n}", "apollo", *sizes, n, steps=3)) for n in (4, 1))
        for processes, kind in ((1, "1 process"), (2, "2 processes, fsdp2")):
            how = {"processes": processes}
            ours, plain = (train(folder, f"{config}-{processes}", config, **how) for config in ("apollo", "adamw"))
            row = {
                "client": f"torchtitan {version('torchtitan')}",
                "case": f"{kind}, llama3, float32, ApolloContainer",
                "follows": followed(ours),
                **({"accumulated": far(parts, once) / far(once, start)} if processes == 1 else {}),
                "resumed": resumes(folder, ours, f"apollo-{processes}", "apollo", **how),
                "adamw": resumes(folder, plain, f"adamw-{processes}", "adamw", **how),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
