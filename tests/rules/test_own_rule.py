"""A rule from outside of the package, of a few lines, is a first-class citizen."""

import io
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import pytest
import torch
from torch import nn

from apollo_optim import InputError, build_optimizer, list_optimizers, register
from apollo_optim.plan import plan, trace_step
from apollo_optim.rules import RULES
from apollo_optim.rules.base import Rule, Slot, Update, knob
from apollo_optim.rules.knobs import BETA
from apollo_optim.train.config import check, from_dict, to_dict
from apollo_optim.train.config.parser import knob_help
from apollo_optim.train.loss import summed_loss
from apollo_optim.train.models import ModelConfig, skeleton
from apollo_optim.train.optimizer import make_optimizer


@dataclass(frozen=True)
class SignOfMean(Rule):
    name: ClassVar[str] = "sign-of-mean"
    title: ClassVar[str] = "sign of the mean"
    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "The sign of the gradient's average."
    momentum: float = knob(BETA, "Decay of the average.", 0.9)

    def slots(self, shape):
        return {"exp_avg": Slot(shape, "mean")}

    def update(self, grad, state, s):
        mean = state["exp_avg"] + (grad.float() - state["exp_avg"]) * (1 - self.momentum)
        return Update(mean.sign(), 1.0, {"exp_avg": mean})


@pytest.fixture(autouse=True)
def registered():
    with mock.patch.dict(RULES):
        register(SignOfMean)
        yield


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def build(**knobs) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.Linear(64, 96), "lm_head": nn.Linear(96, 64, bias=False)})
    return model, build_optimizer("sign-of-mean", model, lr=1e-2, targets="mlp", **knobs)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit", "4bit"])
def test_it_trains_saves_and_resumes(state_dtype):
    model, optimizer = build(state_dtype=state_dtype)
    start = model["mlp"].weight.detach().clone()
    trained(model, optimizer, range(3))
    assert (model["mlp"].weight - start).abs().max() <= 3e-2 + 1e-6
    assert (model["mlp"].weight != start).float().mean() > 0.9
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    trained(model, optimizer, range(3, 6))
    again, resumed = build(state_dtype=state_dtype)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    trained(again, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_it_is_planned_and_listed():
    assert "sign-of-mean" in [recipe.name for recipe in list_optimizers()]
    model = skeleton(ModelConfig("llama-1m"))
    trace = trace_step(model, summed_loss, 2, 16)
    ours, adamw = (plan(model, name, trace).most["state, matrices"] for name in ("sign-of-mean", "adamw"))
    assert ours == pytest.approx(adamw / 2, rel=1e-3)


def test_a_run_file_says_its_knobs():
    cfg = from_dict({"optim": {"name": "sign-of-mean", "momentum": 0.5, "targets": ["mlp"]}})
    check(cfg)
    assert cfg.optim.knobs == {"momentum": 0.5}
    assert from_dict(to_dict(cfg)) == cfg
    model = nn.ModuleDict({"mlp": nn.Linear(64, 96), "lm_head": nn.Linear(96, 64, bias=False)})
    assert make_optimizer(cfg.optim, model).param_groups[0]["momentum"] == 0.5
    assert "sign-of-mean: Decay of the average. (a number in [0, 1); default: 0.9)" in knob_help()["momentum"]
    with pytest.raises(InputError, match="momentum=2, but it must be a number in"):
        check(from_dict({"optim": {"name": "sign-of-mean+adamw", "momentum": 2}}))


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(InputError, match="a rule called 'adamw' is there already"):
        register(dataclass(frozen=True)(type("Other", (SignOfMean,), {"name": "adamw", "__annotations__": {}})))
