"""LLaMA-Factory's own command with `use_apollo: true`, on `apollo-optim shim`; the table's rows of it.

python tests/clients/llamafactory_runs.py
"""

import json
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from command_runs import HERE, SAVED, STEPS, Result, call, compared, make_folder

from apollo_optim.cli import shim

RANK = 4
APOLLO = {"use_apollo": True, "apollo_rank": RANK}


def train(folder: Path, out: str, **own: Any) -> Result:
    """One run of `llamafactory-cli train`."""
    config = {
        "model_name_or_path": "model", "stage": "sft", "do_train": True, "finetuning_type": "full", "dataset": "rows",
        "dataset_dir": ".", "template": "default", "cutoff_len": 64, "output_dir": out, "logging_steps": 2,
        "save_steps": SAVED, "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "weight_decay": 0.1, "report_to": "none", "optim": "adamw_torch", **own,
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    (folder / f"{out}.yaml").write_text(json.dumps(config))  # which is YAML, too
    stand_ins = () if find_spec("torchaudio") else (HERE / "stand_ins",)
    return Result(folder / out, call(["llamafactory-cli", "train", f"{out}.yaml"], folder, (shim.FOLDER, *stand_ins)))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name))
        once = {"max_steps": 3, "save_strategy": "no"}
        parts = {**once, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        client = f"LLaMA-Factory {version('llamafactory')}, transformers {version('transformers')}"
        case = "llama, float32, use_apollo: true"
        print(json.dumps({"client": client, "case": case, **compared(train, folder, APOLLO, RANK, once, parts)}))


if __name__ == "__main__":
    main()
