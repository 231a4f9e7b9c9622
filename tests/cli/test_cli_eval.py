"""`apollo-optim eval`: perplexity of a text and exact answers; tasks: tests/clients/test_lm_eval.py."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from chat_tiny import make_base, make_tuned

from apollo_optim.cli import sample
from apollo_optim.cli.main import main

PAIRS = [("one:", " uno"), ("two:", " due"), ("red:", " rosso"), ("sky:", " cielo")]
CHAT = [("<u>hi</u><a>", "hello")]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    return make_tuned(tmp_path_factory.mktemp("tuned"), PAIRS + CHAT)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_perplexity_is_that_of_every_token_after_the_first_of_its_row(tuned, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one: uno, two: due, and red.\n" * 3)
    (tmp_path / "b.txt").write_text("sky")
    words = ["eval", str(tuned), "--text", str(tmp_path), "--seq-len", "32", "--batch-size", "2"]
    assert main([*words, "--out", str(tmp_path / "scores.json")]) == 0
    model, tokenizer = sample.load(tuned)
    texts = [(tmp_path / name).read_text() for name in ("a.txt", "b.txt")]
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], 0]]
    losses = []
    for start in range(0, len(ids), 32):
        row = torch.tensor([ids[start : start + 32]])
        scores = model(row).logits[0, :-1].double().log_softmax(-1)
        losses.append(-scores.gather(1, row[0, 1:, None]).squeeze(1))
    assert len(losses) == 3, "the last row is a short one"
    loss = torch.cat(losses).mean().item()
    found = json.loads((tmp_path / "scores.json").read_text())["text"]
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["predictions"] == len(ids) - 3
    size = sum(len(text) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) * (len(ids) - 3) / size, rel=1e-5)
    assert f"perplexity {math.exp(loss):.2f}" in capsys.readouterr().out


def test_answers_are_counted_where_they_are_exact(tuned, tmp_path, capsys):
    rows = [{"prompt": asked, "completion": answer} for asked, answer in PAIRS]
    rows[2]["completion"] = " ross"  # the model goes on
    chat = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "hello"}]}
        for asked in ("hi", "yo")
    ]
    assert main(["eval", str(tuned), "--answers", write(tmp_path / "a.jsonl", rows), "--show", "3"]) == 0
    said = capsys.readouterr().out
    assert "answers: 3 of 4 exact, 75.0%" in said
    assert "3: 'rosso' instead of 'ross'" in said
    assert main(["eval", str(tuned), "--answers", write(tmp_path / "b.jsonl", chat)]) == 0
    assert "1 of 2 exact" in capsys.readouterr().out
    assert main(["eval", str(tuned), "--answers", str(tmp_path / "a.jsonl"), "--limit", "2"]) == 0
    assert "2 of 2 exact" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eval BASE", "nothing to score: say --text FILE, --answers FILE or --tasks NAMES"),
        ("eval BASE --text nowhere.txt", "nowhere.txt: no such file"),
        ("eval BASE --answers nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("eval BASE --text EMPTY", "it has no two tokens"),
        ("eval BASE --answers EMPTY", "a text, and questions and answers are read from jsonl"),
        ("eval BASE --answers LONG", "question and answer have 412 tokens, the model's context 256"),
        ("eval BASE --text EMPTY --seq-len 999", "the model's context is 256 tokens"),
        ("eval BASE --text EMPTY --limit 0", "--limit 0: at least 1"),
        ("eval BASE --tasks x", "--tasks needs lm_eval, which is not installed: pip install 'apollo-optim[eval]'"),
    ],
)
def test_what_cannot_be_scored_is_one_line(tuned, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "empty.txt").write_text("")
    long = write(tmp_path / "long.jsonl", [{"prompt": "a" * 400, "completion": "b" * 4}])
    names = {"BASE": str(tuned), "EMPTY": str(tmp_path / "empty.txt"), "LONG": long}
    assert main([names.get(word, word) for word in words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_damaged_weights_are_said(tmp_path, capsys):
    base = make_base(tmp_path / "nan")
    model, _ = sample.load(base)
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(base)
    (tmp_path / "a.txt").write_text("some text")
    assert main(["eval", str(base), "--text", str(tmp_path / "a.txt")]) == 2
    assert "its weights are damaged" in capsys.readouterr().err
