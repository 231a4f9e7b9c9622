"""The race: its search, its queue, its lines, its table. Runs are a stand-in; test_bench_race_runs.py has real ones."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from kept import RESULTS, needs_results

from apollo_optim.core.errors import InputError
from apollo_optim.train.config import load_config
from apollo_optim.train.models import skeleton
from apollo_optim.train.optimizer import make_optimizer
from benchmarks.race import __main__ as command
from benchmarks.race import former, page, report
from benchmarks.race.agenda import Board
from benchmarks.race.methods import BASELINE, HALF_LIFE, METHODS, MOMENTUM, RATES, Method
from benchmarks.race.protocol import (
    SETTINGS,
    STAGES,
    Trial,
    config_of,
    fingerprint,
    knob_keys,
)
from benchmarks.race.search import Found, Needs, find
from benchmarks.race.store import Store
from benchmarks.race.worker import work

FIRST = SETTINGS["4k"]
TWO = {
    "adamw": Method({"optim.name": "adamw"}, {"lr": 1e-3, "embedding_lr": 1e-2, "head_lr": 1e-2}),
    "mini": Method({"optim.name": "apollo-mini"}, {"lr": 1e-3}, start="adamw"),
}
BEST = {"lr": 2e-3, "embedding_lr": 4e-2, "head_lr": 1e-2}
"""Where the stand-in's loss has its minimum."""


def stand_in(trial: Trial, methods: dict = TWO) -> dict:
    """The line of a run whose loss is a bowl over the rates, a little lower for "mini", with noise of the seed."""
    loss = 3.0 + sum(math.log2(getattr(trial, axis) / best) ** 2 for axis, best in BEST.items()) / 50
    loss += math.sin(trial.seed) / 100 - 0.05 * (trial.method == "mini") + trial.search
    return {
        **dataclasses.asdict(trial),
        "fingerprint": fingerprint(trial, methods),
        "model": SETTINGS[trial.setting].model,
        "ended": "finished",
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / 3,
        "half_loss": loss + 1,
        "tokens": trial.steps * 4096,
        "state": {"matrices": 5, "norms": 1},
        "state_total": 3_000_000 if trial.method == "mini" else 12_000_000,
        "seconds": 100.0,
        "wall": 110.0,
        "step_cpu": 0.9,
        "step_optimizer": 0.02,
        "batch_tokens": SETTINGS[trial.setting].tokens,
        "corpus": "a" * 64,
        "hardware": {"capability": "AVX2"},
    }


def runner(trial: Trial, work: Path, **_) -> dict:
    return stand_in(trial)


def bowl(*centre: float):
    return lambda point: sum((a - b) ** 2 for a, b in zip(point, centre, strict=True))


def drive(loss, axes: int, budget: int, extra: int = 0) -> tuple[Found, list]:
    """A whole search, and the points in the order in which they were asked for."""
    losses: dict = {}
    while True:
        try:
            return find(losses, axes, budget, extra), list(losses)
        except Needs as needs:
            wanted = needs.points
        assert not set(wanted) & set(losses), "asked for what it has"
        losses |= {point: loss(point) for point in wanted}


# --- the search ---


@pytest.mark.parametrize("centre", [(0, 0, 0), (2, -2, 4), (-4, 0, 2), (1, 0, -1)])
def test_the_search_finds_the_bottom_of_a_bowl(centre):
    found, asked = drive(bowl(*centre), 3, 24)
    assert found.best == centre
    assert set(asked) == set(found.tried)
    assert not found.open_axes


def test_factors_of_two_come_first_and_their_roots_last():
    _, asked = drive(bowl(1, 0), 2, 24)
    odd = [any(k % 2 for k in point) for point in asked]
    assert odd == sorted(odd)
    assert any(odd)


def test_a_search_stops_at_its_budget():
    for budget in (1, 3, 7, 12):
        found, asked = drive(bowl(30, 30, 30), 3, budget)
        assert len(asked) == len(found.tried) == budget


