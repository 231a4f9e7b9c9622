"""transformers' Trainer with optimizers of ours: the quick half. `make test-clients` runs the long one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("accelerate", reason="Trainer needs accelerate, which the dev extra brings")
import trainer_processes
from command_runs import far, on_two
from trainer_runs import RELEASED, ROWS, TORCH_ADAMW, Run, arguments, make_model, train
from transformers import Trainer, TrainingArguments

from apollo_optim import InputError, RuleOptimizer
from apollo_optim.integrations.transformers import ReleaseCallback, apollo
from apollo_optim.rules import RULES


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Llama with APOLLO in 8 bits, to its end, and where its checkpoints are."""
    out = tmp_path_factory.mktemp("plain")
    return train(out, "apollo", **EIGHT_BITS), out


EIGHT_BITS: dict[str, Any] = {"knobs": {"rank": 16, "state_dtype": "8bit"}, "dtype": "bfloat16"}


def test_it_trains_by_the_rule_and_the_arguments_of_trainer(tmp_path):
    run = train(tmp_path, max_steps=2, adam_beta2=0.9, adam_epsilon=1e-3, lr_scheduler_type="constant", save_steps=9)
    assert isinstance(run.optimizer, RuleOptimizer)
    named = dict(run.trainer.model.named_parameters())
    of = {name: group for group in run.optimizer.param_groups for name in group["param_names"]}
    assert of.keys() == named.keys()
    assert of["model.layers.0.mlp.up_proj.weight"]["rule"] == "apollo-mini"
    assert run.optimizer.state[named["model.layers.0.mlp.up_proj.weight"]]["exp_avg"].shape == (128, 1)
    assert of["lm_head.weight"]["rule"] == of["model.norm.weight"]["rule"] == "adamw"
    for group in of.values():
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.9, 0.9), 1e-3)
    assert {name for name, group in of.items() if not group["weight_decay"]} == {n for n in named if "norm" in n}
    assert of["lm_head.weight"]["weight_decay"] == 0.1
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {2}


def test_an_epsilon_that_nobody_chose_is_the_rules_own():
    args = TrainingArguments(**arguments("unused"))
    assert "eps" not in apollo("apollo", args)[1]
    assert apollo("apollo", args, eps=1e-4, betas=(0.5, 0.9))[1] == {
        "lr": 1e-2, "weight_decay": 0.1, "betas": (0.5, 0.9), "eps": 1e-4
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_is_made_in_both_call_shapes(name):
    """transformers 5: `cls()(model, **kwargs)`, 4: `cls(groups, **kwargs)`, axolotl: `cls()(model, args, **kwargs)`."""
    args, model = TrainingArguments(**arguments("unused")), make_model()
    cls, kwargs = apollo(name, args, model)
    handed = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    made = cls()(model, **kwargs), cls(handed, **kwargs), cls()(model, args, **kwargs)
    assert {optimizer.param_groups[0]["rule"] for optimizer in made} == {name}
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] for optimizer in made]
    assert groups[0] == groups[1] == groups[2]


def test_nameless_parameters_are_looked_up_or_refused():
    args, model = TrainingArguments(**arguments("unused")), make_model()
    handed = [{"params": [*model.parameters(), torch.nn.Parameter(torch.ones(3))]}]
    cls, kwargs = apollo("apollo-mini", args)
    with pytest.raises(InputError, match=r"without names: call apollo\(name, args, model\)"):
        cls(handed, **kwargs)
    cls, kwargs = apollo("apollo-mini", args, model)
    with pytest.raises(InputError, match=r"trains 1 parameters .* adapters included"):
        cls(handed, **kwargs)


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("apolo", {}, "no optimizer is called 'apolo'. Did you mean 'apollo'"),
        ("apollo", {"rnk": 3}, "unknown key 'rnk'. Did you mean 'rank'"),
        ("apollo", {"nesterov": False}, "It is a key of muon"),
        ("apollo", {"lr": 1e-2}, "say learning_rate=... in its arguments"),
        ("apollo", {"weight_decay": 0.0}, "say weight_decay=... in its arguments"),
    ],
)
def test_wrong_words_are_refused_before_training(name, knobs, said):
    with pytest.raises(InputError) as error:
        apollo(name, TrainingArguments(**arguments("unused")), **knobs)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_release_accumulates_steps_and_logs_as_a_run_without(plain, tmp_path):
    """The last step of each epoch has two micro-batches instead of four."""
    run, _ = plain
    released = train(tmp_path, "apollo", callbacks=RELEASED, save_strategy="no", **EIGHT_BITS)
    assert far(run.weights, released.weights) == far(run.state, released.state) == 0.0
    assert {int(state["step"]) for state in released.optimizer.state.values()} == {16}
    assert len(run.log) == 16
    assert run.log == [{key: entry[key] for key in run.log[0]} for entry in released.log], "loss, rate, norm"
    assert all(entry["grad_norm"] > 0.1 for entry in released.log), "transformers 4 has none without clipping"


