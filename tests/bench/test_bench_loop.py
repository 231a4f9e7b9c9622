"""The bench of the training loop: that it measures what it says, on a model that takes no time."""

import dataclasses
import json

import pytest
from train_tiny import tiny

from benchmarks import loop
from benchmarks.step.contenders import BASELINE


@pytest.mark.slow
def test_every_optimizer_is_measured_in_both_loops(tmp_path, capsys, monkeypatch):
    real = loop.config_of

    def small(args, optimizer):
        cfg = real(args, optimizer)
        cfg.data = dataclasses.replace(tiny(tmp_path).data, seq_len=args.seq_len)
        return cfg

    monkeypatch.setattr(loop, "config_of", small)
    words = "--model llama-1m --optimizers apollo-mini --batch 2 --seq-len 16 --steps 10 --rounds 2 --threads 1"
    assert loop.main([*words.split(), "--no-compile", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "loop.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1]
    for row in rows:
        assert {name: len(seconds) for name, seconds in row["bare"].items()} == {BASELINE: 10, "apollo-mini": 10}
        assert len(row["pretrain"]["apollo-mini"]) == 10 / loop.LOGGED
        assert row["versions"]["torch"]
    printed = capsys.readouterr().out
    assert loop.main(["--table", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() in printed


def test_the_table_takes_ratios_round_by_round():
    def row(number, fused, bare, whole):
        return {
            "round": number, "model": "m", "dtype": "float32", "batch": 2, "seq_len": 50, "compile": True,
            "bare": {BASELINE: [fused], "apollo": [bare]}, "pretrain": {"apollo": [whole]},
            "versions": {}, "hardware": {"device": "a CPU", "threads": 2},
        }  # fmt: skip

    text = loop.table([row(0, 1.0, 1.0, 1.1), row(1, 4.0, 5.0, 6.0), row(2, 1.0, 0.5, 0.6)])
    line = next(line for line in text.splitlines() if line.startswith("| apollo "))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:3] == ["1.000", "1.100"]
    assert cells[3].startswith("1.200 (")  # the ratios 1.1, 1.2 and 1.2, not of medians
    assert cells[5].startswith("0.909 (")  # 0.909, 0.667 and 1.667
