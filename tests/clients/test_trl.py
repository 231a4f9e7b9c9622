"""TRL's trainers and PEFT's adapters with our rules: the quick half; `make test-clients` runs both halves."""

import pytest
import torch

pytest.importorskip("peft", reason="make test-clients has environments with it")
pytest.importorskip("trl", reason="make test-clients has environments with it")
from command_runs import far
from trainer_runs import RELEASED
from trl_runs import train_trl

from apollo_optim import RuleOptimizer, rule_of


@pytest.mark.parametrize(("what", "kind"), [("sft", "llama"), ("dpo", "gpt2")])
def test_adapters_follow_the_rule_and_the_base_stays(tmp_path, what, kind):
    run = train_trl(tmp_path, what, kind=kind, adapters=True, max_steps=2, save_strategy="no")
    fresh = train_trl(tmp_path, what, kind=kind, adapters=True, max_steps=1, learning_rate=0.0, save_strategy="no")
    assert isinstance(run.optimizer, RuleOptimizer)
    for group in run.optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert p.requires_grad == ("lora_" in name) == (p in run.optimizer.state)
            if p.requires_grad:
                assert rule_of(p, group) == "apollo"
                assert 2 in run.optimizer.state[p]["exp_avg"].shape, "a quarter of the adapters' rank of 8"
    moved = {name for name, w in run.weights.items() if not torch.equal(w, fresh.weights[name])}
    assert moved == {name for name in moved if "lora_" in name} != set()


@pytest.mark.parametrize(("what", "adapters"), [("sft", True), ("dpo", False)])
def test_release_and_resumed_runs_are_bitwise_those_without(tmp_path, what, adapters):
    own = {"adapters": adapters, "max_steps": 4, "save_steps": 2}
    full = train_trl(tmp_path / "full", what, **own)
    resumed = train_trl(tmp_path / "again", what, resume=tmp_path / "full/checkpoint-2", callbacks=RELEASED, **own)
    assert far(full.weights, resumed.weights) == far(full.state, resumed.state) == 0.0
    assert {int(state["step"]) for state in resumed.optimizer.state.values()} == {4}
