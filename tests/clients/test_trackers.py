"""Trackers with the real packages: what a run and its continuation send is in their files, as metrics.jsonl has it.

Where they are not installed, as by default, `make test-clients` runs them in an environment of their own.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")  # other clients' environments have nothing for the command
from train_tiny import records, tiny

from apollo_optim.core.errors import InputError
from apollo_optim.train.pretrain import pretrain

STEPS = (3, 5)


def tracked(folder: Path, name: str) -> dict[int, float]:
    """A run that stops after three steps and goes on to five; the loss of each step as the log has it."""
    for steps in STEPS:
        pretrain(
            tiny(folder, log={"to": [name], "every": 1}, train={"steps": steps}, schedule={"kind": "constant"}),
            resume=steps > STEPS[0],
        )
    return {record["step"]: record["loss"] for record in records(folder / "run", "step")}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = tracked(tmp_path, "tensorboard")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert {event.step: event.value for event in found.Scalars("train/loss")} == pytest.approx(logged)
    assert found.Scalars("eval/perplexity")


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    logged = tracked(tmp_path, "wandb")
    wandb.teardown()
    name = (tmp_path / "run" / "wandb-id").read_text()
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == len(STEPS), "one id for a run and its continuation"
    assert {step: loss for file in files for step, loss in wandb_losses(file)} == pytest.approx(logged)


def wandb_losses(file: Path) -> list[tuple[int, float]]:
    """Steps and losses of an offline file: messages in LevelDB's log format, blocks of 32 KiB after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, message, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind not in (1, 4):  # whole, or the last part
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        message = b""
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in items:
            found.append((record.history.step.num, items["train/loss"]))
    return found


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "board"))  # it is read at the import
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "trackio" in sys.modules:
        pytest.skip("trackio was imported before: its board is elsewhere")
    pytest.importorskip("trackio")
    logged = tracked(tmp_path, "trackio")
    (board,) = (tmp_path / "board").glob("apollo-optim*.db")
    with sqlite3.connect(board) as database:
        rows = database.execute("select step, json_extract(metrics, '$.\"train/loss\"') from metrics").fetchall()
    assert {step: loss for step, loss in rows if loss is not None} == pytest.approx(logged)


def test_a_tracker_that_cannot_be_opened_is_one_line_and_leaves_the_directory_free(tmp_path, monkeypatch):
    """No key, no network: whatever it says."""

    def refuses(**_):
        raise RuntimeError("api_key not configured\nsee the docs")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuses))
    for _ in range(2):
        with pytest.raises(
            InputError, match=r"log.to=wandb: it could not be opened: api_key not configured see the docs"
        ):
            pretrain(tiny(tmp_path, log={"to": ["wandb"]}, train={"steps": 1}))
    assert pretrain(tiny(tmp_path, train={"steps": 1})).step == 1
    assert os.path.exists(tmp_path / "run" / "model")
