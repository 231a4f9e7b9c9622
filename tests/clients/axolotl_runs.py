"""axolotl's own command with `optimizer: apollo_adamw`, on `apollo-optim shim`; the table's row of it.

python tests/clients/axolotl_runs.py
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from command_runs import MATRICES, SAVED, STEPS, Result, call, compared, make_folder

RANK = 4
APOLLO = {
    "optimizer": "apollo_adamw", "optim_target_modules": "all_linear", "optim_args": {"rank": RANK, "scale": 1.0}
}  # fmt: skip


def train(folder: Path, out: str, **own: Any) -> Result:
    """One run of `axolotl train`."""
    config = {
        "base_model": "model", "datasets": [{"path": "rows.json", "ds_type": "json", "type": "alpaca"}],
        "output_dir": out, "dataset_prepared_path": "prepared", "sequence_len": 512, "sample_packing": False,
        "micro_batch_size": 4, "gradient_accumulation_steps": 1, "num_epochs": 1, "max_steps": STEPS,
        "save_steps": SAVED, "logging_steps": 2, "learning_rate": 1e-3, "lr_scheduler": "cosine",
        "weight_decay": 0.1, "bf16": False, "fp16": False, "tf32": False, "attn_implementation": "eager",
        "special_tokens": {"pad_token": "<pad>"}, "optimizer": "adamw_torch", **own,
    }  # fmt: skip
    (folder / f"{out}.yaml").write_text(json.dumps(config))  # which is YAML, too
    return Result(folder / out, call(["axolotl", "train", f"{out}.yaml"], folder))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name))
        once = {"max_steps": 3, "save_strategy": "no", "save_steps": None}
        parts = {**once, "micro_batch_size": 1, "gradient_accumulation_steps": 4}
        client = f"axolotl {version('axolotl')}, transformers {version('transformers')}"
        case = "llama, float32, optimizer: apollo_adamw"
        found = compared(train, folder, APOLLO, RANK, once, parts, MATRICES + 1)  # transformers takes the head in
        print(json.dumps({"client": client, "case": case, **found}))


if __name__ == "__main__":
    main()
