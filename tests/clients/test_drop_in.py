"""transformers' own `optim="apollo_adamw"` on the package that `apollo-optim shim` puts in apollo-torch's place."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

pytest.importorskip("accelerate", reason="Trainer needs accelerate, which the dev extra brings")
from command_runs import far
from trainer_runs import train

from apollo_optim import rule_of
from apollo_optim.cli import shim
from apollo_optim.integrations.apollo_torch import APOLLOAdamW

APOLLO: dict[str, Any] = {"name": None, "optim": "apollo_adamw", "optim_target_modules": "all-linear"}
LINEAR = 2 * 7 + 1  # transformers takes the head in
RANK = {"optim_args": "rank=16,scale=16"}
MINI = {"optim_args": "rank=1,scale_type=tensor,scale=128"}


@pytest.fixture(autouse=True)
def found(drop_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a PYTHONPATH: transformers 4 looks once, when it is imported, and for these tests that was before."""
    monkeypatch.setattr("transformers.utils.import_utils._apollo_torch_available", True, raising=False)


def test_transformers_finds_it():
    code = (
        "from transformers.utils import is_apollo_torch_available\nassert is_apollo_torch_available()\n"
        "import apollo_torch\nprint(apollo_torch.__file__)"
    )
    path = os.pathsep.join([str(shim.FOLDER), str(Path(__file__).parents[2])])
    env = {**os.environ, "PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env).stdout
    assert found.startswith(str(shim.FOLDER))


@pytest.mark.parametrize(("optim_args", "width"), [(RANK, 16), (MINI, 1)], ids=["apollo", "mini"])
def test_it_trains_by_the_rule_and_resumes_bitwise(tmp_path, optim_args, width):
    full = train(tmp_path / "full", **APOLLO, **optim_args)
    assert type(full.optimizer) is APOLLOAdamW
    rest, ruled = full.optimizer.param_groups
    named = {p: name for name, p in full.trainer.model.named_parameters()}
    assert len(ruled["params"]) == LINEAR
    for p in ruled["params"]:
        assert rule_of(p, ruled) == "apollo", named[p]
        assert full.optimizer.state[p]["exp_avg"].shape == (max(p.shape), width)
    assert {rule_of(p, rest) for p in rest["params"]} == {"adamw"}
    assert {int(state["step"]) for state in full.optimizer.state.values()} == {16}
    resumed = train(tmp_path / "again", **APOLLO, **optim_args, resume=tmp_path / "full/checkpoint-12", save_steps=99)
    assert far(full.weights, resumed.weights) == far(full.state, resumed.state) == 0.0


@pytest.mark.skipif(transformers.__version__ < "5", reason="4.57's own dummy scheduler ends in torch 2.13's zip()")
def test_layerwise_has_an_optimizer_of_its_own_for_each_parameter(tmp_path):
    own = {**APOLLO, **RANK, "optim": "apollo_adamw_layerwise", "gradient_accumulation_steps": 1, "max_steps": 3}
    run = train(tmp_path, **own, save_strategy="no")
    optimizers = run.optimizer.optimizer_dict
    assert {type(optimizer) for optimizer in optimizers.values()} == {APOLLOAdamW}
    states = [optimizer.state[p] for p, optimizer in optimizers.items()]
    assert {int(state["step"]) for state in states} == {3}
    ruled = [optimizer for p, optimizer in optimizers.items() if rule_of(p, optimizer.param_groups[0]) == "apollo"]
    assert len(ruled) == LINEAR
    seeds = [optimizer.state[p]["seed"] for p, optimizer in optimizers.items()]
    assert len(set(seeds)) == len(seeds)
