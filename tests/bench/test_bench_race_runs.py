"""The race: one run of it, for real, on a model and a text that are tiny."""

import dataclasses
import json
import math
import time
from collections.abc import Iterator

import pytest
from test_bench_race import stand_in
from train_tiny import MODEL, corpus

from apollo_optim.core.errors import InputError
from apollo_optim.train.failures import Interrupted
from benchmarks.race import trial as runs
from benchmarks.race.agenda import Row
from benchmarks.race.methods import HALF_LIFE, Method
from benchmarks.race.protocol import SETTINGS, Setting, Trial

STEPS = 8


@pytest.fixture(scope="module")
def tiny_trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Trial, dict[str, Method]]]:
    """A setting whose model and text are tiny, and a search run of it."""
    folder = tmp_path_factory.mktemp("text")
    setting = Setting("4k", model="llama-1m", source=str(corpus(folder)), batch=2, steps=5 * STEPS, budget=4)
    keys = {
        "optim.name": "apollo",
        "optim.rank": 8,
        "model.config": MODEL,
        "data.vocab_size": 300,
        "data.seq_len": 32,
        "data.cache_dir": str(folder),
        "data.validation_percent": 5,
        "eval.tokens": 512,
    }
    methods = {"adamw": Method(keys, {"lr": 1e-2, "embedding_lr": 1e-2, "head_lr": 1e-2})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "4k", setting)
        yield Trial("4k", "adamw", 1e-2, 1e-2, 1e-2, 1e-2, HALF_LIFE.centre, 0, STEPS, True), methods


@pytest.fixture(scope="module")
def whole(tiny_trial, tmp_path_factory: pytest.TempPathFactory) -> Row:
    """The line of the run that nobody stops."""
    trial, methods = tiny_trial
    return runs.run(trial, tmp_path_factory.mktemp("whole"), rows={}, methods=methods)


def test_a_line_says_what_its_figure_depends_on(whole):
    row = whole
    assert json.loads(json.dumps(row)) == row
    assert row["ended"] == "finished"
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert set(row["state"]) == {"matrices", "embedding", "head", "norms"}
    assert sum(row["state"].values()) == row["state_total"], "all state is in some group"
    assert min(row["state"].values()) > 0
    assert row["tokens"] == STEPS * 2 * 32
    assert min(row["step_wall"], row["step_cpu"], row["step_optimizer"], row["wall"]) > 0
    assert row["step_optimizer"] < row["step_wall"]
    assert len(row["corpus"]) == 64
    assert row["hardware"]["capability"]
    assert row["hardware"]["threads"] == 1
    assert row["versions"]["torch"]
    assert math.isfinite(row["half_loss"])


def test_a_run_killed_in_the_middle_goes_on_and_ends_the_same(tiny_trial, whole, tmp_path):
    trial, methods = tiny_trial
    pieces, stops = tmp_path / "pieces", 0
    while True:
        try:  # a deadline that is over already: one step, then it is saved and left
            row = runs.run(trial, pieces, rows={}, deadline=time.monotonic(), methods=methods)
            break
        except Interrupted:
            stops += 1
    assert stops == STEPS - 1
    for key in ("loss", "perplexity", "half_loss", "tokens", "state", "state_total"):
        assert row[key] == whole[key], key
    assert row["resumed"]
    assert not whole["resumed"]


def test_what_a_kill_left_before_the_first_checkpoint_is_started_again(tiny_trial, tmp_path):
    trial, methods = tiny_trial
    left = tmp_path / "work" / trial.name
    left.mkdir(parents=True)
    (left / "metrics.jsonl").write_text('{"event": "start"')
    assert runs.run(trial, tmp_path / "work", rows={}, methods=methods)["ended"] == "finished"


def test_a_hopeless_search_run_is_stopped_half_way(tiny_trial, whole, tmp_path):
    trial, methods = tiny_trial
    good = whole
    other = dataclasses.replace(trial, lr=0.02)
    near = runs.run(other, tmp_path / "work", rows={trial: good}, methods=methods)
    assert near["ended"] == "finished"
    bad = runs.run(
        dataclasses.replace(trial, lr=0.04),
        tmp_path / "work",
        rows={trial: good | {"half_loss": good["half_loss"] - 5}},
        methods=methods,
    )
    assert bad["ended"].startswith("stopped: training loss")
    assert bad["loss"] is None
    assert bad["tokens"] < good["tokens"]


def test_a_run_that_diverges_is_a_line_too(tiny_trial, tmp_path):
    trial, methods = tiny_trial
    row = runs.run(dataclasses.replace(trial, lr=1e30), tmp_path / "work", rows={}, methods=methods)
    assert row["ended"].startswith("failed: ")
    assert str(tmp_path) not in row["ended"]
    assert row["loss"] is None


def test_another_text_is_refused_at_the_first_step(tiny_trial, tmp_path):
    trial, methods = tiny_trial
    other = dataclasses.replace(trial, seed=1)
    with pytest.raises(InputError, match="the text that was read here"):
        runs.run(trial, tmp_path / "work", rows={other: {**stand_in(other), "half_loss": 1.0}}, methods=methods)
