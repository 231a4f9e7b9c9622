"""litgpt's own command with an optimizer of ours by class path; the table's row of it.

python tests/clients/litgpt_runs.py
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from command_runs import SAVED, STEPS, call, far, make_rows, make_tokens
from torch import Tensor

OURS = {"class_path": "apollo_optim.integrations.bare.ApolloMini", "init_args": {"lr": 1e-2, "weight_decay": 0.1}}
TORCH = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}


def make_folder(folder: Path) -> Path:
    """A tiny random model as litgpt keeps it, and rows."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import save_config

    (folder / "model").mkdir()
    (folder / "rows").mkdir()
    tokens = make_tokens()
    tokens.save(str(folder / "model" / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(special))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "intermediate_size": 128, "block_size": 512}
    config = Config(name="tiny", padded_vocab_size=tokens.get_vocab_size(), mlp_class_name="LLaMAMLP", **sizes)
    save_config(config, folder / "model")
    torch.save(GPT(config).state_dict(), folder / "model" / "lit_model.pth")
    for name in ("train", "val"):
        (folder / "rows" / f"{name}.json").write_text(json.dumps(make_rows()))
    return folder


def train(
    folder: Path, out: str, optimizer: dict[str, Any], resume: Path | None = None, micro: int = 4, steps: int = STEPS
) -> dict[str, Any]:
    """One run of `litgpt finetune_full`: what its last checkpoint holds, read without unpickling objects."""
    config = {
        "checkpoint_dir": "model", "out_dir": out, "precision": "32-true", "devices": 1, "optimizer": optimizer,
        "data": {"class_path": "litgpt.data.JSON", "init_args": {"json_path": "rows", "num_workers": 0}},
        "train": {
            "save_interval": SAVED if steps == STEPS else steps, "log_interval": 1, "global_batch_size": 4,
            "micro_batch_size": micro, "lr_warmup_steps": 2, "epochs": 1, "max_steps": steps,
        },
        "eval": {"interval": 1000, "max_iters": 1, "initial_validation": False, "final_validation": False},
        "resume": False if resume is None else str(resume),
    }  # fmt: skip
    (folder / f"{out}.yaml").write_text(json.dumps(config))
    call(["litgpt", "finetune_full", "--config", f"{out}.yaml"], folder)
    return load(folder / out, steps)


def load(out: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(out / f"step-{step:06d}" / "lit_model.pth", weights_only=True)
    return found


def tensors(saved: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and state of a checkpoint."""
    state = saved["optimizer"]["state"]
    return saved["model"] | {f"{i}.{key}": value for i, one in state.items() for key, value in one.items()}


def followed(saved: dict[str, Any]) -> str:
    """How many matrices use the rule: in a group that names it, with its state."""
    groups = saved["optimizer"]["param_groups"]
    pairs = ((group, zip(group["params"], group["param_names"], strict=True)) for group in groups)
    ruled = [pair for group, named in pairs if group["rule"] == "apollo-mini" for pair in named]
    assert all(saved["optimizer"]["state"][i]["exp_avg"].shape[-1] == 1 for i, _ in ruled)
    assert all("attn" in name or "mlp" in name for _, name in ruled)
    assert {int(one["step"]) for one in saved["optimizer"]["state"].values()} == {STEPS}
    return f"{len(ruled)} of {2 * 5}"


def resumes(folder: Path, full: dict[str, Any], out: str, optimizer: dict[str, Any]) -> float:
    """How far a run that goes on from the middle of the run `out` is off."""
    again = train(folder, f"{out}-again", optimizer, resume=folder / out / f"step-{SAVED:06d}" / "lit_model.pth")
    return far(tensors(full), tensors(again))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name))
        once, parts = (train(folder, f"in-{n}", OURS, micro=n, steps=3)["model"] for n in (4, 1))
        start = torch.load(folder / "model" / "lit_model.pth", weights_only=True)
        ours, adamw = train(folder, "ours", OURS), train(folder, "adamw", TORCH)
        row = {
            "client": f"litgpt {version('litgpt')}",
            "case": "llama, float32, bare.ApolloMini",
            "follows": followed(ours),
            "accumulated": far(parts, once) / far(once, start),
            "resumed": resumes(folder, ours, "ours", OURS),
            "adamw": resumes(folder, adamw, "adamw", TORCH),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