@pytest.mark.parametrize("callbacks", [(), RELEASED])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(plain, tmp_path, callbacks):
    """From within an epoch, and the state in codes."""
    run, out = plain
    resumed = train(tmp_path, "apollo", callbacks=callbacks, resume=out / "checkpoint-12", save_steps=99, **EIGHT_BITS)
    assert far(run.weights, resumed.weights) == far(run.state, resumed.state) == 0.0
    assert run.log == [{key: entry[key] for key in run.log[0]} for entry in resumed.log]
    assert torch.int8 in {t.dtype for t in resumed.state.values() if isinstance(t, torch.Tensor)}


@pytest.mark.slow
def test_release_under_fsdp2_of_two_processes():
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", Path(__file__).parent / "fsdp2.py"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], check=True, env=env, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ < "5", reason="4.57 resumes from a device cpu:0, and has no FSDP on CPUs")
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_save_and_resume_bitwise(kind, bits):
    """Also low-bit weights, which accelerate's FSDP2 shards."""
    row = on_two(trainer_processes.__file__, kind, "apollo-mini", str(bits))
    assert row.pop("follows") == "14 of 14"
    assert set(row.values()) == {0.0}, row


def test_only_logged_steps_pay_for_their_norm(tmp_path):
    seen = []

    class Watched(ReleaseCallback):
        def on_step_end(self, *args, **how):
            seen.append(self.handle.track_norm)
            super().on_step_end(*args, **how)

    how: dict[str, Any] = {"callbacks": (Watched,), "max_steps": 5, "logging_steps": 2, "logging_first_step": True}
    run = train(tmp_path, save_strategy="no", **how)
    assert seen == [True, True, False, True, False]
    assert [entry["step"] for entry in run.log] == [1, 2, 4]
    assert all(entry["grad_norm"] > 0.1 for entry in run.log)


def test_clipping_of_each_gradient(tmp_path):
    class Clipped(ReleaseCallback):
        def __init__(self):
            super().__init__(clip_tensor=1e-3)

    how: dict[str, Any] = {"max_steps": 2, "save_strategy": "no", "name": "adamw", "adam_epsilon": 1.0}
    loose, tight = (train(tmp_path, callbacks=(callback,), **how) for callback in (ReleaseCallback, Clipped))
    assert far(loose.weights, tight.weights) > 1e-4
    assert tight.log[0] == loose.log[0], "the norm before clipping"


def test_a_second_run_after_one_that_was_cut_short(tmp_path):
    class Fails(ReleaseCallback):
        def on_step_end(self, args, state, control, **how):
            super().on_step_end(args, state, control, **how)
            if state.global_step == 2 and not failed:
                failed.append(True)
                raise KeyboardInterrupt

    failed: list[bool] = []
    model = make_model()
    args = TrainingArguments(**arguments(tmp_path, max_steps=4, save_strategy="no"))
    made = apollo("apollo-mini", args, model)
    trainer = Trainer(model, args, train_dataset=ROWS, optimizer_cls_and_kwargs=made, callbacks=[Fails()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert {int(state["step"]) for state in trainer.optimizer.optimizer.state.values()} == {2 + 4}


@pytest.mark.parametrize(
    ("name", "own", "said"),
    [
        ("apollo-mini", {"max_grad_norm": 1.0}, r"max_grad_norm=1.0: .* ReleaseCallback\(clip_tensor=1.0\)"),
        ("apollo-mini", {"auto_find_batch_size": True}, "auto_find_batch_size: .* Name a batch size"),
        (TORCH_ADAMW, {}, "AdamW has no step for one parameter"),
    ],
)
def test_what_a_step_inside_backward_cannot_honour(tmp_path, name, own, said):
    with pytest.raises(InputError, match=said) as error:
        train(tmp_path, name, callbacks=RELEASED, max_steps=1, **own)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("own", "scaler", "said"),
    [
        ({"fp16": True}, None, "fp16: .* GradScaler .* bf16"),
        ({}, torch.amp.GradScaler("cpu"), "fp16"),
        ({"world_size": 2}, None, "DistributedDataParallel .* FSDP2"),
    ],
)
def test_what_needs_other_machines_is_refused(own, scaler, said):
    args = SimpleNamespace(max_grad_norm=0.0, fp16=False, auto_find_batch_size=False, world_size=1)
    vars(args).update(own)
    optimizer = SimpleNamespace(optimizer=None, scaler=scaler)
    with pytest.raises(InputError, match=said) as error:
        ReleaseCallback().on_train_begin(args, None, None, model=make_model(), optimizer=optimizer)
    assert "\n" not in str(error.value)
