"""Models from elsewhere: damaged, odd or enormous ones are refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
from train_tiny import tiny

from apollo_optim.cli.main import main
from apollo_optim.core.errors import InputError
from apollo_optim.train.config import ModelConfig
from apollo_optim.train.models import build_model
from apollo_optim.train.pretrain import pretrain


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    pretrain(tiny(folder, train={"steps": 1}))
    return folder / "run" / "model"


@pytest.fixture
def model(done, tmp_path) -> Path:
    """Somebody's model: no manifest of ours."""
    shutil.copytree(done, tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json"))
    return tmp_path / "model"


class Payload:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return exec, (f"open({str(self.proof)!r}, 'w')",)


def pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(model.parent / "proof")))


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def lying(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])


def nan(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = model / "model.safetensors"
    save_file({name: t * float("nan") for name, t in load_file(path).items()}, path, {"format": "pt"})


def nested(model: Path) -> None:
    (model / "config.json").write_text("[" * 100_000)


def no_object(model: Path) -> None:
    (model / "config.json").write_text("[1]")


def config(**fields):
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    change.__name__ = str(fields)
    return change


@pytest.mark.parametrize(
    "harm",
    [
        pickled, cut, lying, nan, nested, no_object, config(vocab_size=-1), config(num_attention_heads=0),
        config(hidden_size="x"), config(dtype="flnat32"), config(vocab_size=400), config(num_hidden_layers=10**9),
        config(vocab_size=10**15),
    ],
)  # fmt: skip
def test_a_damaged_or_odd_model_is_one_line(harm, model, capsys):
    harm(model)
    assert main(["sample", str(model), "--max-tokens", "2"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert not (model.parent / "proof").exists()
    if harm in (pickled, cut, lying):
        with pytest.raises(InputError, match="cannot build the model") as refusal:
            build_model(ModelConfig(str(model), pretrained=True))
        assert "\n" not in str(refusal.value)


def test_a_model_that_would_take_for_ever_is_refused(model, capsys):
    for words in (["--model.config.num_hidden_layers", "1000000000"], ["--model.config.hidden_size", "10000000000000"]):
        assert main(["plan", "llama-1m", "--optimizer", "adamw", *words]) == 2
        assert main(["plan", str(model), "--optimizer", "adamw", *words]) == 2
        assert "model.name=" in capsys.readouterr().err
    with pytest.raises(InputError, match="1,000,000,000 layers: at most 10,000"):
        build_model(ModelConfig("llama-1m", config={"num_hidden_layers": 10**9}))
