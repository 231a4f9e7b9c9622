"""The bench of a step: its figures are what they say they are, and nobody is left out in silence."""

import contextlib
import io
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from kept import RESULTS, needs_results
from torch.optim import SGD

from apollo_optim import ApolloMini
from apollo_optim.cli.main import main
from apollo_optim.core.errors import InputError
from benchmarks import kit
from benchmarks.step import __main__ as command
from benchmarks.step import rounds, stage
from benchmarks.step.contenders import BASELINE, CONTENDERS, Contender, Halves, ours
from benchmarks.step.stage import HALVES
from benchmarks.step.table import Result, sections

TINY = stage.Setting("llama-1m", "float32", 1, 4, torch.device("cpu"))
QUICK = "bench step --sizes llama-1m --layers 1 --rank 4 --rounds 3 --warmup 1 --schedule-steps 0"


class Rule(SGD):
    """A contender whose step is known: ``extra`` bytes more than it keeps, and what a test makes of it."""

    extra = 1 << 20

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr=lr)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                self.state[p]["kept"] = torch.zeros(p.shape)
            temporary = torch.empty(self.extra, dtype=torch.uint8)
            p.sub_(p.grad)
            del temporary


class Idle(Rule):
    def step(self, closure=None):
        pass


class Broken(Rule):
    def step(self, closure=None):
        raise RuntimeError("no such | kernel\nand more lines")


class Late(Rule):
    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps > 2:
            raise RuntimeError("the third step")
        super().step()


class Scribbler(Rule):
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            p.grad.mul_(1e30)


class Recompiler(Rule):
    """Its learning rate is compiled in."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr)
        self.compiled = torch.compile(lambda p, grad, lr: p.sub_(grad * lr), dynamic=False, backend="eager")

    def step(self, closure=None):
        group = self.param_groups[0]
        torch._dynamo.mark_static_address(group["params"][0])
        self.compiled(group["params"][0].detach(), group["params"][0].grad, group["lr"])


def contender(cls, package="torch", **keys) -> Contender:
    def build(params, _):
        return cls(params)

    return Contender(package, "a test's", Halves(build, build), **keys)


class Measured(NamedTuple):
    """A run of the bench."""

    code: int
    rows: list[dict]
    printed: str
    errors: str
    remade: str
    """What `--table` prints afterwards."""


def bench(out: Path, words: str, contenders: dict[str, Contender]) -> Measured:
    """These contenders beside the baseline; the rows are those that the run has added to the log."""
    before = len(kit.read(out / "steps.jsonl"))
    printed, errors, remade = io.StringIO(), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        for name, one in contenders.items():
            patch.setitem(CONTENDERS, name, one)
        patch.setattr(rounds, "can_compile", lambda _: True)  # loads the compiler, which nobody here uses
        with contextlib.redirect_stdout(printed):
            code = main([*QUICK.split(), "--out", str(out), "--contenders", *contenders, *words.split()])
        for name in ("table.md", "steps.png"):
            (out / name).unlink()
        with contextlib.redirect_stdout(remade):
            assert main(["bench", "step", "--table", "--out", str(out)]) == 0
    rows = kit.read(out / "steps.jsonl")[before:]
    return Measured(code, rows, printed.getvalue(), errors.getvalue(), remade.getvalue())


EAGER = ("apollo-mini-eager", "apollo-sketch-eager", "torch-adamw", "torch-muon", "torch-sgd", "torch-adafactor")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two runs below keep their log, one after the other."""
    return tmp_path_factory.mktemp("steps")


@pytest.fixture(scope="module")
def measured(out: Path) -> Measured:
    """Everybody who needs no compiler, in fp32, and peers of which it is known what is wrong with them."""
    wrong = {
        "absent": contender(Rule, package="no-such-package"),
        "broken": contender(Broken),
        "late": contender(Late),
        "idle": contender(Idle),
        "scribbler": contender(Scribbler),
        "rule": contender(Rule, reads=(3, 1)),
    }
    return bench(out, "--dtypes float32", {name: CONTENDERS[name] for name in EAGER} | wrong)


@pytest.fixture(scope="module")
def again(out: Path, measured: Measured) -> Measured:
    """Another run in the same folder, in both dtypes; two of ours are wrong."""
    stochastic = ours(ApolloMini, compile=False, stochastic_rounding=True)
    some = {
        "torch-sgd": CONTENDERS["torch-sgd"],
        "apollo-mini-sr": replace(CONTENDERS["apollo-mini-sr"], halves=stochastic),
        "idle-ours": contender(Idle, package="apollo-optim"),
        "broken-ours": contender(Broken, package="apollo-optim"),
    }
    return bench(out, "--dtypes float32 bfloat16", some)