def test_the_edge_is_moved_on_where_the_best_lies_on_it():
    without, _ = drive(bowl(14), 1, 5)
    assert without.best == (8,)
    assert without.open_axes == (0,)
    found, asked = drive(bowl(14), 1, 5, extra=6)
    assert found.best == (14,)
    assert not found.open_axes
    assert len(asked) == 9, "and no run beyond what it takes to have it bracketed"


def test_a_run_that_diverged_is_worse_than_any_other():
    found, _ = drive(lambda point: math.inf if point[0] > 2 else -point[0], 1, 8)
    assert found.best == (2,)


# --- the queue ---


def finish(lines: list, steps: int = 10_000, methods: dict = TWO, line=stand_in) -> list[Trial]:
    """Run the queue on the stand-in; the trials in their order."""
    order = []
    while (trial := next(Board.of(lines, methods).wanted(), None)) and len(order) < steps:
        order.append(trial)
        lines.append(line(trial, methods))
    return order


def test_every_method_has_the_same_budget_and_a_point_early():
    order = finish([])
    assert len(set(order)) == len(order), "nothing twice"
    for setting in SETTINGS.values():
        for name in TWO:
            searches = [t for t in order if t.search and (t.setting, t.method) == (setting.name, name)]
            assert len(searches) <= setting.budget + setting.extra
            assert all(t.steps == setting.steps // 5 and t.seed == 0 for t in searches)
    first = [t for t in order if t.setting == "4k"]
    finals = [(t.method, t.seed) for t in first if not t.search]
    assert finals[:6] == [("adamw", 0), ("mini", 0), ("adamw", 1), ("adamw", 2), ("mini", 1), ("mini", 2)]
    assert [t.method for t in first if t.search] == sorted(t.method for t in first if t.search), "one after the other"
    best = next(t for t in order if not t.search)
    assert {axis: getattr(best, axis) for axis in BEST} == BEST
    for stage in STAGES:
        done = {(t.setting, t.seed) for t in order if not t.search}
        assert {(stage.setting, seed) for seed in stage.seeds} <= done


def test_more_search_than_all_have_is_for_the_baseline_alone():
    assert {name for name, method in METHODS.items() if method.more} <= set(Board.of([]).alike(BASELINE))
    methods = {
        "adamw": METHODS["adamw"],
        "again": dataclasses.replace(METHODS["adamw"], start="adamw", more={"32k": 3}),
    }
    lines: list = []
    # the first one of a search is best
    order = finish(lines, methods=methods, line=lambda *args: {**stand_in(*args), "loss": 3 + len(lines) / 1000})
    setting = SETTINGS["32k"]
    searched = {name: sum(t.search and (t.setting, t.method) == ("32k", name) for t in order) for name in methods}
    assert searched == {"adamw": setting.budget + setting.extra, "again": setting.budget + setting.extra + 3}


def test_all_are_compared_to_the_better_search_of_the_baseline():
    methods = {"adamw": METHODS["adamw"], "again": dataclasses.replace(METHODS["adamw"], start="adamw")}
    lines: list = []
    finish(lines, methods=methods)
    assert Board.of(lines, methods).baseline(FIRST) == "adamw"  # the other one found the same point
    moved = {**METHODS["adamw"].centre, "lr": 7e-4}
    methods["again"] = dataclasses.replace(METHODS["adamw"], centre=moved)  # it has a point of its own
    for worse, better in (("adamw", "again"), ("again", "adamw")):
        lines = []
        finish(lines, methods=methods)
        for line in lines:
            line["loss"] += (line["method"] == worse) * (not line["search"])
        assert Board.of(lines, methods).baseline(FIRST) == better


def test_a_method_starts_at_the_best_of_another_and_names_what_is_its_own():
    lines: list = []
    order = finish(lines)
    first = next(t for t in order if t.method == "mini")
    assert (first.lr, first.embedding_lr, first.head_lr) == (1e-3, BEST["embedding_lr"], BEST["head_lr"])


@pytest.mark.parametrize(("state", "seeds"), [(12_000_000, [0]), (1_000_000, [0, 1, 2, 3, 4])])
def test_only_what_is_close_or_the_best_at_its_state_gets_more_seeds(state, seeds):
    far = {**TWO, "far": Method({"optim.name": "apollo"}, {"lr": 1e-3, "embedding_lr": 1e-2, "head_lr": 1e-2})}
    lines: list = []
    while trial := next(Board.of(lines, far).wanted(), None):
        line = stand_in(trial, far)
        if trial.method == "far":
            line["loss"] += 0.2
            line["state_total"] = state
        lines.append(line)
    finals = [line for line in lines if line["method"] == "far" and not line["search"]]
    assert [line["seed"] for line in finals if line["setting"] == "4k"] == seeds
    for setting in ("9m", "other-text"):
        assert (setting in {line["setting"] for line in finals}) == (state < 3_000_000)
    assert Board.of(lines, far).front() == (["mini", "far"] if state < 3_000_000 else ["mini"])


@pytest.mark.parametrize("lower", [0.0, 0.3])
def test_a_second_search_of_the_baseline_goes_wherever_it_goes_and_repeats_no_run(lower):
    both = {
        **TWO,
        "again": Method({"optim.name": "adamw"}, start="adamw", axes=("knob", "lr", "embedding_lr", "head_lr")),
    }
    lines: list = []
    while trial := next(Board.of(lines, both).wanted(), None):
        line = stand_in(trial, both)
        line["loss"] += 0.5 * (trial.method != "mini")  # far behind: no leader
        line["loss"] -= lower * (trial.method == "again" and trial.knob > HALF_LIFE.centre)
        lines.append(line)
    again = [(line["setting"], line["search"]) for line in lines if line["method"] == "again"]
    assert ("32k", True) in again, "it is looked for there, too"
    assert ((("9m", False) in again), (("4k", False) in again)) == (lower > 0, lower > 0), "same rates: the same run"


def test_a_line_of_another_definition_is_refused():
    lines: list = []
    finish(lines, steps=2)
    changed = {**TWO, "adamw": dataclasses.replace(TWO["adamw"], knob=MOMENTUM)}
    with pytest.raises(InputError, match="another definition of adamw"):
        Board.of(lines, changed)


def test_every_method_is_a_run_that_can_be_built():
    for name, method in METHODS.items():
        trial = Trial("4k", name, 1e-3, 2e-3, 3e-3, 4e-3, method.knob.centre, 5, 140, True)
        cfg = config_of(trial, "out")
        optimizer = make_optimizer(cfg.optim, skeleton(cfg.model))
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {"matrices": 1e-3, "embedding": 2e-3, "head": 3e-3, "norms": 4e-3}
        assert (cfg.optim.seed, cfg.data.seed, cfg.train.seed) == (5, 5, 5)
        assert cfg.optim.weight_decay == 0.0
        assert cfg.train.matmul_precision == "highest"
        none_of_its_own = name in ("adafactor", "scale")  # what they average is as their papers have it
        assert set(method.axes) == {*RATES} | (set() if none_of_its_own else {"knob"}), "the same budget, as many axes"


def test_a_half_life_in_tokens_is_the_same_average_at_every_batch():
    small, large = (knob_keys(HALF_LIFE, 1e6, tokens)["optim.betas"][1] for tokens in (4096, 32768))
    assert small**8 == pytest.approx(large, rel=1e-4)
    assert small ** (1e6 / 4096) == pytest.approx(0.5, rel=1e-3)
    assert knob_keys(MOMENTUM, 4096, 4096) == {"optim.momentum": 0.5}


# --- workers ---


def test_a_worker_goes_on_where_another_was_killed(tmp_path):
    whole = Store(tmp_path / "whole", tmp_path / "w1", TWO)
    work(whole, runner=runner)
    pieces = Store(tmp_path / "pieces", tmp_path / "w2", TWO)
    while True:
        before = len(pieces.lines())
        work(pieces, runner=runner, max_trials=5)
        with pieces.path.open("a") as file:
            file.write('{"setting": "4k", "meth')  # killed while it wrote
        if len(pieces.lines()) == before:
            break
    assert pieces.lines() == whole.lines()


WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_bench_race import TWO, stand_in
from benchmarks.race.store import Store
from benchmarks.race.worker import work

def slow(trial, folder, **_):
    with (Path({folder!r}) / "started").open("a") as file:
        file.write(trial.name + "\\n")
    time.sleep(0.02)
    return stand_in(trial)

work(Store(Path({folder!r}) / "results", Path({folder!r}) / "work", TWO), ["adamw"], max_trials=12, runner=slow)
"""


@pytest.mark.slow
def test_two_workers_never_compute_one_trial_twice(tmp_path, monkeypatch):
    code = WORKER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    code = code.replace("work(Store", "import benchmarks.race.worker as w; w.PAUSE = 0.01\nwork(Store")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(["", *sys.path])}
    workers = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [worker.wait(240) for worker in workers] == [0, 0]
    started = (tmp_path / "started").read_text().splitlines()
    lines = Store(tmp_path / "results", tmp_path / "work", TWO).lines()
    assert len(started) == len(set(started)) == len(lines) > 12, "both had their share"


def test_final_runs_keep_their_log_without_the_folder_it_lay_in(tmp_path):
    def logging(trial: Trial, folder: Path, **_) -> dict:
        out = folder / trial.name
        out.mkdir()
        (out / "metrics.jsonl").write_text(json.dumps({"event": "start", "config": {"out": str(out)}}) + "\n")
        return stand_in(trial)

    store = Store(tmp_path / "results", tmp_path / "work", TWO)
    work(store, ["adamw"], runner=logging, max_trials=25)
    finals = [trial for trial in store.board().rows if not trial.search]
    logs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results" / "logs").iterdir()}
    assert {name: log["config"]["out"] for name, log in logs.items()} == {t.name: t.name for t in finals}
    assert finals
    assert not any((tmp_path / "work" / trial.name).exists() for trial in store.board().rows)


def test_a_worker_may_take_one_setting_alone(tmp_path, capsys):
    store = Store(tmp_path / "results", tmp_path / "work", TWO)
    work(store, runner=runner, setting="9m")
    assert store.lines() == []
    assert "nothing to do for all methods in 9m; first in the whole queue: 4k-adamw" in capsys.readouterr().out
    work(store, runner=runner, setting="4k")
    work(store, runner=runner, setting="9m", max_trials=1)
    assert [line["setting"] for line in store.lines()] == ["4k"] * (len(store.lines()) - 1) + ["9m"]


def test_a_claim_goes_with_its_process(tmp_path):
    store = Store(tmp_path / "results", tmp_path / "work", TWO)
    trial, busy = store.claim()
    assert trial is not None
    assert not busy
    other = Store(tmp_path / "results", tmp_path / "work", TWO)
    assert other.claim(["adamw"]) == (None, True)
    assert other.running() == [trial.name]
    store.release(trial)
    assert other.claim()[0] == trial


def test_a_line_that_was_cut_off_is_left_out_and_named(tmp_path, capsys):
    store = Store(tmp_path, tmp_path / "work", TWO)
    store.path.write_text('{"a": 1}\nnonse')
    store.append({"a": 2})
    assert store.lines() == [{"a": 1}, {"a": 2}]
    assert "trials.jsonl:2: a line that was cut off is left out" in capsys.readouterr().err


# --- the table and the pictures ---


@pytest.fixture(scope="module")
def lines() -> list:
    done: list = []
    finish(done)
    return done


def test_the_table_has_the_seeds_their_pairs_and_all_state(lines):
    board = Board.of(lines, TWO)
    head, _, *rows = report.table(board, FIRST).splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["mini", "adamw"], "best first"
    cells = dict(zip((c.strip() for c in head.split("|")), (c.strip() for c in rows[0].split("|")), strict=True))
    assert cells["against adamw, paired"] == "-4.9% +- 0.0% (5 seeds)"
    assert cells["state, MB"] == "3.00"
    assert cells["at 7B, GB"] == "2.11", "APOLLO-Mini's in the table of the README"
    assert len(cells["perplexity, each seed"].split(",")) == 5
    assert cells["off by 2x"].startswith("lr +2/+2 %")
    assert report.table(board, SETTINGS["32k"]) != report.table(board, FIRST)


def test_a_basin_is_of_the_best_pair_that_differs_in_one_rate_alone():
    """An axis was tried when another one was not yet at its best: the pair of then is told, not a question mark."""

    def at(**rates: float) -> Trial:
        everything = {"lr": 1.0, "embedding_lr": 1.0, "head_lr": 1.0, "knob": 1.0, **rates}
        return Trial("4k", "adamw", **everything, norm_lr=1.0, seed=0, steps=140, search=True)

    losses = {
        at(): 3.0, at(lr=2.0): 3.0 + math.log(1.05), at(lr=0.5): math.inf, at(embedding_lr=2.0): 2.9,
        at(embedding_lr=2.0, knob=4.0): 2.8, at(embedding_lr=4.0): 2.9 + math.log(1.1),
    }  # fmt: skip
    board = SimpleNamespace(loss=losses.__getitem__)
    told = report.basin(board, tuple(losses))
    assert told == "lr +5/stopped %, embedding +10/+11 %, head ?/? %"
    assert report.basin(board, ()) == ""


def test_the_table_refuses_lines_of_two_corpora(lines):
    mixed = [line | {"corpus": "b" * 64} if line["seed"] == 2 else line for line in lines]
    with pytest.raises(InputError, match=r"2 corpora: aaaaaaaaaaaa\.\.\. \(adamw, seed 0\); bbbbbbbbbbbb"):
        report.table(Board.of(mixed, TWO), FIRST)


def test_a_pair_on_two_kinds_of_processor_is_told(lines):
    def on_another(which: Callable[[dict], bool]) -> str:
        mixed = [line | {"hardware": {"capability": "AVX512"}} if which(line) else line for line in lines]
        return report.table(Board.of(mixed, TWO), FIRST)

    assert "on several processors" in on_another(lambda line: line["seed"] == 2 and line["method"] == "mini")
    assert "on several processors" not in on_another(lambda line: line["seed"] == 2), "each pair is on one"


def test_the_error_is_of_the_perplexity_as_the_difference_is():
    def at(method: str, seed: int) -> Trial:
        return Trial("4k", method, 1.0, 1.0, 1.0, 1.0, 1.0, seed, 700, False)

    losses = {at("mini", seed): 2.0 + 0.1 * seed for seed in range(3)} | {at("adamw", seed): 3.0 for seed in range(3)}
    rows = {trial: {"hardware": {"capability": "AVX2"}} for trial in losses}
    board = SimpleNamespace(loss=losses.__getitem__, rows=rows)
    minis, base = [*losses][:3], [*losses][3:]
    wanted = math.exp(-0.9) * 0.1 / math.sqrt(3)
    assert report.against(board, minis, base) == f"{math.expm1(-0.9):+.1%} +- {wanted:.1%} (3 seeds)"
    losses[minis[0]] = math.inf
    assert "(2 seeds)" in report.against(board, minis, base), "a run that diverged has no pair"


def test_the_front_is_what_nothing_beats():
    assert report.front([(3, 5.0), (1, 9.0), (2, 5.0), (4, 6.0), (5, 4.0)]) == [(1, 9.0), (2, 5.0), (5, 4.0)]


def test_the_pictures_and_the_page_are_written(lines, tmp_path):
    (tmp_path / "logs").mkdir()
    board = Board.of(lines, TWO)
    for trial in board.finals(FIRST, "adamw"):
        steps = [{"event": "step", "step": k, "tokens": 4096 * k, "loss": 9.0 - k} for k in (1, 2, 3)]
        (tmp_path / "logs" / f"{trial.name}.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    names = ("report.md", "report.html", "pareto.png", "curves.png")
    assert page.write(board, tmp_path) == [tmp_path / name for name in names]
    for name in ("pareto.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text, html = ((tmp_path / name).read_text() for name in names[:2])
    settings = [name for name, setting in SETTINGS.items() if board.finals(setting, "mini")]
    assert text.count("| mini |") == html.count("<td>mini</td>") == len(settings)
    assert html.count('src="data:image/png;base64,') == html.count("<img") == 2


def test_nothing_run_yet_is_a_page_that_says_so(tmp_path):
    page.write(Board.of([], TWO), tmp_path)
    assert "0 runs" in (tmp_path / "report.md").read_text()
    assert report.table(Board.of([], TWO), FIRST) == "No full run of 4k yet."


# --- the former protocol ---

FORMER = RESULTS / "race" / "llama-4m"


@needs_results
def test_the_kept_lines_make_the_kept_table(capsys):
    assert command.main(["table", "--results", str(FORMER)]) == 0
    assert capsys.readouterr().out == (FORMER / "table.md").read_text()
    assert command.main(["table", "--results", str(FORMER), "--only", "apollo-bf16", "apollo-int4"]) == 0
    assert "| apollo-int4 | 0.005 | 0.08 | 26.50, 26.94, 27.28 |" in capsys.readouterr().out
    assert command.main(["table", "--results", str(FORMER), "--only", "adamw", "sgd"]) == 2
    assert "there is no final run of sgd; there are some of adamw, apollo," in capsys.readouterr().err


@needs_results
def test_the_run_file_of_a_former_line_is_what_it_was_run_with(tmp_path, capsys):
    rows = former.read(FORMER)
    trial = next(trial for trial in rows if trial.method == "apollo-int4" and trial.seed == 1)
    assert command.main(["status", "--results", str(FORMER)]) == 0
    assert f"{trial.name}: perplexity 26.94" in capsys.readouterr().out
    assert command.main(["config", trial.name, "--results", str(FORMER)]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    cfg = load_config(tmp_path / "run.yaml")
    assert (cfg.optim.name, cfg.optim.lr, cfg.optim.rest_lr, cfg.quant.bits) == ("q-apollo", 0.005, 0.08, 4)
    assert (cfg.data.seed, cfg.train.steps, cfg.schedule.warmup, cfg.model.dtype) == (1, 700, 0.1, "bfloat16")
    logged = json.loads((FORMER / "apollo-int4-seed1.jsonl").read_text().splitlines()[0])["config"]
    same = {"seq_len": 256, "source": "packages", "seed": 1}
    assert {key: logged["data"][key] for key in same} == {key: getattr(cfg.data, key) for key in same} == same


@needs_results
def test_nothing_is_run_by_the_former_protocol(capsys):
    before = (FORMER / "trials.jsonl").read_bytes()
    for action in ("run", "picture"):
        assert command.main([action, "--results", str(FORMER)]) == 2
        assert f"the former protocol, which has no `{action}`" in capsys.readouterr().err
    assert (FORMER / "trials.jsonl").read_bytes() == before


# --- the command ---


def test_the_command_says_where_the_race_stands(tmp_path, capsys):
    assert command.main(["status", "--results", str(tmp_path / "r"), "--work", str(tmp_path / "w")]) == 0
    told = capsys.readouterr().out
    assert "next: 4k-adamw-lr0.002" in told
    assert "ahead: about" in told


@pytest.mark.parametrize("action", ["table", "picture", "config"])
def test_a_folder_without_lines_is_refused(action, tmp_path, capsys):
    assert command.main([action, "--results", str(tmp_path / "r")]) == 2
    assert f"there are no lines in {tmp_path}/r/trials.jsonl: start in a checkout" in capsys.readouterr().err


def test_an_unknown_method_is_refused(tmp_path, capsys):
    assert command.main(["run", "--only", "adam", "--results", str(tmp_path)]) == 2
    assert "--only adam: no such method; there are adamw" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_run_file_of_a_line_is_what_it_was_run_with(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Store.__init__, "__defaults__", (TWO,))
    monkeypatch.setattr(config_of, "__defaults__", (TWO,))
    store = Store(tmp_path / "r", tmp_path / "w", TWO)
    work(store, runner=runner, max_trials=2)
    trial = next(iter(store.board().rows))
    name = trial.name
    words = ["--results", str(tmp_path / "r"), "--work", str(tmp_path / "w")]
    capsys.readouterr()
    assert command.main(["config", name, *words]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "run.yaml") == config_of(trial, f"out/{name}")
    assert command.main(["config", name[:-1], *words]) == 2
    assert f"did you mean {name}?" in capsys.readouterr().err
