"""A run that was stopped (by plan, a signal, kill -9) and goes on is, to the bit, the run that was never stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from train_tiny import figures, records, tiny

from apollo_optim.core.errors import InputError
from apollo_optim.data import Batches
from apollo_optim.data.ahead import Ahead
from apollo_optim.train.checkpoint import checkpoints, load_state, newest
from apollo_optim.train.config import load_config, save_config
from apollo_optim.train.failures import Interrupted
from apollo_optim.train.pretrain import pretrain
from apollo_optim.train.signals import stop_signals
from apollo_optim.train.step import TrainStep
from benchmarks import kill


def stop_after(monkeypatch, step: int, how=lambda: os.kill(os.getpid(), signal.SIGINT)) -> None:
    """As if somebody pressed Ctrl-C in the middle of this step."""
    real = TrainStep.learn

    def learn(self, batch, number, norm):
        if number == step:
            how()
        return real(self, batch, number, norm)

    monkeypatch.setattr(TrainStep, "learn", learn)


CLIPPED, RELEASED = {"micro_batch": 3, "clip": 1.0}, {"release": True, "clip_tensor": 0.5}


@pytest.mark.parametrize(
    ("dtype", "optim", "how"),
    [
        ("float32", {"name": "apollo"}, CLIPPED),
        ("bfloat16", {"name": "apollo", "proj": "svd"}, CLIPPED),
        ("bfloat16", {"name": "apollo-mini", "rank": None}, CLIPPED),
        ("float32", {"name": "adamw", "rank": None, "update_proj_gap": None}, CLIPPED),
        ("bfloat16", {"name": "apollo"}, RELEASED),
        ("bfloat16", {"name": "apollo-mini", "rank": None}, RELEASED | {"micro_batch": 3}),
    ],
)
def test_a_resumed_run_is_the_same_run(tmp_path, monkeypatch, dtype, optim, how):
    def cfg(name):
        return tiny(tmp_path, name, model={"dtype": dtype}, optim=optim, train=how)

    pretrain(cfg("whole"))
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted, match="after step 3"):
        pretrain(cfg("parts"))
    assert list(checkpoints(tmp_path / "parts")) == [3]
    torch.manual_seed(99)  # whatever happened in between
    torch.rand(7)
    stop_after(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM"):
        pretrain(cfg("parts"), resume=True)
    torch.manual_seed(98)
    result = pretrain(cfg("parts"), resume=True)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert kill.final_files(tmp_path / "parts") == kill.final_files(tmp_path / "whole")
    assert [record["resumed_from"] for record in records(tmp_path / "parts", "start")] == [None, 3, 6]
    seconds = [record["seconds"] for record in records(tmp_path / "parts", "step")]
    assert seconds == sorted(seconds)  # they add up over the parts
    assert result.seconds == seconds[-1]


def test_text_made_ahead_changes_no_run_and_is_not_in_its_position(tmp_path, monkeypatch):
    monkeypatch.setattr("apollo_optim.data.corpus.BLOCK", 1200)  # a block of some steps
    with monkeypatch.context() as without:
        without.setattr(Batches, "ahead", lambda self, rows: contextlib.nullcontext())
        pretrain(tiny(tmp_path, "without"))
    made = []
    start = Ahead.__init__
    monkeypatch.setattr(Ahead, "__init__", lambda self, work: (made.append(self), start(self, work))[1])
    cfg = tiny(tmp_path, "with")
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        pretrain(cfg)
    assert not any(thread.name == "text ahead" for thread in threading.enumerate())
    pretrain(cfg, resume=True)
    assert len(made) > 1
    assert figures(tmp_path / "with") == figures(tmp_path / "without")
    assert all(record["data_wait"] >= 0 for record in records(tmp_path / "with", "step"))


def test_dropout_and_the_seed_would_show_a_lost_random_state(tmp_path, monkeypatch):
    """The test above could fail: without the random state another run comes out."""
    pretrain(tiny(tmp_path, "whole"))
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        pretrain(tiny(tmp_path, "parts"))
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    pretrain(tiny(tmp_path, "parts"), resume=True)
    assert figures(tmp_path / "parts") != figures(tmp_path / "whole")


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path, monkeypatch):
    pretrain(tiny(tmp_path, "whole"))

    def crash():
        raise RuntimeError("power cut")

    stop_after(monkeypatch, 7, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(tiny(tmp_path, "parts"))
    assert records(tmp_path / "parts", "step")[-1]["step"] == 6
    monkeypatch.undo()
    pretrain(tiny(tmp_path, "parts"), resume=True)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def test_a_run_without_a_checkpoint_yet_starts_anew(tmp_path, monkeypatch):
    def crash():
        raise RuntimeError

    stop_after(monkeypatch, 2, crash)
    with pytest.raises(RuntimeError):
        pretrain(tiny(tmp_path))
    monkeypatch.undo()
    pretrain(tiny(tmp_path), resume=True)
    pretrain(tiny(tmp_path, "whole"))
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_a_finished_run_may_be_finished_again(tmp_path, capsys):
    first = pretrain(tiny(tmp_path))
    before = figures(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    again = pretrain(tiny(tmp_path, log={"display": "plain"}), resume=True)
    assert (again.loss, again.step, again.seconds) == (first.loss, first.step, first.seconds)
    assert again.memory == first.memory  # not that of a process which has trained nothing
    assert "the run has ended at step 8: nothing is left to train" in capsys.readouterr().err
    assert figures(tmp_path / "run") == before
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_what_may_change_and_what_may_not(tmp_path, monkeypatch):
    cfg = tiny(tmp_path, schedule={"kind": "constant", "warmup": 2})
    stop_after(monkeypatch, 4)
    with pytest.raises(Interrupted):
        pretrain(cfg)
    monkeypatch.undo()

    def changed(**sections):
        new = load_config(tmp_path / "run" / "config.yaml")
        for section, changes in sections.items():
            setattr(new, section, dataclasses.replace(getattr(new, section), **changes))
        return new

    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"optim.lr \(was 0.01, is 0.02\), train.batch_size \(was 4, is 8\)"):
        pretrain(changed(optim={"lr": 0.02}, train={"batch_size": 8}), resume=True)
    with pytest.raises(InputError, match=r"4 steps already, more than train.steps=3"):
        pretrain(changed(train={"steps": 3}), resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    longer = changed(
        train={"steps": 10, "release": True}, eval={"every": 5}, checkpoint={"every": None}, log={"every": 2}
    )
    assert pretrain(longer, resume=True).step == 10
    assert load_config(tmp_path / "run" / "config.yaml") == longer

    cosine = tiny(tmp_path, "cosine")
    pretrain(cosine)
    cosine.train = dataclasses.replace(cosine.train, steps=12)
    with pytest.raises(InputError, match=r"train.steps cannot go from 8 to 12: with schedule cosine"):
        pretrain(cosine, resume=True)


def test_other_text_is_refused(tmp_path):
    cfg = tiny(tmp_path, train={"steps": 4})
    pretrain(cfg)
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"text": "one line more"}\n')
    with pytest.raises(InputError, match=r"the text is not the one that .* was trained on: .*sha256"):
        pretrain(cfg, resume=True)


def test_a_text_that_ends_is_reported_and_what_was_trained_is_saved(tmp_path, monkeypatch):
    real = Batches.next

    def ends(self, count):
        if self.tokens == 5 * 4 * 32:
            self.documents.read = list
            self._used = len(self._block.rows)
        return real(self, count)

    monkeypatch.setattr(Batches, "next", ends)
    with pytest.raises(InputError, match="the text ended"):
        pretrain(tiny(tmp_path))
    assert list(checkpoints(tmp_path / "run")) == [4, 5]
    assert load_state(newest(tmp_path / "run"))["step"] == 5


def test_signals_are_given_back_and_a_thread_may_train(tmp_path):
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    results = []
    thread = threading.Thread(target=lambda: results.append(pretrain(tiny(tmp_path, train={"steps": 2}))))
    thread.start()
    thread.join()
    assert results[0].step == 2
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):  # the second one does not ask
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    signal.signal(signal.SIGINT, found)


def test_sigterm_ends_a_process_that_has_saved(tmp_path):
    cfg = tiny(tmp_path, train={"steps": 100_000}, checkpoint={"every": None}, eval={"every": None})
    save_config(cfg, tmp_path / "run.yaml")
    child = subprocess.Popen(
        [sys.executable, "-c", kill.CHILD, str(tmp_path / "run.yaml")], stderr=subprocess.PIPE, text=True
    )
    kill.wait_for_first_step(child, tmp_path / "run")
    child.terminate()
    _, error = child.communicate()
    assert child.returncode != 0
    assert "go on with: apollo-optim pretrain --out" in error
    (step,) = checkpoints(tmp_path / "run")
    assert records(tmp_path / "run", "step")[-1]["step"] == step


@pytest.mark.parametrize(("runs", "during_save"), [(1, 1), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_kill_9_at_random_and_during_a_save(tmp_path, capsys, monkeypatch, runs, during_save):
    """The protocol of `apollo-optim bench kill`, with a kill or two."""
    cfg = tiny(tmp_path, model={"dtype": "bfloat16"}, train={"steps": 24}, checkpoint={"every": 3})
    monkeypatch.setattr(kill, "fingerprint", str)
    assert kill.compare(runs, during_save, configs={"bfloat16": cfg}) == 0
    assert f"{runs} of {runs}" in capsys.readouterr().out
    assert Path(cfg.out).exists() is False
