"""Other people's commands, as their users call them: a tiny random Llama and rows of text, a process a run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apollo_optim.cli import shim

Row = dict[str, Any]
HERE = Path(__file__).resolve().parent
STEPS, SAVED = 8, 4
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
MATRICES = 2 * 7
"""Of `make_folder`'s model: attention and MLP of two layers."""


def make_tokens() -> Any:
    """A tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*SPECIAL.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(list(SPECIAL.values()))
    return tokens


def make_rows() -> list[dict[str, str]]:
    """64 sums, as instructions of one length: a mean over micro-batches is that over the batch."""
    sums = [(a, b) for a in range(8) for b in range(8)]
    return [{"instruction": f"Add {a} and {b}.", "input": "", "output": f"{a} + {b} = {a + b:02}"} for a, b in sums]


def make_folder(folder: Path) -> Path:
    """A model of 2 layers with its tokenizer in `model/`, and instructions in `rows.json`."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = make_tokens()
    PreTrainedTokenizerFast(tokenizer_object=tokens, **SPECIAL).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=tokens.get_vocab_size(), max_position_embeddings=512, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "rows.json").write_text(json.dumps(make_rows()))
    return folder


def on_two(script: str, *words: str) -> Row:
    """The row that a script prints last, run on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *words]
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, check=True, env=env, timeout=600, stdout=subprocess.PIPE, text=True).stdout
    row: Row = json.loads(said.splitlines()[-1])
    return row


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between two sets of tensors of the same names; 0.0 where they are equal."""
    assert one.keys() == other.keys()
    pairs = ((torch.as_tensor(a).double(), torch.as_tensor(other[key]).double()) for key, a in one.items())
    return max((a - b).abs().max().item() for a, b in pairs)


def call(words: list[Any], folder: Path, path: tuple[Path, ...] = (shim.FOLDER,)) -> str:
    """Run a command of this environment with one thread. Returns what it said; raises with its end where it failed."""
    program = Path(sys.executable).parent / str(words[0])
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, HERE.parents[1]])), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "AXOLOTL_DO_NOT_TRACK": "1",  # it waits for its statistics server at the end
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    line = [program, *map(str, words[1:])]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = subprocess.run(line, check=False, cwd=folder, env=env, text=True, **out)
    if run.returncode:
        raise RuntimeError(f"{words[0]} ended with {run.returncode}: {run.stdout[-3000:]}")
    return run.stdout


@dataclass
class Result:
    """What a run of a command that trains by transformers' Trainer leaves on the disk."""

    out: Path
    said: str

    @property
    def weights(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.out / "model.safetensors")

    @property
    def optimizer(self) -> dict[str, Any]:
        """Of the last checkpoint; read without unpickling objects."""
        return torch.load(self.out / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)

    @property
    def state(self) -> dict[str, Any]:
        return {f"{i}.{key}": v for i, state in self.optimizer["state"].items() for key, v in state.items()}

    def followed(self, rank: int, matrices: int = MATRICES) -> str:
        """How many matrices use APOLLO: in a group that names this library's rule, with a state of that rank."""
        saved = self.optimizer
        ruled = [i for group in saved["param_groups"] if group["rule"] == "apollo" for i in group["params"]]
        assert all(saved["state"][i]["exp_avg"].shape[1] == rank for i in ruled)
        assert {int(state["step"]) for state in saved["state"].values()} == {STEPS}
        return f"{len(ruled)} of {matrices}"


def resumes(train: Callable[..., Result], folder: Path, full: Result, out: str, **own: Any) -> float:
    """How far a run that goes on from the middle of another is off, in weights and state."""
    again = train(folder, out, resume_from_checkpoint=str(full.out / f"checkpoint-{SAVED}"), **own)
    return max(far(full.weights, again.weights), far(full.state, again.state))


def compared(
    train: Callable[..., Result], folder: Path, ours: Row, rank: int, once: Row, parts: Row, matrices: int = MATRICES
) -> Row:
    """The table's figures of a command: `ours` is what its file says for our rule, and nothing for torch's AdamW.

    `once` and `parts` make three steps of it, of a whole batch and of micro-batches.
    """
    from safetensors.torch import load_file

    whole, summed = (train(folder, f"accumulated-{i}", **ours, **how).weights for i, how in enumerate((once, parts)))
    full, adamw = train(folder, "full", **ours), train(folder, "adamw")
    return {
        "follows": full.followed(rank, matrices),
        "accumulated": far(summed, whole) / far(whole, load_file(folder / "model" / "model.safetensors")),
        "resumed": resumes(train, folder, full, "again", **ours),
        "adamw": resumes(train, folder, adamw, "adamw-again"),
    }
