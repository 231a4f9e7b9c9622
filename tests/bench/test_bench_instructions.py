"""The instruction set: its answers by hand, held-out rows apart, and what counts as right."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

from apollo_optim.cli.main import main
from benchmarks import instructions as bench

END = 9


class Words:
    """One token a word; 9 is end-of-text."""

    eos_token_id = END

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids):
        return "".join(f" {n}" for n in ids)

    def __len__(self):
        return 10


def counting(input_ids, use_cache):
    """Says the number after the last, from 8 on the end."""
    following = torch.where(input_ids < 8, input_ids + 1, END)
    return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 12).float())


def test_answers_by_hand():
    chance, seen = random.Random(5), {}
    for task in bench.TASKS:
        for _ in range(200):
            row = bench.instruction(task, chance)
            words = row["prompt"].split()
            assert (words[0], words[-1]) == (task, "=")
            answer = row["completion"].split()
            if task == "count":
                right = [str(words[3:-1].count(words[1]))]
                assert words[2] == ":"
            elif task == "rename":
                assert (words[2], words[4]) == ("as", ":")
                right = [words[3] if word == words[1] else word for word in words[5:-1]]
                assert right != words[5:-1]
            else:
                right = {"copy": list, "reverse": lambda some: some[::-1], "sort": sorted}[task](words[1:-1])
            assert answer == right
            seen.setdefault(task, set()).add(row["completion"])
    assert min(map(len, seen.values())) >= 4


def test_held_out_rows_are_apart_and_the_same_every_time():
    train, held = bench.instructions(3000, 300)
    assert (len(train), len(held)) == (3000, 300)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert {task: sum(row["task"] == task for row in held) for task in bench.TASKS} == dict.fromkeys(bench.TASKS, 60)
    assert (train, held) == bench.instructions(3000, 300)


def test_an_answer_ends():
    said = bench.answers(counting, Words(), ["1 2 6", "7", "1 2 3 5"])
    assert said == [" 7 8", " 8", " 6 7 8"]
    never = bench.answers(lambda input_ids, use_cache: counting(input_ids * 0, use_cache), Words(), ["3"])
    assert never == [None]


def test_the_command_makes_scores_and_draws(tmp_path, capsys, monkeypatch):
    assert main(["bench", "instructions", "--out", str(tmp_path), "--rows", "20", "--held", "10"]) == 0
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 20
    monkeypatch.setattr(bench, "answers", lambda model, tokenizer, prompts: [None] * len(prompts))
    monkeypatch.setattr("apollo_optim.cli.sample.load", lambda path: (None, None))
    assert main(["bench", "instructions", "--out", str(tmp_path), "--score", f"before={tmp_path}"]) == 0
    assert "before: 0.0% exact" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.jsonl").read_text())["tasks"] == dict.fromkeys(bench.TASKS, 0.0)
    assert (tmp_path / "demo-finetune.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [["--score", "before=x"], ["--score", "before"]])
def test_what_is_refused(tmp_path, capsys, words):
    if words[-1] == "before":
        bench.main(["--out", str(tmp_path), "--rows", "5", "--held", "5"])
    assert main(["bench", "instructions", "--out", str(tmp_path), *words]) == 2
    assert "error: " in capsys.readouterr().err
