"""One reader: what the manifest lists and nothing else, as it was written, or one line that says what it is not."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
from train_tiny import figures, records, tiny

from apollo_optim.cli.main import main
from apollo_optim.core.errors import Damaged, InputError
from apollo_optim.core.manifest import write_manifest
from apollo_optim.core.reading import opened, read_json
from apollo_optim.core.runlog import Gaps
from apollo_optim.data.tokenizer import trained_bpe
from apollo_optim.train.checkpoint import checkpoints, export, load_state, newest, unpack
from apollo_optim.train.checkpoint.shards import CHECKPOINT
from apollo_optim.train.config import load_config
from apollo_optim.train.pretrain import pretrain

CONSTANT = {"kind": "constant", "warmup": 0}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("read")
    pretrain(tiny(folder, checkpoint={"every": 2}, train={"steps": 4}, schedule=CONSTANT))
    return folder


@pytest.fixture
def folder(done, tmp_path) -> Path:
    shutil.copytree(done, tmp_path, dirs_exist_ok=True, symlinks=True)
    return tmp_path


def edited(path: Path, change) -> None:
    """What anybody can do: a file of a checkpoint changed, and a manifest that fits."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    write_manifest(path.parent, CHECKPOINT, step=int(path.parent.name.removeprefix("step-")))


def norm_of(state: dict) -> dict:
    """The optimizer's state of a matrix."""
    return next(entry for _, entry in state["optimizer"]["state"]["$items"] if "prev_norm" in entry)


# --- files ---


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "digits"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        (b" " * 2000, "more than 1,000 bytes"),
    ],
)
def test_a_file_that_is_no_json_is_damaged(text, what, tmp_path):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(Damaged, match=rf"x.json is damaged: .*{what}") as refusal:
        read_json(tmp_path / "x.json", 1000 if what.startswith("more") else 1 << 20)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("kind", "make"), [("a FIFO", os.mkfifo), ("a directory", os.mkdir)])
def test_only_regular_files_are_opened(kind, make, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(InputError, match=f"x is {kind}, not a regular file"):
        opened(tmp_path / "x")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="zero is a device"):
        opened(tmp_path / "zero")


# --- checkpoints ---


def test_what_the_manifest_does_not_list_is_refused(folder):
    point = newest(folder / "run")
    shard = point / "weights-00001-of-00001.safetensors"
    shutil.copy(shard, point / "weights-00001-of-00001 (conflicted copy).safetensors")
    with pytest.raises(InputError, match=r"conflicted copy\).safetensors is not listed .*; delete .*step-00000002"):
        load_state(point)
    (point / "weights-00001-of-00001 (conflicted copy).safetensors").rename(point / ".DS_Store")  # is never read
    load_state(point)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m.update(files={}), "its own checksum"),
        (lambda m: m.update(step=2), "its own checksum"),
        (lambda m: m.update(version="3"), "version '3'"),
        (lambda m: m.update(version=2, files={"../x": {"bytes": 1, "crc32": 1}}), "its list of files"),
        (lambda m: m.update(version=2, files=[]), "its list of files"),
        (lambda m: m.update(version=2, files={"state.json": {"bytes": -1}}), "its list of files"),
        (lambda m: m.update(version=2, files={}), "is not listed"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(change, what, folder):
    path = newest(folder / "run") / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=what):
        load_state(path.parent)