def test_everybody_is_in_log_and_table(measured):
    assert measured.code == 0, "what peers do wrong is no fault of ours"
    by_name = {row["contender"]: row for row in measured.rows}
    wrong = ["broken", "late", "idle", "scribbler", "rule"]
    assert list(by_name) == ["absent", BASELINE, *EAGER, *wrong]
    assert by_name["absent"]["error"] == "not installed"
    assert by_name["broken"]["error"] == "RuntimeError: no such | kernel"
    assert by_name["late"]["error"] == "RuntimeError: the third step"
    row = by_name["apollo-mini-eager"]
    assert {half: len(times) for half, times in row["seconds"].items()} == {"matrices": 3, "rest": 3}
    assert row["versions"]["torch"] == torch.__version__
    assert row["hardware"]["threads"] == torch.get_num_threads()
    assert (row["rank"], by_name["torch-sgd"]["rank"]) == (1, None)
    assert "llama-1m, fp32, CUT TO 1 OF 2 LAYERS" in measured.printed
    assert "| broken | a test's | RuntimeError: no such / kernel |" in measured.printed
    assert "| absent | a test's | not installed |" in measured.printed


def test_table_and_chart_can_be_made_again_from_the_log_alone(again, out):
    assert again.remade.startswith("# The time of a step")
    assert again.printed.endswith(again.remade)
    assert again.remade == (out / "table.md").read_text()
    assert (out / "steps.png").read_bytes().startswith(b"\x89PNG")


