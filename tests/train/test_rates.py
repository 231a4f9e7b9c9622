"""Learning rates that a run does not say are known ones, and what is known is in the kept logs."""

import json
from pathlib import Path

import pytest
from kept import RESULTS, needs_results
from train_tiny import records, tiny

from apollo_optim.cli import pretrain as command
from apollo_optim.train.config import RunConfig, load_config
from apollo_optim.train.pretrain import pretrain
from apollo_optim.train.rates import PAPER, RACE2, RATES, Rate, advice, table, tokens_a_step, with_known_rates
from benchmarks.race.methods import METHODS

SAYS_NO_RATE = {"name": "adamw", "lr": None, "rank": None, "update_proj_gap": None}
RECIPES = {"lite": "muon-4bit-slim", "nano": "muon-stateless-slim"}
"""What the race calls them (`test_a_recipe_is_what_was_raced`)."""
ROOT = Path(__file__).resolve().parents[2]


def asked(*words: str) -> RunConfig:
    return command.parse(words).cfg


def rates(*words: str) -> tuple[float | None, float | None]:
    optim = with_known_rates(asked(*words)).optim
    return optim.lr, optim.rest_lr


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    assert table() in (ROOT / "docs" / "rates.md").read_text()


@needs_results
@pytest.mark.parametrize(
    "row", [row for row in RATES if row.log != PAPER], ids=lambda row: f"{row.optimizer}-{row.rest}-{row.tokens}"
)
def test_what_is_known_was_run(row: Rate) -> None:
    folder = RESULTS / row.log
    if row.log == RACE2:
        method = RECIPES.get(row.optimizer, row.optimizer.replace("+adamw", "-"))
        setting = {4_096: "4k", 32_768: "32k"}[row.tokens]
        lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
        # a method's other searches count as its own
        alike = {name for name, other in METHODS.items() if other.keys == METHODS[method].keys}
        lines = [line for line in lines if line["method"] in alike and line["setting"] == setting]
        best = min((line for line in lines if line["search"]), key=lambda line: line["loss"])
        point = ("lr", "embedding_lr", "head_lr", "norm_lr", "knob")
        assert any(all(line[key] == best[key] for key in point) for line in lines if not line["search"]), "run whole"
        assert (best["lr"], best["head_lr"]) == (row.lr, row.rest_lr)
        assert all(best[key] == row.more[key] for key in ("embedding_lr", "norm_lr"))
        average = row.more["momentum"] if "momentum" in row.more else row.more["betas"][1]
        assert 0.5 ** (row.tokens / best["knob"]) == pytest.approx(average, abs=1e-4)
        return
    if (folder / "trials.jsonl").exists():
        mini, bits = "-mini" * ("mini" in row.optimizer), "-int8" * row.optimizer.startswith("q-")
        rest = "" if row.rest == "adamw" else f"-rest-{row.rest}"
        method = "adamw" if row.optimizer == "adamw" else f"apollo{mini}{bits}{rest}"
        trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
        runs = [trial for trial in trials if trial["method"] == method]
        whole = [(run["lr"], run["rest_lr"]) for run in runs if run["steps"] == 700]
        assert (row.lr, row.rest_lr) in whole
        if searched := [run for run in runs if run["steps"] < 700]:
            best = min(searched, key=lambda run: run["loss"])
            assert (best["lr"], best["rest_lr"]) == (row.lr, row.rest_lr)
        return
    found = []
    for log in folder.glob("*.jsonl"):
        start, *_, end = (json.loads(line) for line in log.read_text().splitlines())
        config = start["config"]
        assert end["event"] == "end"
        tokens = config["train"]["batch_size"] * config["data"]["seq_len"]
        optim = config["optim"]
        found.append((optim["name"], tokens, optim["lr"], optim["rest_lr"], optim["rest"]))
    assert (row.optimizer, row.tokens, row.lr, row.rest_lr, row.rest) in found