def test_a_checkpoint_under_another_name_is_refused(folder):
    newest(folder / "run").rename(folder / "run" / "checkpoints" / "step-00000009")
    with pytest.raises(InputError, match="holds step 4, not 9: it was renamed"):
        load_state(newest(folder / "run"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda s: s.update(step=-1), "its step is -1"),
        (lambda s: s.update(step=2), "its step is 2, not 4"),
        (lambda s: s.update(tokens="many"), "its tokens is 'many'"),
        (lambda s: s.update(seconds=float("nan")), "its seconds is nan"),
        (lambda s: s.pop("random"), "its random is None"),
        (lambda s: s["optimizer"].update(state=[]), "its optimizer.state"),
        (lambda s: s["optimizer"]["param_groups"][0].update(dtype={"$dtype": "nn"}), "there is no dtype 'nn'"),
        (lambda s: s["optimizer"]["param_groups"][0].update(initial_lr="x"), "initial_lr='x' of group 0"),
        (lambda s: s["random"].update(torch={"$tensor": "x"}), "there is no tensor 'x'"),
        (lambda s: s["random"].update(python={"$tuple": [3, {"$tuple": [1]}, None]}), "state.json is damaged"),
        (lambda s: norm_of(s).update(prev_norm=3), "prev_norm is int, not a tensor"),
        (lambda s: s["data"].update(row=-1), "row"),
        (lambda s: s["data"].update(block="x"), "block"),
        (lambda s: s["data"]["documents"].update(position=10**9), "position"),
        (lambda s: s["data"]["documents"].update(epoch=-1), "epoch"),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(change, what, folder):
    edited(newest(folder / "run") / "state.json", change)
    with pytest.raises(InputError, match=what) as refusal:
        pretrain(tiny(folder, checkpoint={"every": 2}, train={"steps": 6}, schedule=CONSTANT), resume=True)
    assert "\n" not in str(refusal.value)


def test_dtypes_come_from_a_table():
    for name in ("save", "float32.__class__", "nn", 3, None):
        with pytest.raises(InputError, match="there is no dtype"):
            unpack({"$dtype": name}, {})


def test_a_checkpoint_that_is_dropped_while_it_is_exported_is_no_error(folder, monkeypatch):
    """`sample` or `export` of a run that goes on."""
    module = importlib.import_module("apollo_optim.train.checkpoint.export")
    run, real = folder / "run", module.load_weights

    def dropped(point, model):
        if point.name == "step-00000002":
            (folder / "new").rename(run / "checkpoints" / "step-00000004")
            shutil.rmtree(point)
        real(point, model)

    newest(run).rename(folder / "new")
    monkeypatch.setattr(module, "load_weights", dropped)
    out = export(run, out=folder / "out")
    assert (out / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()


def test_checkpoints_of_the_version_before_are_read(folder):
    for point in checkpoints(folder / "run").values():
        (point / "run.json").unlink()
        write_manifest(point, CHECKPOINT, step=int(point.name.removeprefix("step-")))
        content = json.loads((point / "manifest.json").read_text())
        (point / "manifest.json").write_text(json.dumps({**content, "version": 2, "crc32": None}))
    export(folder / "run", out=folder / "out")
    pretrain(tiny(folder, checkpoint={"every": 2}, train={"steps": 6}, schedule=CONSTANT), resume=True)


# --- the run's own configuration ---


def test_the_copy_in_the_checkpoint_is_what_counts(folder, capsys):
    run = folder / "run"
    path = run / "config.yaml"
    good = path.read_text()
    path.write_text(good.replace("lr: 0.01", "lr: 0.02").replace("hidden_size: 32", "hidden_size: 64"))
    assert path.read_text() != good
    export(run, out=folder / "out")  # is not asked
    assert json.loads((folder / "out" / "config.json").read_text())["hidden_size"] == 32
    assert main(["pretrain", "--out", str(run), "--resume"]) == 2
    err = capsys.readouterr().err
    assert "another config: model.config.hidden_size (was 32, is 64), optim.lr (was 0.01, is 0.02)" in err
    path.write_text(good.replace("every: 2", "every: 3", 1))  # as --checkpoint.every or --eval.every 3 would be
    assert main(["pretrain", "--out", str(run), "--resume", "--train.steps", "6"]) == 0


def test_the_tokenizer_is_the_one_of_the_run(folder):
    path = folder / "run" / "tokenizer" / "tokenizer.json"
    good = path.read_text()
    path.write_text(good.replace('"a":', '"@":').replace('"b":', '"a":').replace('"@":', '"b":'))
    with pytest.raises(InputError, match=r"tokenizer.json is damaged: its checksum is wrong"):
        export(folder / "run", out=folder / "out")
    (path.parent / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"is not the tokenizer that .* was trained with"):
        export(folder / "run", out=folder / "out")
    path.write_text(good)
    export(folder / "run", out=folder / "out")


def test_a_cached_tokenizer_that_was_damaged_is_trained_again(tmp_path, caplog):
    texts = ["some text", "some more text"] * 50
    first = trained_bpe(lambda: texts, 260, "key", tmp_path)
    path = next(tmp_path.rglob("tokenizer.json"))
    good = path.read_text()
    path.write_text(good.replace('"a":', '"@":').replace('"b":', '"a":').replace('"@":', '"b":'))
    again = trained_bpe(lambda: texts, 260, "key", tmp_path)
    assert "its checksum is wrong; it is trained again" in caplog.text
    assert again.get_vocab() == first.get_vocab()
    assert path.read_text() == good


# --- exports ---


def test_an_export_that_was_changed_is_not_sampled(folder, capsys):
    model = folder / "run" / "model"
    (model / "README.md").write_text("mine")
    assert main(["sample", str(model), "--max-tokens", "1"]) == 0
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    assert main(["sample", str(model), "--max-tokens", "1"]) == 2
    assert "model.safetensors is damaged: its checksum is wrong; export it again, or delete" in capsys.readouterr().err
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    shutil.copy(path, model / "pytorch_model.bin")
    assert main(["sample", str(folder / "run"), "--max-tokens", "1"]) == 2
    assert "pytorch_model.bin is not listed in manifest.json" in capsys.readouterr().err


# --- the log ---


def test_a_resumed_run_says_what_its_log_lacks(folder, caplog):
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(["[]\n"] + [line for line in lines if '"step": 2' not in line]))
    cfg = tiny(folder, checkpoint={"every": 2}, train={"steps": 5}, schedule=CONSTANT)
    pretrain(cfg, resume=True)
    assert "metrics.jsonl has 1 line that is no record, the first: line 1: not an event" in caplog.text
    assert "metrics.jsonl lacks steps: 2" in caplog.text
    assert path.read_text().startswith("[]\n")  # nothing is thrown away
    path.unlink()
    pretrain(tiny(folder, checkpoint={"every": 2}, train={"steps": 6}, schedule=CONSTANT), resume=True)
    assert "metrics.jsonl is not there: the log lacks steps 1 to 5" in caplog.text
    assert [record["step"] for record in records(folder / "run", "step")] == [6]


@pytest.mark.parametrize(
    ("every", "steps", "up_to", "lacking"),
    [
        (1, [1, 2, 3], 3, ""),
        (1, [1, 4], 4, "2 to 3"),
        (1, [], 4, "1 to 4"),
        (10, [1, 10, 20], 25, ""),
        (10, [1, 20], 25, "10 to 19"),
        (10, [1, 10], 25, "20 to 25"),
        (10, [1, 10, 13, 20], 20, ""),
        (1, [2, 4, 6, 8, 10], 10, "1, 3, 5 and more"),
        (None, [1], 50, ""),
    ],
)
def test_what_a_log_lacks(every, steps, up_to, lacking):
    gaps = Gaps()
    gaps.see({"event": "start", "config": {"log": {"every": every}}})
    for step in steps:
        gaps.see({"event": "step", "step": step})
    assert gaps.up_to(up_to) == lacking


def test_a_log_without_its_end_goes_on_as_before(folder):
    """The reader changes nothing of a log that is in order."""
    before = figures(folder / "run")
    pretrain(tiny(folder, checkpoint={"every": 2}, train={"steps": 4}, schedule=CONSTANT), resume=True)
    assert figures(folder / "run") == before


NINES = "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))


@pytest.mark.parametrize("text", ["a: &a [x]\n" + NINES, "a: &a [*a]", "[" * 5000])
def test_a_run_file_whose_aliases_multiply_is_refused(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=r"run.yaml is not a") as refusal:
        load_config(tmp_path / "run.yaml")
    assert "\n" not in str(refusal.value)
