"""What is skipped is said: updates whose gradient is not finite, and runs in which there is nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from train_tiny import records, tiny

from apollo_optim.train import build
from apollo_optim.train.failures import TrainingFailed
from apollo_optim.train.pretrain import pretrain
from apollo_optim.train.skips import total_norm

BAD = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def spoil(monkeypatch):
    """Make the gradient of parameters whose name holds a word NaN, in backward passes that `when` picks."""

    real = build.build_model

    def patch(word: str, when=lambda call: True) -> None:
        def spoilt(*args, **how):
            model = real(*args, **how)
            for name, p in model.named_parameters():
                if word in name:
                    calls = iter(range(10**6))
                    p.register_hook(lambda grad, calls=calls: grad * math.nan if when(next(calls)) else grad)
            return model

        monkeypatch.setattr(build, "build_model", spoilt)

    return patch


@pytest.mark.parametrize("how", [{"clip": 1.0}, {"clip_tensor": 1.0}, {"release": True}, {}])
def test_a_bad_gradient_leaves_the_others_alone(tmp_path, spoil, how, capsys):
    spoil("up_proj")
    result = pretrain(tiny(tmp_path, train=how, log={"display": "plain"}))
    steps = records(result.run, "step")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert [record["skipped"] for record in steps] == list(range(1, 9))
    assert result.skipped == records(result.run, "end")[0]["skipped"] == 8
    shown = capsys.readouterr().err
    assert shown.count(f"the gradient of {BAD} was not finite") == 1
    assert "| skipped 8" in shown
    assert "8 updates were skipped" in shown


def test_a_good_run_says_nothing_of_it(tmp_path, capsys):
    result = pretrain(tiny(tmp_path, train={"steps": 2}, log={"display": "plain"}))
    assert (result.skipped, result.left_out) == (0, 0)
    assert "skipped" not in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "stopped"), [(30, 12), (3, 3)])
@pytest.mark.parametrize("how", [{"clip": 1.0}, {"release": True}])
def test_a_run_that_changes_nothing_stops(tmp_path, spoil, steps, stopped, how):
    spoil("")
    cfg = tiny(tmp_path, train={"steps": steps, **how}, log={"every": 4})
    with pytest.raises(TrainingFailed, match=rf"last {stopped} steps, up to step {stopped}: .* no weight") as failure:
        pretrain(cfg)
    assert "\n" not in str(failure.value)
    assert records(cfg.out, "failed")


def test_a_few_bad_steps_stop_nothing_and_a_resumed_run_counts_on(tmp_path, spoil):
    spoil("", when=lambda call: call in (1, 2))
    constant = {"kind": "constant"}
    whole = pretrain(tiny(tmp_path, "whole", schedule=constant))
    counted = [record["skipped"] for record in records(whole.run, "step")]
    assert counted[0] == 0 < counted[1] < counted[2] == counted[-1] == whole.skipped
    pretrain(tiny(tmp_path, "parts", schedule=constant, train={"steps": 4}))
    spoil("", when=lambda call: False)
    parts = pretrain(tiny(tmp_path, "parts", schedule=constant), resume=True)
    assert [record["skipped"] for record in records(parts.run, "step")] == counted
    assert parts.skipped == whole.skipped


def test_the_norm_of_finite_gradients_is_torchs():
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for shape in ((3, 4), (7,), (2, 5), (1,))]
    assert torch.equal(total_norm(gradients), torch.nn.utils.get_total_norm(gradients))
    bad = [gradients[0], gradients[1] * math.inf, gradients[2], gradients[3] * math.nan]
    assert torch.equal(total_norm(bad), torch.nn.utils.get_total_norm([gradients[0], gradients[2]]))
    assert total_norm(bad[1::2]) == 0
