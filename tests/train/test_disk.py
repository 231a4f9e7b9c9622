"""A run directory can be had anywhere: on any file system, copied, moved, corrected; and nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest
import safetensors.torch
from train_tiny import figures, records, tiny

from apollo_optim.cli.main import main
from apollo_optim.core import disk
from apollo_optim.core.errors import InputError
from apollo_optim.train.checkpoint import checkpoints, load_state, newest
from apollo_optim.train.config import load_config
from apollo_optim.train.failures import TrainingFailed
from apollo_optim.train.pretrain import pretrain
from benchmarks import kill


def fails(code: int):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


def only_folders(real, code: int):
    """The call, which fails for folders."""

    def call(what, *rest, **how):
        folder = stat.S_ISDIR(os.fstat(what).st_mode) if isinstance(what, int) else os.path.isdir(what)
        return (
            fails(code)() if folder and not (isinstance(what, Path) and what.is_symlink()) else real(what, *rest, **how)
        )

    return call


def lacking(monkeypatch, what: str) -> None:
    """From here on the file system lacks this."""
    kind, _, code = what.partition(" ")
    number = getattr(errno, code)
    if kind == "symlink":
        monkeypatch.setattr(os, "symlink", fails(number))
    elif kind == "flock":
        monkeypatch.setattr(fcntl, "flock", fails(number))
    elif kind == "fsync":
        monkeypatch.setattr(os, "fsync", only_folders(os.fsync, number))
    elif kind == "fsync-all":
        monkeypatch.setattr(os, "fsync", fails(number))
    elif kind == "rename":
        monkeypatch.setattr(os, "rename", only_folders(os.rename, number))
    elif kind == "rename-all":
        monkeypatch.setattr(os, "rename", fails(number))
        monkeypatch.setattr(os, "replace", fails(number))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain(tiny(folder, checkpoint={"every": 2}))
    return folder / "run"


@pytest.fixture(autouse=True)
def say_again(monkeypatch):
    monkeypatch.setattr(disk, "_said", set())


LACKING = [
    "symlink EOPNOTSUPP",
    "symlink EPERM",
    "flock EOPNOTSUPP",
    "flock ENOLCK",
    "flock EACCES",
    "flock ENOSYS",
    "fsync EINVAL",
    "fsync EACCES",
    "fsync-all ENOSYS",
    "rename EXDEV",
    "rename-all EXDEV",
]


@pytest.mark.parametrize("what", LACKING)
def test_what_a_file_system_lacks_is_done_without_and_said(what, whole, tmp_path, monkeypatch, caplog):
    lacking(monkeypatch, what)
    pretrain(tiny(tmp_path, checkpoint={"every": 2}, train={"steps": 4}, schedule={"kind": "constant"}))
    pretrain(tiny(tmp_path, checkpoint={"every": 2}, train={"steps": 8}, schedule={"kind": "constant"}), resume=True)
    monkeypatch.undo()
    run = tmp_path / "run"
    assert list(checkpoints(run)) == [6, 8]
    assert load_state(newest(run))["step"] == 8
    assert (run / "model" / "model.safetensors").exists()
    assert not [path for path in run.rglob("*") if path.name.startswith((".tmp", ".unfinished"))]
    said = [record.getMessage() for record in caplog.records if record.name == "apollo_optim.core.disk"]
    assert said
    assert len(said) == len(set(said))


@pytest.mark.parametrize("what", ["rename-all EXDEV", "symlink EPERM"])
def test_such_a_run_is_the_same_run(what, whole, tmp_path, monkeypatch):
    lacking(monkeypatch, what)
    pretrain(tiny(tmp_path, checkpoint={"every": 2}))
    assert figures(tmp_path / "run") == figures(whole)
    assert kill.final_files(tmp_path / "run") == kill.final_files(whole)


def test_a_file_system_that_lacks_nothing_is_not_spoken_of(whole, tmp_path, caplog):
    pretrain(tiny(tmp_path, train={"steps": 1}))
    assert not [record for record in caplog.records if record.name == "apollo_optim.core.disk"]


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EIO", "EDQUOT"])
@pytest.mark.parametrize("call", ["save_file", "fsync", "rename", "mkdir"])
def test_a_disk_that_fails_costs_nothing_that_was_saved(code, call, whole, tmp_path, monkeypatch):
    cfg = tiny(tmp_path, checkpoint={"every": 2})
    where = safetensors.torch if call == "save_file" else os
    real, wrong = getattr(where, call), fails(getattr(errno, code))

    def failing(*args, **how):
        there = max(checkpoints(tmp_path / "run"), default=0)
        return wrong() if there == 4 else real(*args, **how)

    with monkeypatch.context() as patched:
        patched.setattr(where, call, failing)
        with pytest.raises(TrainingFailed, match=r"last good checkpoint is .*step-00000004") as failure:
            pretrain(cfg)
    assert "\n" not in str(failure.value)
    assert not [path for path in (tmp_path / "run" / "checkpoints").glob("step-*") if path.name > "step-00000004"]
    pretrain(cfg, resume=True)
    assert figures(tmp_path / "run") == figures(whole)
    assert kill.final_files(tmp_path / "run") == kill.final_files(whole)


def test_a_directory_that_cannot_be_written_is_refused_in_one_line(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    cfg = tiny(tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*") if path.name != ".lock")
    real = os.open

    def read_only(path, flags, *mode):
        return (fails(errno.EROFS) if flags & os.O_CREAT else real)(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(InputError, match=r"cannot write to the run directory .*Read-only"):
        pretrain(cfg, resume=True)
    after = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*") if path.name != ".lock")
    assert after == before


def test_a_folder_that_is_still_being_filled_is_no_checkpoint(whole, tmp_path):
    """A kill in the middle of what stands for a rename."""
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    half = run / "checkpoints" / "step-00000099"
    shutil.copytree(newest(run), half)
    (half / disk.UNFINISHED).touch()
    assert list(checkpoints(run)) == [6, 8]
    pretrain(tiny(tmp_path, data={"source": load_config(whole / "config.yaml").data.source}), resume=True)
    assert not half.exists()


def test_a_copy_that_followed_the_link_goes_on(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run", symlinks=False)
    assert (tmp_path / "run" / "checkpoints" / "latest" / "manifest.json").exists()
    cfg = load_config(whole / "config.yaml")
    cfg.out = str(tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run")[8])
    pretrain(cfg, resume=True)
    assert (tmp_path / "run" / "checkpoints" / "latest").is_symlink()
    assert figures(tmp_path / "run") == figures(whole)


# --- corrected in place ---


def test_a_start_that_saved_nothing_can_be_corrected_in_place(tmp_path, monkeypatch):
    wrong, right = tiny(tmp_path, model={"vocab_size": 260}), tiny(tmp_path)
    for resume in (False, True):
        with pytest.raises(InputError, match="occurs"):
            pretrain(wrong)
        pretrain(right, resume=resume)
        assert len(records(right.out, "start")) == 1 + resume
        assert load_config(Path(right.out, "config.yaml")).model.vocab_size is None
        assert Path(right.out, "metrics-before.jsonl").exists() is not resume  # nothing is thrown away
        shutil.rmtree(right.out)


def test_without_locks_a_start_that_saved_nothing_may_still_be_going_on(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="occurs"):
        pretrain(tiny(tmp_path, model={"vocab_size": 260}))
    lacking(monkeypatch, "flock ENOLCK")
    with pytest.raises(InputError, match="can't be known whether it is still going on"):
        pretrain(tiny(tmp_path))
    pretrain(tiny(tmp_path), resume=True)


def test_a_lock_that_another_process_holds_is_another_matter(tmp_path):
    with (
        disk.locked(tmp_path / "run"),
        pytest.raises(InputError, match="another process"),
        disk.locked(tmp_path / "run"),
    ):
        pass


# --- what a resumed run needs ---


def constant(folder: Path, name: str, steps: int, **sections):
    train = sections.pop("train", {})
    return tiny(folder, name, train={"steps": steps, **train}, schedule={"kind": "constant", "warmup": 0}, **sections)


def test_a_run_has_its_own_tokenizer_and_model(tmp_path):
    pretrain(constant(tmp_path, "first", 4))
    for name in ("tokenizer", "model"):
        shutil.copytree(tmp_path / "first" / name, tmp_path / name)
    sections = {
        "data": {"tokenizer": str(tmp_path / "tokenizer")},
        "model": {"name": str(tmp_path / "model"), "pretrained": True, "config": {}},
    }
    pretrain(constant(tmp_path, "whole", 8, **sections))
    pretrain(constant(tmp_path, "parts", 4, **sections))
    for name in ("tokenizer", "model"):
        shutil.rmtree(tmp_path / name)
    pretrain(constant(tmp_path, "parts", 8, **sections), resume=True)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert kill.final_files(tmp_path / "parts") == kill.final_files(tmp_path / "whole")
    exported = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "model").iterdir()} for name in ("whole", "parts")
    ]
    assert exported[0] == exported[1]


def test_a_tokenizer_that_was_changed_in_the_run_directory_is_not_used(tmp_path):
    pretrain(constant(tmp_path, "run", 4))
    path = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"Ġ', '"Q', 1))
    pretrain(constant(tmp_path, "run", 8), resume=True)  # the original is still in the cache
    pretrain(constant(tmp_path, "whole", 8))
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_text_may_lie_elsewhere_under_another_name(tmp_path):
    cfg = constant(tmp_path, "run", 4)
    pretrain(cfg)
    moved = shutil.move(tmp_path / "text.jsonl", tmp_path / "moved.jsonl")
    pretrain(constant(tmp_path, "run", 8, data={"source": str(moved)}), resume=True)
    moved.write_text(moved.read_text() + '{"text": "another line"}\n')
    with pytest.raises(InputError, match="the text is not the one"):
        pretrain(constant(tmp_path, "run", 12, data={"source": str(moved)}), resume=True)


def test_what_only_rounds_may_change_and_is_said_and_logged(tmp_path, capsys):
    pretrain(constant(tmp_path, "run", 4))
    again = constant(tmp_path, "run", 8, train={"micro_batch": 2}, log={"display": "plain"})
    pretrain(again, resume=True)
    changed = ["train.micro_batch (was None, is 2)"]
    assert [record.get("changed") for record in records(tmp_path / "run", "start")] == [None, changed]
    assert f"not bit-for-bit equal to the run so far, for it rounds otherwise: {changed[0]}" in capsys.readouterr().err
    pretrain(constant(tmp_path, "run", 12, train={"micro_batch": 2}), resume=True)
    assert "changed" not in records(tmp_path / "run", "start")[-1]


def test_home_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cfg = tiny(tmp_path, train={"steps": 1})
    cfg.out = "~/runs/first"
    run = pretrain(cfg).run
    assert run == tmp_path / "home" / "runs" / "first"
    second = tiny(
        tmp_path,
        model={"name": "~/runs/first/model", "pretrained": True, "config": {}},
        data={"tokenizer": "~/runs/first/tokenizer"},
        train={"steps": 1},
    )
    second.out = "~/runs/second"
    pretrain(second)
    assert main(["export", "~/runs/second", "--out=~/exported"]) == 0
    assert main(["sample", "~/exported", "--max-tokens", "1"]) == 0
    assert main(["report", "~/runs/second", "--out=~/report"]) == 0
    assert main(["pretrain", "--out=~/runs/second", "--resume"]) == 0
    assert main(["plan", "~/exported", "--optimizer", "adamw"]) == 0
    assert not (tmp_path / "~").exists()
