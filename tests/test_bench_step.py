"""The bench of a step: its figures are what they say they are, and nobody is left out in silence."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from apollo_optim import ApolloMini
from apollo_optim.bench import step
from apollo_optim.bench.contenders import BASELINE, CONTENDERS, Contender, Halves, ours
from apollo_optim.bench.step_table import HALVES, Result, sections
from apollo_optim.cli.main import main
from apollo_optim.core.errors import InputError

TINY = step.Setting("llama-1m", "float32", 1, 4, torch.device("cpu"))
QUICK = "bench step --sizes llama-1m --layers 1 --rank 4 --dtypes float32 --rounds 3 --warmup 1 --schedule-steps 0"


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


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the bench with these contenders beside the baseline; its exit code and the lines of its log."""

    def run(words: str = "", **contenders: Contender) -> tuple[int, list[dict]]:
        for name, one in contenders.items():
            monkeypatch.setitem(CONTENDERS, name.replace("_", "-"), one)
        names = [name.replace("_", "-") for name in contenders]
        code = main([*QUICK.split(), "--out", str(tmp_path), "--contenders", *names, *words.split()])
        return code, [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]

    return run


def test_everybody_is_in_log_table_and_chart(quick, tmp_path, capsys):
    code, rows = quick(
        apollo_mini_eager=CONTENDERS["apollo-mini-eager"],
        torch_sgd=CONTENDERS["torch-sgd"],
        absent=contender(Rule, package="no-such-package"),
        broken=contender(Broken),
        late=contender(Late),
    )
    assert code == 0, "what peers do wrong is no fault of ours"
    by_name = {row["contender"]: row for row in rows}
    assert list(by_name) == ["absent", BASELINE, "apollo-mini-eager", "torch-sgd", "broken", "late"]
    assert by_name["absent"]["error"] == "not installed"
    assert by_name["broken"]["error"] == "RuntimeError: no such | kernel"
    assert by_name["late"]["error"] == "RuntimeError: the third step"
    row = by_name["apollo-mini-eager"]
    assert {half: len(times) for half, times in row["seconds"].items()} == {"matrices": 3, "rest": 3}
    assert row["versions"]["torch"] == torch.__version__
    assert row["hardware"]["threads"] == torch.get_num_threads()
    assert (row["rank"], by_name["torch-sgd"]["rank"]) == (1, None)
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "llama-1m, fp32, CUT TO 1 OF 2 LAYERS" in text
    assert "| broken | a test's | RuntimeError: no such / kernel |" in text
    assert "| absent | a test's | not installed |" in text
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_can_be_made_again_from_the_log_alone(quick, tmp_path, capsys):
    quick(torch_sgd=CONTENDERS["torch-sgd"])
    text = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").unlink()
    (tmp_path / "steps.png").unlink()
    capsys.readouterr()
    assert main(["bench", "step", "--table", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == text == (tmp_path / "table.md").read_text()
    assert (tmp_path / "steps.png").exists()


def test_the_newest_line_counts_with_its_own_baseline(quick):
    quick(torch_sgd=CONTENDERS["torch-sgd"])
    _, rows = quick(torch_sgd=CONTENDERS["torch-sgd"])
    ((_, results),) = sections(rows)
    newest, base = rows[-1], rows[-2]
    assert (newest["contender"], base["contender"]) == ("torch-sgd", BASELINE)
    assert results["torch-sgd"].row is newest
    assert results["torch-sgd"].base is base
    assert base["batch"] == newest["batch"] != rows[0]["batch"]


def line(matrices: list[float], rest: list[float]) -> dict:
    return {"seconds": {"matrices": matrices, "rest": rest}}


def test_ratios_by_hand():
    """The middle of the ratios is not the ratio of the middles, and both are shown."""
    result = Result(line([1.0, 2.0, 9.0], [1.0, 2.0, 1.0]), line([1.0, 1.0, 4.0], [1.0, 3.0, 6.0]))
    assert result.seconds().median == 4.0  # of 2, 4, 10
    assert result.paired().median == 1.0  # of 2/2, 4/4, 10/10
    assert result.of_medians == 1.0
    assert result.paired("matrices").median == 2.0  # of 1, 2, 9/4
    assert result.paired("matrices").high == pytest.approx(statistics.median([2.0, 2.25]))
    assert result.seconds("rest").median == 1.0
    skewed = Result(line([1.0, 4.0, 5.0], [0.0] * 3), line([1.0, 2.0, 1.0], [0.0] * 3))
    assert (skewed.paired().median, skewed.of_medians) == (2.0, 4.0)


def test_bytes_by_hand(quick):
    _, rows = quick(rule=contender(Rule, reads=(3, 1)))
    base, rule = rows
    sizes = {half: sum(p.numel() * 4 for p in params) for half, params in step.Tensors(TINY).halves.items()}
    tensors = {half: len(params) for half, params in step.Tensors(TINY).halves.items()}
    for half in HALVES:
        counters = 4 * tensors[half]  # AdamW's numbers of steps
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
    assert step.state_bytes(optimizer) == (28, 40)


def test_every_parameter_must_move(quick, capsys):
    code, rows = quick(idle=contender(Idle))
    everything = len(step.Tensors(TINY).all)
    assert (code, rows[-1]["untouched"], rows[0]["untouched"]) == (0, everything, 0)
    code, _ = quick(idle=contender(Idle, package="apollo-optim"))
    assert code == 1
    assert f"idle, llama-1m fp32: {everything} parameters left as they were" in capsys.readouterr().err


def test_a_crash_of_ours_is_our_fault(quick, capsys):
    code, rows = quick(broken=contender(Broken, package="apollo-optim"))
    assert code == 1
    assert rows[-1]["error"] in capsys.readouterr().err


def test_who_writes_into_gradients_spoils_nobody(quick):
    """1e30 in every step would be infinite in the second."""
    _, rows = quick(scribbler=contender(Scribbler), rule=contender(Rule))
    by_name = {row["contender"]: row for row in rows}
    assert by_name["scribbler"]["writes_gradients"]
    assert not by_name["rule"]["writes_gradients"]
    assert all(row["finite"] for row in rows)


def test_in_bf16_every_parameter_is_seen_to_move(quick):
    """SGD's steps of 1e-7, which bf16 rounds away nearly everywhere."""
    _, rows = quick("--dtypes bfloat16", torch_sgd=CONTENDERS["torch-sgd"])
    assert [row["untouched"] for row in rows] == [0, 0]


def test_stochastic_rounding_is_for_bf16(quick):
    _, rows = quick("--dtypes float32 bfloat16", apollo_mini_sr=replace(CONTENDERS["apollo-mini-sr"], halves=EAGER_SR))
    assert [row["dtype"] for row in rows if row["contender"] == "apollo-mini-sr"] == ["bfloat16"]
    assert rows[-1]["knobs"]["stochastic_rounding"] is True


EAGER_SR = ours(ApolloMini, compile=False, stochastic_rounding=True)


def test_everybody_steps_once_a_round_and_the_first_changes():
    order: list[str] = []

    class Says(Rule):
        def step(self, closure=None):
            order.append(self.name)

    entries = [step.Entry(name, contender(Says)) for name in "abc"]
    for entry in entries:
        optimizer = Says([torch.nn.Parameter(torch.zeros(1))])
        optimizer.name = entry.name
        entry.optimizers = {"matrices": optimizer}
        entry.seconds = {"matrices": [], "rest": []}
    for number in range(3):
        step.one_round(entries, number, step.Tensors(TINY), TINY.device, keep=False)
    assert "".join(order) == "abc" + "bca" + "cab"


def test_batches_fit_and_have_a_baseline_each():
    need = step.Needs(100, {BASELINE: 50, "a": 30, "b": 30, "c": 10, "huge": 80})
    batches, refused = step.in_batches(["a", "b", "huge", BASELINE, "c"], need, 200)
    assert batches == [[BASELINE, "a"], [BASELINE, "b", "c"]]
    assert list(refused) == ["huge"]
    assert step.in_batches([BASELINE], need, 200) == ([[BASELINE]], {})
    assert step.in_batches(["a", BASELINE], need, 140)[0] == []


def test_estimates_are_upper_bounds_of_the_real_states(quick):
    names = ("apollo-sketch-eager", "apollo-mini-eager", "torch-adamw", "torch-muon", "torch-sgd", "torch-adafactor")
    _, rows = quick(**{name.replace("-", "_"): CONTENDERS[name] for name in names})
    need = step.needs(TINY, [BASELINE, *names])
    for row in rows:
        # steps, seeds and the factors of embedding and head are small
        assert sum(row["state_bytes"].values()) <= need.own[row["contender"]] + 20_000


def test_what_does_not_fit_is_a_row(quick):
    code, rows = quick("--memory 0.001", torch_sgd=CONTENDERS["torch-sgd"])
    assert code == 0
    (row,) = rows
    assert row["error"].startswith("does not fit: needs 0.0")


def test_recompilations_are_counted(monkeypatch):
    """One for each value of a rate that is compiled in."""
    setting = replace(TINY, layers=1, dtype="bfloat16")
    monkeypatch.setitem(CONTENDERS, "recompiler", contender(Recompiler, package="apollo-optim"))
    found = step.schedule("recompiler", setting, 4)
    assert found["graphs"] == 2
    assert found["recompiled"] >= 3
    row = {"contender": "recompiler", "size": "llama-1m", "dtype": "bfloat16", **found}
    assert "compiled after the first step" in step.at_fault([row])[0]


@pytest.mark.slow  # test_contract.py has it of every rule
def test_ours_are_not_compiled_again_under_a_schedule():
    setting = replace(TINY, layers=1, dtype="bfloat16")
    found = step.schedule("apollo-mini-sr", setting, 12)
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
        step.main([*words.split(), "--out", str(tmp_path)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(quick):
    code, rows = quick("--device cuda", apollo_mini=CONTENDERS["apollo-mini"])
    assert code == 0
    assert all("gpu" in row["hardware"] and row["extra_bytes"] for row in rows)
