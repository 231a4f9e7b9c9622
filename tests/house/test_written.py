"""One writer: whole or not at all, under no link, as the umask says, and nothing of the user's."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import stat
from pathlib import Path

import pytest
from train_tiny import tiny

from apollo_optim.core import disk
from apollo_optim.core.errors import InputError
from apollo_optim.train.checkpoint import SaveFailed, checkpoints, export
from apollo_optim.train.failures import TrainingFailed
from apollo_optim.train.pretrain import pretrain

PACKAGE = Path(__file__).resolve().parents[2] / "apollo_optim"
WRITERS = {"write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "unlink", "rmdir"}
CALLS = {"os": {"rename", "replace", "remove", "unlink", "rmdir", "link", "symlink", "truncate", "chmod"}}
CALLS |= {"shutil": {"rmtree", "move", "copy", "copy2", "copyfile", "copytree"}, "tempfile": {"mkdtemp", "mkstemp"}}
INTO_FOLDERS = {"save_pretrained", "save_file"}  # other people's writers: into a folder that the writer made
FILLING = {"export", "shards", "store", "tokenizer"}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    pretrain(tiny(folder, checkpoint={"every": 2}, train={"steps": 4}, schedule={"kind": "constant"}))
    return folder


@pytest.fixture
def folder(done, tmp_path) -> Path:
    shutil.copytree(done, tmp_path, dirs_exist_ok=True, symlinks=True)
    return tmp_path


def go_on(folder: Path, steps: int = 6):
    return pretrain(
        tiny(folder, checkpoint={"every": 2}, train={"steps": steps}, schedule={"kind": "constant"}), resume=True
    )


# --- the rule ---


def writes(source: str) -> list[str]:
    """What a source writes past the writer, with its lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        words = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        opens = name == "open" and any(
            isinstance(w, str) and set(w) <= set("rwaxbt+") and set(w) & set("wax+") for w in words
        )
        flags = name == "open" and owner == "os" and "O_" in ast.unparse(node) and "O_RDONLY" not in ast.unparse(node)
        whole = name == "rename" and isinstance(node.func, ast.Attribute) and len(node.args) == 1
        saved = name == "savefig" and not (node.args and ast.unparse(node.args[0]) == "buffer")
        if opens or flags or whole or saved or name in WRITERS or name in CALLS.get(owner, ()):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_everything_is_written_by_the_writer():
    allowed = {"cli/main.py": ["os.open(os.devnull, os.O_WRONLY)"]}  # a pipe that nobody reads any more
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name == "core/disk.py":
            continue
        found = [line for line in writes(path.read_text()) if line.partition(": ")[2] not in allowed.get(name, [])]
        assert not found, f"{name}: {found}"
        into = [
            n.func.attr
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in INTO_FOLDERS
        ]
        assert not into or path.stem in FILLING, f"{name}: {into}"


@pytest.mark.parametrize(
    "source",
    ["open('x', 'w')", "path.open(mode='ab')", "p.write_text('x')", "shutil.rmtree(p)", "os.rename(a, b)",
     "a.rename(b)",
     "os.open(p, os.O_WRONLY | os.O_CREAT)", "figure.savefig(path)", "path.unlink()"],
)  # fmt: skip
def test_a_write_past_it_is_seen(source):
    assert writes(source)


@pytest.mark.parametrize("source", ["open(path)", "path.open('rb')", "text.replace('a', 'b')", "r.rename(g, 'a', 'b')"])
def test_what_writes_nothing_is_left_alone(source):
    assert not writes(source)


# --- files ---


