"""`apollo-optim finetune` and `apollo-optim data`: the words, their defaults, and what is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from train_tiny import records

from apollo_optim.cli import data as data_command
from apollo_optim.cli import finetune, pretrain
from apollo_optim.cli.main import main
from apollo_optim.data import DataConfig, open_data
from apollo_optim.train.config import check, load_config
from apollo_optim.train.finetune import resolved


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    rows = [{"q": f"say {n} :", "a": f" {n}"} for n in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = folder / "text.txt"
    text.write_text("\n".join(f"say {n} : {n}" for n in range(900)))
    tokenizer = open_data(
        DataConfig(source=str(text), vocab_size=300, seq_len=16, cache_dir=str(folder), validation_percent=20)
    ).tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "run.yaml").write_text(
        f"model: {{name: {folder / 'base'}}}\n"
        f"data: {{source: {folder / 'pairs.jsonl'}, seq_len: 32, cache_dir: {folder}, validation_percent: 20,\n"
        "       format: auto, columns: {prompt: q, completion: a}}\n"
        "train: {batch_size: 4, threads: 1}\n"
        "optim: {name: adamw}\n"
        f"log: {{display: none}}\nout: {folder / 'run'}\n"
    )
    return folder


@pytest.mark.parametrize(
    ("file", "words", "epochs", "steps"),
    [
        ("", [], 3.0, 700),
        ("train: {steps: 9}", [], None, 9),
        ("train: {epochs: 2}", [], 2.0, 700),
        ("train: {epochs: 2}", ["--train.steps", "5"], None, 5),
        ("train: {epochs: 2, steps: 30}", [], 2.0, 30),  # as RUN/config.yaml says it
        ("", ["--train.epochs=1"], 1.0, 700),
    ],
)
def test_steps_or_epochs(tmp_path, file, words, epochs, steps):
    (tmp_path / "run.yaml").write_text(file)
    cfg = pretrain.parse(["--config", str(tmp_path / "run.yaml"), *words], finetune.story()).cfg
    assert (cfg.train.epochs, cfg.train.steps) == (epochs, steps)
    assert (cfg.model.pretrained, cfg.data.format, cfg.checkpoint.best) == (True, "auto", True)


def test_a_run_by_its_words_and_its_resume(place, capsys):
    run = place / "run"
    assert main(["finetune", "--config", str(place / "run.yaml"), "--eval.batch_size", "2"]) == 0
    cfg = load_config(run / "config.yaml")
    assert (cfg.optim.lr, cfg.train.epochs) == (2e-5, 3.0)
    assert len(records(run, "step"))
    assert main(["data", str(run), "--rows", "1"]) == 0
    assert "--- row 1 ---" in capsys.readouterr().out
    assert main(["finetune", "--out", str(run), "--resume"]) == 0
    assert records(run, "end")[-1]["step"] == cfg.train.steps
    assert main(["finetune", "--out", str(run), "--resume", "--train.epochs", "4"]) == 2
    assert "train.epochs was 3.0, is 4.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model.name llama-1m", "model.name=llama-1m: a size has no weights to start from"),
        ("--model.name no/where", "there is no directory 'no/where' here"),
        ("--train.steps 3 --train.epochs 1", "--train.steps and --train.epochs"),
        ("--data.source python", "data.source=python: that is text"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(place, capsys, words, said, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refused)
    assert main(["finetune", "--config", str(place / "run.yaml"), "--out", str(place / "no"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("error: ") == 1


def refused(*_, **__):
    raise OSError("the hub cannot be reached")


def test_a_run_is_not_its_model(place, capsys):
    run = place / "somebody"
    (run / "model").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    assert main(["finetune", "--config", str(place / "run.yaml"), "--model.name", str(run)]) == 2
    assert f"that is a run; its model is {run / 'model'}" in capsys.readouterr().err


def test_data_shows_what_is_learnt(place, capsys, monkeypatch):
    assert main(["data", str(place / "run.yaml"), "--rows", "2", "--data.seq_len", "24"]) == 0
    said = capsys.readouterr().out
    assert said.count("--- row") == 2
    assert ":>> " in said
    assert "<|endoftext|><<\n--------------------\nsay " in said
    assert "learnt" in said
    assert "% padding" in said
    assert main(["data", str(place / "run.yaml"), "--rows", "0", "--data.seq_len", "3"]) == 2
    assert "cuts off all that is learnt" in capsys.readouterr().err


@pytest.mark.parametrize("plain", [True, False])
def test_data_in_colour_unless_told_otherwise(place, capsys, monkeypatch, plain):
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1") if plain else monkeypatch.delenv("NO_COLOR", raising=False)
    assert data_command.run([str(place / "run.yaml"), "--rows", "1"]) == 0
    said = capsys.readouterr().out
    assert (">>" in said) == plain
    assert ("\x1b[1;32m" in said) != plain


def test_data_of_text(place, capsys):
    words = ["--data.format", "text", "--data.source", str(place / "text.txt"), "--model.name", "llama-1m"]
    words += ["--data.columns", "{}", "--data.vocab_size", "300"]
    assert main(["data", str(place / "run.yaml"), "--rows", "1", *words]) == 0
    assert "0.0% padding" in capsys.readouterr().out


FINETUNE = sorted((Path(__file__).resolve().parents[2] / "runs").glob("finetune-*.yaml"))


@pytest.mark.parametrize("file", FINETUNE, ids=lambda path: path.stem)
def test_every_run_file_is_a_run_that_can_be_planned(file, capsys):
    cfg = resolved(pretrain.parse(["--config", str(file)], finetune.story()).cfg)
    check(cfg)
    assert cfg.model.pretrained
    assert 1e-5 <= cfg.optim.lr <= 3e-4 or file.stem == "finetune-demo"
    assert ("Not run in full" in file.read_text()) == (file.stem != "finetune-demo")
    assert cfg.train.batch_size % (cfg.train.micro_batch or cfg.train.batch_size) == 0
    words = ["--model.name", "llama-1m", "--optimizer", cfg.optim.name, "--batch", "2"]
    assert main(["plan", str(file), "--data.seq_len", "64", *words]) == 0


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("finetune-llama-3.2-1b-commonsense", ["--optim.rank", "4"]),
        ("finetune-llama-3.2-1b-commonsense", ["--optim.name=apollo-mini", "--optim.rank=null", "--optim.scale=128"]),
        ("finetune-llama-3-8b-mmlu", []),
        ("finetune-llama-3-8b-mmlu", ["--optim.name", "q-apollo-mini", "--quant.group_size", "16"]),
    ],
)
def test_the_papers_run_files_on_a_stand_in(place, tmp_path, name, more):
    asked = f"What is {name}?"
    rows = [
        {"instruction": asked, "input": "", "output": f"{n}", "answer": "1"}
        if "commonsense" in name
        else {"prompt": f"{asked} {n} Answer:", "completion": " B"}
        for n in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model.name", str(place / "base"), "--data.source", str(tmp_path / "rows.jsonl"), "--data.seq_len=256"]
    words += ["--data.cache_dir", str(place), "--data.validation_percent", "20", "--train.steps", "2"]
    words += ["--train.batch_size", "2", "--train.micro_batch", "1", "--train.threads", "1", "--log.display", "none"]
    file = next(path for path in FINETUNE if path.stem == name)
    assert main(["finetune", "--config", str(file), *words, *more, "--out", str(tmp_path / "run")]) == 0
    assert records(tmp_path / "run", "end")[0]["step"] == 2
    assert (tmp_path / "run" / "model" / "config.json").exists()
