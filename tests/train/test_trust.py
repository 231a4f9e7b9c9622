"""Whose code runs is said by the call, never by a file: run directories and models come from anywhere."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
import zlib
from pathlib import Path

import pytest
from train_tiny import tiny

from apollo_optim.cli.main import main
from apollo_optim.core.errors import InputError
from apollo_optim.core.manifest import write_manifest
from apollo_optim.data import open_data
from apollo_optim.data.foreign import drop_code
from apollo_optim.train.checkpoint import export, newest
from apollo_optim.train.checkpoint.export import EXPORT
from apollo_optim.train.checkpoint.shards import CHECKPOINT
from apollo_optim.train.config import ModelConfig, RunConfig, from_dict, load_config, to_dict
from apollo_optim.train.models import build_model, skeleton
from apollo_optim.train.plan import planned
from apollo_optim.train.pretrain import pretrain

PACKAGE = Path(__file__).resolve().parents[2] / "apollo_optim"
CODE = """
open({proof!r}, "a").write("x")
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "{kind}"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    pretrain(tiny(folder, train={"steps": 1}))
    return folder


@pytest.fixture
def folder(done, tmp_path, monkeypatch) -> Path:
    """A copy of a finished run whose model and checkpoint name code; asking for consent on stdin is an error."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on stdin"))
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    run, proof = tmp_path / "run", tmp_path / "code-was-run"
    for directory in (run / "model", newest(run)):
        kind = f"stranger{zlib.crc32(str(directory).encode())}"  # transformers remembers what it has run
        (directory / "stranger.py").write_text(CODE.format(proof=str(proof), kind=kind))
        config = json.loads((directory / "config.json").read_text())
        config |= {
            "model_type": kind,
            "auto_map": {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"},
        }
        (directory / "config.json").write_text(json.dumps(config))
    seal(newest(run))
    write_manifest(run / "model", EXPORT)
    return tmp_path


def seal(checkpoint: Path) -> None:
    """What anybody can do who hands a checkpoint on: a manifest that fits."""
    write_manifest(checkpoint, CHECKPOINT, step=int(checkpoint.name.removeprefix("step-")))


# --- the loaders ---


def loaders_without_consent(source: str) -> list[int]:
    """Lines that call a foreign loader and do not say `trust_remote_code` themselves."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config", "pipeline")
        and "trust_remote_code" not in [keyword.arg for keyword in node.keywords]
    ]


