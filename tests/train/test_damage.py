"""A damaged checkpoint is named, set aside, and the run goes on from the one before it."""

from __future__ import annotations

import dataclasses
import random
import shutil

import pytest
from train_tiny import records, tiny

from apollo_optim.core.errors import Damaged, InputError
from apollo_optim.train.checkpoint import checkpoints
from apollo_optim.train.pretrain import pretrain
from benchmarks.corruptions import GONE, HARMS, damage, interrupted
from benchmarks.kill import figures, final_files


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three checkpoints, after 4, 8 and 12 steps."""
    cfg = tiny(tmp_path_factory.mktemp("damage"), "whole", train={"steps": 12}, checkpoint={"keep": 3})
    return cfg, pretrain(cfg).run


@pytest.fixture
def broken(whole, tmp_path):
    """Its config, what it ends with, and a copy of it as it was after step 8, whose checkpoint is returned."""
    cfg, run = whole
    return dataclasses.replace(cfg, out=str(tmp_path / "run")), run, interrupted(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("weights-00001-of-00001.safetensors", "a bit flipped"),
        ("state.json", "cut off"),
        ("run.json", "a piece zeroed"),
        ("manifest.json", "emptied"),
        ("manifest.json", GONE),
        ("state-00001-of-00001.safetensors", GONE),
    ],
)
def test_a_run_goes_on_from_the_checkpoint_before(broken, capsys, name, harm):
    cfg, whole, newest = broken
    cfg.log.display = "plain"
    assert {harm} <= {*HARMS, GONE}
    damage(newest / name, harm, random.Random(0))
    pretrain(cfg, resume=True)
    start = records(cfg.out, "start")[-1]
    assert start["resumed_from"] == 4
    assert len(start["damaged"]) == 1
    assert name in start["damaged"][0]
    assert start["damaged"][0] in capsys.readouterr().err
    assert figures(newest.parents[1]) == figures(whole)
    assert final_files(newest.parents[1]) == final_files(whole)
    assert newest.with_name("damaged-step-00000008").exists()
    assert list(checkpoints(newest.parents[1])) == [4, 8, 12]


def test_a_run_of_which_every_checkpoint_is_damaged_is_refused(broken):
    cfg, _, newest = broken
    for folder in checkpoints(newest.parents[1]).values():
        damage(folder / "state.json", "emptied", random.Random(0))
    with pytest.raises(Damaged, match=r"step-00000004.state\.json is damaged"):
        pretrain(cfg, resume=True)
    assert list(checkpoints(newest.parents[1])) == [4, 8]  # nothing was moved


def test_a_stranger_among_its_files_is_no_damage(broken):
    cfg, _, newest = broken
    shutil.copy(newest / "state.json", newest / "state (1).json")
    with pytest.raises(InputError, match="is not listed in manifest"):
        pretrain(cfg, resume=True)


def test_what_was_set_aside_before_stays(broken):
    cfg, _, newest = broken
    earlier = newest.with_name("damaged-step-00000008")
    earlier.mkdir()
    damage(newest / "state.json", "emptied", random.Random(0))
    pretrain(cfg, resume=True)
    assert not any(earlier.iterdir())
    assert (newest.with_name("damaged-step-00000008-1") / "state.json").exists()