@needs_results
def test_the_kept_log_makes_the_kept_table(tmp_path, capsys):
    """Of earlier commits: what was measured stays readable."""
    kept = RESULTS / "step"
    shutil.copy(kept / "steps.jsonl", tmp_path)
    assert main(["bench", "step", "--table", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (kept / "table.md").read_text()


def test_the_newest_line_counts_with_its_own_baseline(measured, again):
    (fp32,) = (results for title, results in sections(measured.rows + again.rows) if "fp32" in title)
    first = next(row for row in measured.rows if row["contender"] == BASELINE)
    base, newest = again.rows[:2]
    assert (newest["contender"], base["contender"]) == ("torch-sgd", BASELINE)
    assert fp32["torch-sgd"].row is newest
    assert fp32["torch-sgd"].base is base
    assert base["batch"] == newest["batch"] != first["batch"]
    assert fp32["torch-muon"].base is first


def line(matrices: list[float], rest: list[float]) -> dict:
    return {"seconds": {"matrices": matrices, "rest": rest}}


def test_ratios_by_hand():
    """The middle of the ratios is not the ratio of the middles, and both are shown."""
    result = Result(line([1.0, 2.0, 9.0], [1.0, 2.0, 1.0]), line([1.0, 1.0, 4.0], [1.0, 3.0, 6.0]))
    assert result.seconds()["median"] == 4.0  # of 2, 4, 10
    assert result.paired()["median"] == 1.0  # of 2/2, 4/4, 10/10
    assert result.of_medians == 1.0
    assert result.paired("matrices")["median"] == 2.0  # of 1, 2, 9/4
    assert result.paired("matrices")["high"] == pytest.approx(statistics.median([2.0, 2.25]))
    assert result.seconds("rest")["median"] == 1.0
    skewed = Result(line([1.0, 4.0, 5.0], [0.0] * 3), line([1.0, 2.0, 1.0], [0.0] * 3))
    assert (skewed.paired()["median"], skewed.of_medians) == (2.0, 4.0)


def test_bytes_by_hand(measured):
    by_name = {row["contender"]: row for row in measured.rows}
    base, rule = by_name[BASELINE], by_name["rule"]
    stepped = stage.Tensors(TINY).halves
    sizes = {half: sum(p.numel() * 4 for p in params) for half, params in stepped.items()}
    for half in HALVES:
        counters = 4 * len(stepped[half])  # AdamW's numbers of steps
        assert base["state_bytes"][half] == 2 * sizes[half] + counters
        assert base["floor_bytes"][half] == 7 * sizes[half] + 2 * counters
        assert rule["state_bytes"][half] == sizes[half]
        assert rule["extra_bytes"][half] == Rule.extra
    assert rule["floor_bytes"] == {"matrices": 7 * sizes["matrices"], "rest": 5 * sizes["rest"]}
    assert rule["largest_bytes"] == {"matrices": 352 * 128 * 4, "rest": 4096 * 128 * 4}
    assert Result(rule, base).floor == pytest.approx(
        (7 * sizes["matrices"] + 5 * sizes["rest"]) / 7 / sum(sizes.values()), rel=1e-4
    )


def test_projections_are_read_and_low_bit_states_are_weighed():
    class Projector:
        def __init__(self):
            self.matrix = torch.zeros(10)

    optimizer = Rule([torch.nn.Parameter(torch.zeros(3))])
    p = optimizer.param_groups[0]["params"][0]
    optimizer.state[p] = {"projector": Projector(), "moments": [torch.zeros(2), torch.zeros(5)], "step": 3}
    assert rounds.state_bytes(optimizer) == (28, 40)


def test_every_parameter_must_move(measured):
    untouched = {row["contender"]: row.get("untouched") for row in measured.rows}
    assert (untouched["idle"], untouched[BASELINE]) == (len(stage.Tensors(TINY).all), 0)


def test_what_ours_do_wrong_is_our_fault(again):
    everything = len(stage.Tensors(TINY).all)
    assert again.code == 1
    assert f"idle-ours, llama-1m fp32: {everything} parameters left as they were" in again.errors
    assert "broken-ours, llama-1m bf16: RuntimeError: no such | kernel" in again.errors


def test_who_writes_into_gradients_spoils_nobody(measured):
    """1e30 in every step would be infinite in the second."""
    standing = {row["contender"]: row for row in measured.rows if "error" not in row}
    assert [name for name, row in standing.items() if row["writes_gradients"]] == ["scribbler"]
    assert all(row["finite"] for row in standing.values())


def test_in_bf16_every_parameter_is_seen_to_move(again):
    """SGD's steps of 1e-7, which bf16 rounds away nearly everywhere."""
    rows = [row for row in again.rows if row["dtype"] == "bfloat16"]
    assert [row["untouched"] for row in rows if row["contender"] in (BASELINE, "torch-sgd")] == [0, 0]


def test_stochastic_rounding_is_for_bf16(again):
    (row,) = (row for row in again.rows if row["contender"] == "apollo-mini-sr")
    assert row["dtype"] == "bfloat16"
    assert row["knobs"]["stochastic_rounding"] is True


def test_everybody_steps_once_a_round_and_the_first_changes():
    order: list[str] = []

    class Says(Rule):
        def step(self, closure=None):
            order.append(self.name)

    entries = [rounds.Entry(name, contender(Says)) for name in "abc"]
    for entry in entries:
        optimizer = Says([torch.nn.Parameter(torch.zeros(1))])
        optimizer.name = entry.name
        entry.optimizers = {"matrices": optimizer}
        entry.seconds = {"matrices": [], "rest": []}
    for number in range(3):
        rounds.one_round(entries, number, stage.Tensors(TINY), TINY.device, keep=False)
    assert "".join(order) == "abc" + "bca" + "cab"


def test_batches_fit_and_have_a_baseline_each():
    need = stage.Needs(100, {BASELINE: 50, "a": 30, "b": 30, "c": 10, "huge": 80})
    batches, refused = stage.in_batches(["a", "b", "huge", BASELINE, "c"], need, 200)
    assert batches == [[BASELINE, "a"], [BASELINE, "b", "c"]]
    assert list(refused) == ["huge"]
    assert stage.in_batches([BASELINE], need, 200) == ([[BASELINE]], {})
    assert stage.in_batches(["a", BASELINE], need, 140)[0] == []


def test_estimates_are_upper_bounds_of_the_real_states(measured):
    need = stage.needs(TINY, [BASELINE, *EAGER])
    rows = [row for row in measured.rows if row["contender"] in need.own]
    assert len(rows) == 1 + len(EAGER)
    for row in rows:
        # steps, seeds and the factors of embedding and head are small
        assert sum(row["state_bytes"].values()) <= need.own[row["contender"]] + 20_000


def test_what_does_not_fit_is_a_row(tmp_path):
    found = bench(tmp_path, "--dtypes float32 --memory 0.001", {"torch-sgd": CONTENDERS["torch-sgd"]})
    assert found.code == 0
    (row,) = found.rows
    assert row["error"].startswith("does not fit: needs 0.0")


def test_recompilations_are_counted(monkeypatch):
    """One for each value of a rate that is compiled in."""
    setting = replace(TINY, layers=1, dtype="bfloat16")
    monkeypatch.setattr(rounds, "can_compile", lambda _: True)  # loads the compiler; its own has none
    monkeypatch.setitem(CONTENDERS, "recompiler", contender(Recompiler, package="apollo-optim"))
    found = rounds.schedule("recompiler", setting, 4)
    assert found["graphs"] == 2
    assert found["recompiled"] >= 3
    row = {"contender": "recompiler", "size": "llama-1m", "dtype": "bfloat16", **found}
    assert "compiled after the first step" in command.at_fault([row])[0]


@pytest.mark.slow  # test_contract.py has it of every rule
def test_ours_are_not_compiled_again_under_a_schedule():
    setting = replace(TINY, layers=1, dtype="bfloat16")
    found = rounds.schedule("apollo-mini-sr", setting, 12)
    assert found["graphs"] > 0
    assert found["recompiled"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rounds 1", "--rounds 1: it must be at least 2"),
        ("--layers 0", "--layers 0: it must be at least 1"),
        ("--table", "there is no such log"),
        pytest.param(
            "--device cuda",
            "torch finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        command.main([*words.split(), "--out", str(tmp_path)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    found = bench(tmp_path, "--dtypes float32 --device cuda", {"apollo-mini": CONTENDERS["apollo-mini"]})
    assert found.code == 0
    assert all("gpu" in row["hardware"] and row["extra_bytes"] for row in found.rows)
