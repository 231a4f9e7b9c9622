"""ms-swift's own command with `--optimizer apollo_optim` of our plugin; the table's row of it.

python tests/clients/ms_swift_runs.py
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from command_runs import SAVED, STEPS, Result, call, compared, make_folder
from torch import Tensor

RANK = 4
APOLLO = {
    "external_plugins": "plugin.py", "optimizer": "apollo_optim", "optim_args": f"name=apollo,rank={RANK},rest_lr=2e-3"
}  # fmt: skip


class SwiftResult(Result):
    """ms-swift writes weights into checkpoints alone."""

    @property
    def weights(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        last = max(self.out.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
        return load_file(last / "model.safetensors")


def train(folder: Path, out: str, **own: Any) -> SwiftResult:
    """One run of `swift sft`."""
    (folder / "plugin.py").write_text("import apollo_optim.integrations.ms_swift\n")
    words = {
        "model": "model", "model_type": "llama", "template": "default", "dataset": "rows.json",
        "tuner_type": "full", "torch_dtype": "float32", "attn_impl": "eager", "output_dir": out, "add_version": False,
        "max_steps": STEPS, "save_steps": SAVED, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3, "weight_decay": 0.1, "report_to": "none",
        "check_model": False,  # it asks a server of its own whether the weights are the newest
        **own,
    }  # fmt: skip
    line = [word for key, value in words.items() for word in (f"--{key}", value)]
    return SwiftResult(folder / out, call(["swift", "sft", *line], folder, ()))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(Path(name))
        once = {"max_steps": 3, "save_steps": 3}
        parts = {**once, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        client = f"ms-swift {version('ms-swift')}, transformers {version('transformers')}"
        case = "llama, float32, --optimizer apollo_optim"
        print(json.dumps({"client": client, "case": case, **compared(train, folder, APOLLO, RANK, once, parts)}))


if __name__ == "__main__":
    main()
