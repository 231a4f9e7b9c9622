"""Checkpoints: what goes in comes out, to the bit; what is damaged, foreign or half-written never does."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_tiny import MODEL, tiny

from apollo_optim.core.errors import InputError
from apollo_optim.quant import LowBitWeight
from apollo_optim.train.checkpoint import (
    SaveFailed,
    checkpoints,
    export,
    load_state,
    load_weights,
    newest,
    pack,
    restore_optimizer,
    save,
    shards,
    unpack,
    weights,
)
from apollo_optim.train.checkpoint.shards import CHECKPOINT
from apollo_optim.train.config import ModelConfig
from apollo_optim.train.models import build_model
from apollo_optim.train.pretrain import pretrain

STATE = {"step": 3, "optimizer": {"state": {0: {"exp_avg": torch.arange(6.0).view(2, 3).mT, "seed": 2**63 + 1}}}}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(ModelConfig("llama-1m", config=MODEL | {"tie_word_embeddings": True}), 300)


@pytest.fixture
def run(tmp_path, model) -> Path:
    for step in (3, 6):
        save(tmp_path, step, model, STATE | {"step": step}, keep=2)
    return tmp_path


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


tensors = st.sampled_from([torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool]).map(
    lambda d: torch.ones(2, 3).to(d)
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | tensors
    | st.sampled_from([torch.float32, torch.bfloat16])
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_tree_of_numbers_and_tensors_comes_back(tree):
    plain, named = pack(tree)
    assert same(unpack(json.loads(json.dumps(plain)), named), tree)


def test_objects_are_refused_by_name():
    with pytest.raises(InputError, match=r"state.0.projector is a object"):
        pack({"state": {"0": {"projector": object()}}})


def test_a_checkpoint_brings_back_weights_and_state(run, model):
    other = build_model(ModelConfig("llama-1m", config=MODEL | {"tie_word_embeddings": True}), 300)
    load_weights(newest(run), other)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert other.lm_head.weight is other.model.embed_tokens.weight  # tied ones are saved once, and stay tied
    assert "lm_head.weight" not in weights(model)
    assert same(load_state(newest(run)), STATE | {"step": 6})


def test_shards_are_small(tmp_path, model, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    path = save(tmp_path, 1, model, STATE, keep=1)
    files = sorted(path.glob("weights-*"))
    assert len(files) > 2
    assert files[0].name == f"weights-00001-of-{len(files):05d}.safetensors"
    largest = max(t.nbytes for t in weights(model).values())
    assert all(file.stat().st_size < max(30_000, largest) + 2_000 for file in files)
    other = build_model(ModelConfig("llama-1m", config=MODEL | {"tie_word_embeddings": True}), 300)
    load_weights(path, other)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_nothing_is_pickled(run):
    for path in newest(run).iterdir():
        assert path.suffix in (".json", ".safetensors")


def test_only_the_newest_are_kept(run, model):
    save(run, 9, model, STATE, keep=2)
    assert list(checkpoints(run)) == [6, 9]
    assert (run / "checkpoints" / "latest").resolve() == newest(run).resolve()
    save(run, 12, model, STATE, keep=1)
    assert list(checkpoints(run)) == [12]
    assert not list(run.rglob(".tmp-*"))


def test_leftovers_of_a_kill_are_swept_and_never_read(run, model):
    half = run / "checkpoints" / ".tmp-step-00000009"
    half.mkdir()
    (half / "weights-00001-of-00001.safetensors").write_bytes(b"half")
    assert list(checkpoints(run)) == [3, 6]
    save(run, 9, model, STATE, keep=3)
    assert not half.exists()
    assert list(checkpoints(run)) == [3, 6, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "float32 state"])
def test_any_torch_optimizer_goes_on_as_if_nothing_had_been(dtype, kind):
    def fresh():
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(4, 3).to(dtype))
        return p, torch.optim.SGD([p], 0.1, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(
            [p], lr=0.1, betas=(0.9, 0.95)
        )

    def step(p, optimizer):
        p.grad = (p.detach() * 0.5 + 1).clone()
        optimizer.step()

    p, optimizer = fresh()
    step(p, optimizer)
    if kind == "float32 state":  # as ours keeps it; torch's load_state_dict alone would cast it to bfloat16
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][key] = optimizer.state[p][key].float() + 1e-6
    plain, named = pack({"o": optimizer.state_dict(), "p": p.detach().clone()})
    saved = unpack(json.loads(json.dumps(plain)), {name: t.clone() for name, t in named.items()})
    q, other = fresh()
    with torch.no_grad():
        q.copy_(saved["p"])
    restore_optimizer(other, saved["o"])
    assert same(other.state_dict(), optimizer.state_dict())
    if kind != "float32 state":
        step(p, optimizer)
        step(q, other)
        assert torch.equal(p, q)


# --- damage ---


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 128  # in JSON: not text any more
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "state.json",
        "config.json",
        "weights-00001-of-00001.safetensors",
        "state-00001-of-00001.safetensors",
    ],
)
def test_damage_is_seen_before_anything_is_used(run, harm, name):
    harm(newest(run) / name)
    with pytest.raises(
        InputError, match=r"step-00000006.*; delete .*step-00000006 to go on from step-00000003"
    ) as refusal:
        load_state(newest(run))
    assert "\n" not in str(refusal.value)


def test_foreign_directories_are_refused(run, model):
    manifest = newest(run) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("apollo-optim checkpoint", "something else"))
    with pytest.raises(InputError, match="not a checkpoint of apollo-optim"):
        load_state(newest(run))
    manifest.write_text(
        manifest.read_text()
        .replace("something else", "apollo-optim checkpoint")
        .replace(f'"version": {CHECKPOINT.version}', f'"version": {CHECKPOINT.version + 1}')
    )
    with pytest.raises(InputError, match="newer"):
        load_state(newest(run))
    (run / "checkpoints" / "step-00000099").mkdir()
    with pytest.raises(InputError, match=r"step-00000099 is damaged: manifest\.json is missing"):
        load_state(newest(run))


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 2}, {"num_hidden_layers": 0}])
def test_weights_of_another_model_are_refused(run, change):
    other = build_model(ModelConfig("llama-1m", config=MODEL | {"tie_word_embeddings": True} | change), 300)
    with pytest.raises(InputError, match="belongs to another model"):
        load_weights(newest(run), other)
    bf16 = build_model(ModelConfig("llama-1m", dtype="bfloat16", config=MODEL | {"tie_word_embeddings": True}), 300)
    with pytest.raises(InputError, match="belongs to another model"):
        load_weights(newest(run), bf16)


# --- a disk that is full ---

FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from train_tiny import tiny
from apollo_optim.train import checkpoint
from apollo_optim.train.pretrain import pretrain
real = checkpoint.save
def save(run, step, *rest):
    if step == 8:  # from here on no file may be longer: the system refuses to write, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    return real(run, step, *rest)
checkpoint.save = save
pretrain(tiny(Path(sys.argv[1])))
"""