def test_every_foreign_loader_says_whether_code_may_run():
    found = {str(path): loaders_without_consent(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert not {path: lines for path, lines in found.items() if lines}


def test_a_loader_that_leaves_it_out_is_seen():
    assert loaders_without_consent("AutoConfig.from_pretrained(path)")
    assert loaders_without_consent("x = AutoModel.from_config(config, **options)")
    assert not loaders_without_consent("AutoConfig.from_pretrained(path, trust_remote_code=False)")


# --- what a file may say ---


@pytest.mark.parametrize("section", ["model", "data"])
def test_a_run_file_cannot_consent(section, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"{section}: {{trust_remote_code: true}}\n")
    with pytest.raises(InputError, match=rf"{section}.trust_remote_code: .*say --trust-remote-code") as refusal:
        load_config(path)
    assert "\n" not in str(refusal.value)
    for words in (["pretrain", "--config", str(path)], ["plan", str(path)]):
        assert main(words) == 2
        assert "--trust-remote-code" in capsys.readouterr().err
    path.write_text(f"{section}: {{trust_remote_code: false}}\ntrain: {{steps: 3}}\n")  # as run files of old do
    assert load_config(path).train.steps == 3


def test_a_run_directory_cannot_consent(folder, capsys):
    path = folder / "run" / "config.yaml"
    path.write_text(path.read_text().replace("model:\n", "model:\n  trust_remote_code: true\n", 1))
    copy = newest(folder / "run") / "run.json"  # which export and sample go by
    copy.write_text(copy.read_text().replace('"model": {', '"model": {"trust_remote_code": true,', 1))
    seal(copy.parent)
    for words in (["export", "--out", str(folder / "out")], ["sample"], ["pretrain", "--resume", "--out"]):
        where = folder / "run"
        (folder / "run" / "model").rename(folder / "model")
        assert main([*words, str(where)]) == 2
        (folder / "model").rename(folder / "run" / "model")
        assert "a run file cannot allow" in capsys.readouterr().err
    assert not (folder / "code-was-run").exists()


def test_the_key_is_no_word_of_the_command_line(capsys):
    for words in (["--model.trust_remote_code", "true"], ["--data.trust_remote_code=true"]):
        assert main(["pretrain", *words]) == 2
        assert "did you mean --trust-remote-code?" in capsys.readouterr().err
    assert "trust" not in str(to_dict(RunConfig()))
    with pytest.raises(InputError, match="unknown key trust_remote_code"):
        from_dict({"trust_remote_code": True})


# --- what runs ---


def test_nothing_in_a_directory_runs(folder, capsys):
    run = folder / "run"
    for words in (["export", run, "--out", folder / "x"], ["sample", run / "model"], ["sample", run]):
        assert main([str(word) for word in words]) == 2
        assert "--trust-remote-code" in capsys.readouterr().err
    for refused in (
        lambda: export(run, out=folder / "x"),
        lambda: skeleton(ModelConfig(str(run / "model"))),
        lambda: build_model(ModelConfig(str(run / "model"), pretrained=True)),
        lambda: planned(RunConfig(model=ModelConfig(str(run / "model")))),
        lambda: pretrain(tiny(folder, "other", model={"name": str(run / "model"), "config": {}})),
    ):
        with pytest.raises(InputError, match="--trust-remote-code"):
            refused()
    assert not (folder / "code-was-run").exists()


def test_code_runs_and_is_handed_on_where_the_call_says_so(folder, capsys):
    """The tests above could fail: this code does run."""
    run, proof = folder / "run", folder / "code-was-run"
    assert main(["sample", str(run / "model"), "--max-tokens", "2", "--trust-remote-code"]) == 0
    assert proof.read_text()
    assert main(["export", str(run), "--out", str(folder / "x"), "--trust-remote-code"]) == 0
    assert "auto_map" in json.loads((folder / "x" / "config.json").read_text())


def test_a_tokenizer_cannot_bring_code(folder):
    words = folder / "run" / "tokenizer"
    config = json.loads((words / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "stranger.Mine"]}}
    (words / "tokenizer_config.json").write_text(json.dumps(config))
    proof = folder / "code-was-run"
    (words / "stranger.py").write_text(
        f"open({str(proof)!r}, 'a').write('x')\n"
        "from transformers import PreTrainedTokenizerFast\nclass Mine(PreTrainedTokenizerFast): pass\n"
    )
    cfg = tiny(folder, data={"tokenizer": str(words)}).data
    with pytest.raises(InputError, match=r"cannot load the tokenizer.*--trust-remote-code"):
        open_data(cfg)
    assert not proof.exists()
    open_data(cfg, trust_remote_code=True)
    assert proof.exists()


def test_a_kernel_from_the_hub_is_code():
    with pytest.raises(InputError, match="--trust-remote-code"):
        skeleton(ModelConfig("llama-1m", attention="somebody/kernels"))


# --- what is handed on ---


def test_what_is_exported_names_no_code(folder, tmp_path):
    """A config may name code for a kind of model that transformers knows itself."""
    point = newest(folder / "run")
    config = json.loads((point / "config.json").read_text()) | {"model_type": "llama"}
    (point / "config.json").write_text(json.dumps(config))
    seal(point)
    where = export(folder / "run", out=folder / "plain")
    assert "auto_map" not in json.loads((where / "config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x", "y"]}, "name": "\u00e9"}')
    (tmp_path / "other.json").write_text('["auto_map", "auto_map"]')
    drop_code(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"name": "\u00e9"}
    assert (tmp_path / "other.json").read_text() == '["auto_map", "auto_map"]'