def test_a_link_is_replaced_and_what_it_points_to_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "config.yaml").symlink_to(tmp_path / "mine")
    disk.write(tmp_path / "config.yaml", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "config.yaml").read_text() == "new"
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"metrics.jsonl is a link"):
        disk.appending(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((InputError, OSError)):
        disk.appending(tmp_path / "pipe")


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    (tmp_path / "file").write_text("old")
    with contextlib.suppress(ZeroDivisionError), disk.writing(tmp_path / "file") as file:
        file.write(b"half")
        raise ZeroDivisionError
    with contextlib.suppress(ZeroDivisionError), disk.new_folder(tmp_path / "folder") as folder:
        (folder / "x").write_text("half")
        raise ZeroDivisionError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_modes_are_as_the_umask_says(folder):
    before = os.umask(0o027)
    try:
        go_on(folder)
        export(folder / "run", out=folder / "out")
    finally:
        os.umask(before)
    fresh = [
        path for where in ("run/model", "out", "run/checkpoints/step-00000006") for path in (folder / where).iterdir()
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in fresh} == {0o640}
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in fresh} == {0o750}


# --- what is the user's ---


def test_what_the_user_put_beside_the_model_stays(folder):
    model = folder / "run" / "model"
    (model / "README.md").write_text("mine")
    (model / "notes").mkdir()
    (model / "notes" / "a.txt").write_text("mine, too")
    (model / "link").symlink_to("nowhere")
    before = (model / "model.safetensors").read_bytes()
    go_on(folder)
    assert (model / "README.md").read_text() == "mine"
    assert (model / "notes" / "a.txt").read_text() == "mine, too"
    assert os.readlink(model / "link") == "nowhere"
    assert (model / "model.safetensors").read_bytes() != before
    assert not list((folder / "run").rglob(".tmp-*"))


def test_a_model_that_the_user_changed_is_not_overwritten(folder, capsys):
    changed = folder / "run" / "model" / "config.json"
    changed.write_text(changed.read_text() + " ")
    with pytest.raises(SaveFailed, match=r"config.json was not written by an export, or was changed since: move it"):
        export(folder / "run")
    assert go_on(folder).step == 6  # a run does not fail for it
    assert changed.read_text().endswith(" ")


def test_odd_entries_of_a_run_directory(folder):
    """Links to bigger disks, a note, a file called like a checkpoint."""
    run, big = folder / "run", folder / "big"
    big.mkdir()
    for name in ("model", "checkpoints/step-00000002"):
        moved = shutil.move(run / name, big / Path(name).name)
        (run / name).symlink_to(moved)
    (run / "checkpoints" / ".tmp-note").write_text("mine")
    (run / "checkpoints" / "step-00000099").write_text("mine")
    held = sorted(path.name for path in big.rglob("*"))
    go_on(folder)
    assert list(checkpoints(run)) == [4, 6]
    assert not (run / "model").is_symlink()
    assert sorted(path.name for path in big.rglob("*")) == held
    assert (
        (run / "checkpoints" / ".tmp-note").read_text() == (run / "checkpoints" / "step-00000099").read_text() == "mine"
    )


def test_export_into_the_folder_one_stands_in(folder, monkeypatch):
    other = folder / "empty"
    other.mkdir()
    (folder / ".tmp-empty").mkdir()
    monkeypatch.chdir(other)
    export(folder / "run", out=".")
    assert (other / "config.json").exists()
    assert os.getcwd() == str(other)
    assert (folder / ".tmp-empty").exists()


# --- whose it is ---


def test_a_directory_that_was_replaced_meanwhile_gets_no_checkpoint(folder, monkeypatch):
    from apollo_optim.train import checkpoint

    run, real = folder / "run", checkpoint.save

    def save(*args):
        run.rename(folder / "moved")
        run.mkdir()
        return real(*args)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(TrainingFailed, match="the run directory was moved, removed or replaced"):
        go_on(folder)
    assert not list(run.rglob("step-*"))


def test_a_checkpoint_that_cannot_be_pruned_fails_no_run(folder, monkeypatch, caplog):
    real = disk.remove

    def remove(path):
        if path.name.startswith("step-"):
            raise OSError(13, "Permission denied")
        real(path)

    monkeypatch.setattr(disk, "remove", remove)
    assert go_on(folder).step == 6
    assert "could not be removed" in caplog.text