def test_a_disk_that_fills_up_during_a_save_costs_nothing(tmp_path):
    arguments = [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parents[1]), "50000"]
    child = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert "TrainingFailed: step 8: could not write the checkpoint of step 8" in child.stderr
    assert "the last good checkpoint is" in child.stderr
    assert not list(tmp_path.rglob(".tmp-*"))
    assert list(checkpoints(tmp_path / "run")) == [4]
    load_state(newest(tmp_path / "run"))
    assert pretrain(tiny(tmp_path), resume=True).step == 8


def test_failures_of_any_write_are_one_line(tmp_path, model, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    save(tmp_path, 1, model, STATE, keep=1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveFailed, match=r"could not write the checkpoint of step 2 in .*: No space left on device"):
        save(tmp_path, 2, model, STATE, keep=1)
    assert list(checkpoints(tmp_path)) == [1]
    assert not list(tmp_path.rglob(".tmp-*"))


# --- export ---


def test_export_of_any_step(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = tiny(tmp_path, model={"dtype": "bfloat16"})
    pretrain(cfg)
    run = Path(cfg.out)
    before = torch.get_rng_state()
    where = export(run, step=4, out=tmp_path / "early")
    assert torch.equal(before, torch.get_rng_state())
    early, late = (AutoModelForCausalLM.from_pretrained(path) for path in (where, run / "model"))
    assert early.dtype == late.dtype == torch.bfloat16
    assert not torch.equal(early.lm_head.weight, late.lm_head.weight)
    load_weights(checkpoints(run)[4], early)
    shutil.rmtree(run / "model")
    assert export(run) == run / "model"
    again = AutoModelForCausalLM.from_pretrained(run / "model")
    assert same(dict(again.state_dict()), dict(late.state_dict()))
    tokens = AutoTokenizer.from_pretrained(run / "model")("some text", return_tensors="pt").input_ids
    assert torch.isfinite(again(tokens).logits).all()
    with pytest.raises(InputError, match="no checkpoint of step 5, only of 4, 8"):
        export(run, step=5)
    with pytest.raises(InputError, match="is there already"):
        export(run, out=tmp_path / "early")
    with pytest.raises(InputError, match="holds no checkpoint"):
        export(tmp_path)


def test_export_of_low_bit_weights_with_a_short_last_group(tmp_path):
    from transformers import AutoModelForCausalLM

    cfg = tiny(tmp_path, quant={"bits": 8, "group_size": 24}, train={"steps": 1})  # rows of 32 and 64
    pretrain(cfg)
    run = Path(cfg.out)
    stored = build_model(cfg.model, 300, quant=cfg.quant)
    load_weights(checkpoints(run)[1], stored)
    exported = dict(AutoModelForCausalLM.from_pretrained(run / "model").named_parameters())
    low_bit = {name: p for name, p in stored.named_parameters() if isinstance(p, LowBitWeight)}
    assert len(low_bit) == 7
    assert all(torch.equal(p.dequantize(), exported[name]) for name, p in low_bit.items())


def test_a_full_disk_at_the_export_is_one_line_too_and_fails_no_run(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    pretrain(tiny(tmp_path, log={"display": "plain"}))
    told = capsys.readouterr().err
    assert re.search(r"warning: could not write the exported model .*No space left.*: apollo-optim export", told)
    monkeypatch.undo()
    assert pretrain(tiny(tmp_path), resume=True).step == 8
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