def test_keys_that_were_tuned_with_a_rate_come_with_it() -> None:
    def more(*words: str) -> list[float | None]:
        optim = with_known_rates(asked("--optim.name", "muon+adamw8bit", *words)).optim.flat()
        return [optim.get(key) for key in ("lr", "rest_lr", "embedding_lr", "head_lr", "norm_lr", "momentum")]

    assert more() == [0.008, 0.04, 0.32, None, 0.02, 0.8145]
    assert more("--optim.name", "full") == more()
    assert more("--optim.momentum", "0.9", "--optim.embedding_lr", "0.1") == [0.008, 0.04, 0.1, None, 0.02, 0.9]
    assert more("--optim.rest_lr", "0.01") == [0.008, 0.01, None, None, None, 0.8145]
    assert more("--optim.lr", "0.004") == [0.004, None, None, None, None, None]
    assert more("--train.batch_size", "128") == [0.032, 0.04, 0.32, None, 0.02, 0.1938]
    assert more("--train.batch_size", "512") == [0.032, 0.04, 0.32, None, 0.02, None]  # averages belong to a batch
    assert more("--optim.name", "lite") == [0.016, 0.01, 0.64, None, 0.02, 0.8145]
    assert more("--optim.name", "lite", "--optim.head", "adamw") == [0.016, None, None, None, None, 0.8145]
    assert with_known_rates(asked("--optim.name", "nano")).optim.flat()["betas"] == [0.9, 0.99938]
    mini = ("--optim.name", "apollo-mini", "--optim.rest")
    assert more(*mini, "adamw8bit") == [0.005, 0.02, 0.08, None, 0.02, None]
    assert more(*mini, "scale") == [0.005, None, None, None, None, None]  # rates of another rule


def test_a_run_that_says_no_rate_has_a_known_one() -> None:
    assert tokens_a_step(asked()) == 4096
    assert rates() == (0.005, 0.02)
    assert rates("--optim.name", "adamw") == (0.002, 0.04)
    assert rates("--optim.name", "apollo", "--optim.rest", "adafactor") == (0.005, 0.04)
    assert rates("--optim.rest", "adamw8bit") == (0.005, 0.02)  # AdamW's, in another storage
    assert rates("--train.batch_size", "512") == (0.01, 0.01)
    assert rates("--optim.lr", "0.003") == (0.003, None)  # as ever: the rest's is the same
    assert rates("--optim.rest_lr", "0.003") == (0.005, 0.003)
    assert rates("--optim.rest", "scale") == (0.005, None)  # not known with this rest: the same for all
    assert rates("--optim.name", "muon") == (None, None)  # its own
    assert rates("--model.pretrained", "true", "--model.name", "./some") == (None, None)  # all of it is for new weights


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", None),
        (
            "--optim.lr 0.04",
            "lr 0.04 (rest 0.04) is far from 0.005 (rest 0.02), which is known of apollo-mini at 4,096",
        ),
        ("--optim.lr 0.005 --optim.rest_lr 0.3", "far from 0.005 (rest 0.02)"),
        ("--optim.lr 0.005 --optim.rest_lr 0.3 --optim.rest scale", None),  # another rule, other rates
        ("--optim.lr 0.0025 --optim.rest_lr 0.01", None),
        ("--optim.lr 0", None),
        ("--optim.lr 0.01 --train.batch_size 512", None),
        ("--optim.lr 0.01 --train.batch_size 64", None),  # of this batch nothing is known
        (
            "--train.batch_size 64",
            "is known of apollo-mini at 4,096 tokens a step, and this run's have 16,384: other rates",
        ),
        ("--optim.name muon --optim.lr 3", None),
        ("--model.pretrained true --model.name ./some", "optim.lr is not said: the optimizer's own default"),
    ],
)
def test_a_rate_far_from_what_is_known_gets_one_line(words: str, told: str | None) -> None:
    line = advice(with_known_rates(asked(*words.split())))
    assert (line is None) == (told is None)
    assert told is None or (told in str(line) and "\n" not in str(line))


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_run_file_is_far_from_what_is_known(path: Path) -> None:
    assert advice(with_known_rates(asked("--config", str(path)))) is None


def test_the_line_is_shown_and_logged_and_a_run_says_what_it_took(tmp_path, capsys) -> None:
    cfg = tiny(tmp_path, optim=SAYS_NO_RATE, train={"steps": 2}, log={"display": "plain"})
    pretrain(cfg)
    optim = load_config(tmp_path / "run" / "config.yaml").optim
    assert (optim.lr, optim.rest_lr) == (0.002, 0.04)
    (start,) = records(tmp_path / "run", "start")
    assert start["peak_lr"] == {"lr": 0.002, "lr_rest": 0.16}, "the embedding's"
    assert start["advice"].startswith("lr 0.002 (rest 0.04) is known of adamw at 4,096 tokens a step, and this run's")
    assert capsys.readouterr().err.count(start["advice"]) == 1
    pretrain(cfg, resume=True)  # from a config that says no rate


def test_a_run_of_old_that_said_no_rate_goes_on_with_the_optimizers_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("apollo_optim.train.pretrain.with_known_rates", lambda cfg: cfg)
    cfg = tiny(tmp_path, optim=SAYS_NO_RATE, train={"steps": 2})
    pretrain(cfg)
    monkeypatch.undo()
    pretrain(cfg, resume=True)
    assert load_config(tmp_path / "run" / "config.yaml").optim.lr is None
