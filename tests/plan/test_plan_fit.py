"""What fits on a card is held to plans made one by one; a pace, to two times that lie on a line."""

import re

import pytest
import torch

from apollo_optim import build_optimizer
from apollo_optim.cli.main import main
from apollo_optim.core.errors import InputError
from apollo_optim.plan import Budget, Pace, Parallel, Traces, cards_for, fit, held_weights, trace_step
from apollo_optim.train.config import ModelConfig
from apollo_optim.train.loss import summed_loss
from apollo_optim.train.models import skeleton

SEQ = 64
MODEL = skeleton(ModelConfig("llama-1m", dtype="bfloat16"))
WEIGHTS = sum(p.numel() * 2 for p in MODEL.parameters())


@pytest.fixture(scope="module")
def traces() -> Traces:
    return Traces(lambda batch: trace_step(MODEL, summed_loss, batch, SEQ))


def budget_of(name: str, gpus: int = 1) -> Budget:
    parallel = Parallel("fsdp2", gpus) if gpus > 1 else None
    return Budget(MODEL, build_optimizer(name, MODEL), name=name, parallel=parallel)


@pytest.mark.parametrize("gpus", [1, 4])
def test_one_row_more_does_not_fit(traces: Traces, gpus: int) -> None:
    budget, heard = budget_of("adamw", gpus), list[tuple[int, int]]()
    limit = budget.at(traces.at(5)).total
    found = fit(budget, traces, limit, lambda rows, size: heard.append((rows, size)))
    assert found.batch == 5
    assert found.plan == budget.at(traces.at(5))
    assert budget.at(traces.at(6)).total > limit
    assert found.tokens(SEQ, gpus) == 5 * SEQ * gpus
    assert (5, limit) in heard
    assert len(heard) == len(dict(heard)), "none is looked at twice"


def test_of_what_does_not_fit_one_row_is_planned(traces: Traces) -> None:
    one = fit(budget_of("adamw"), traces, WEIGHTS)
    assert one.batch is None
    assert one.plan.batch == 1
    assert one.tokens(SEQ, 8) == 0


def test_weights_are_shared_by_as_many_cards_as_it_takes() -> None:
    assert held_weights(MODEL, 1) == WEIGHTS
    quarter = sum(p.chunk(4)[0].numel() * 2 for p in MODEL.parameters())
    assert held_weights(MODEL, 4) == quarter
    assert cards_for(MODEL, WEIGHTS) == 1
    assert cards_for(MODEL, quarter) == 4
    assert cards_for(MODEL, quarter - 1) == 8
    assert cards_for(MODEL, 1) is None


def test_a_pace_is_the_line_through_two_times() -> None:
    pace = Pace.of((400, 2.2), (100, 1.6))  # in any order
    assert pace == pytest.approx((1.4, 0.002))
    assert pace.seconds(1000) == pytest.approx(3.4)
    for second in ((100, 1.7), (200, 1.6), (200, 1.0), (200, torch.inf), (0, 1.0)):
        with pytest.raises(InputError):
            Pace.of((100, 1.6), second)


# --- the command ---


def run(*words: str) -> int:
    return main(["plan", "llama-1m", "--seq", str(SEQ), *words])


def cells(text: str, row: str) -> list[str]:
    found = re.search(rf"^│ {row} +│(.*)│$", text, re.MULTILINE)
    assert found, text
    return [cell.strip() for cell in found[1].split("│")]


def test_the_command_fits_sharded_cards(traces: Traces, capsys: pytest.CaptureFixture[str]) -> None:
    limit = budget_of("adamw", 8).at(traces.at(3)).total
    words = ["--optimizer", "adamw", "apollo-mini", "--gpus", "8", "--device", "cpu", "--pace", "64:1", "128:1.5"]
    assert run(*words, "--fit", f"{limit / 1e6}MB") == 0
    output = capsys.readouterr()
    assert "each of 8 GPUs by fsdp2" in " ".join(output.out.split())
    batches = [int(cell) for cell in cells(output.out, "largest micro-batch")]
    assert batches == [3, fit(budget_of("apollo-mini", 8), traces, limit).batch]
    assert cells(output.out, "tokens a step") == [f"{rows * SEQ * 8:,}" for rows in batches]
    assert cells(output.out, "tokens/s") == [f"{rows * SEQ * 8 / (0.5 + rows * 0.5):,.0f}" for rows in batches]
    assert "context" not in output.out.partition("┘")[0]
    assert re.search(r"^adamw: a micro-batch of 3 takes ", output.err, re.MULTILINE), "it takes a while, and says so"
    assert "apollo-mini: a micro-batch of 3 " not in output.err, "what was traced for another takes no time"


def test_a_card_is_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--optimizer", "adamw", "--fit", "570MB") == 0
    assert cells(capsys.readouterr().out, "context") == ["500.000"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fit 80GB --gpus 0", "--gpus 0: at least 1"),
        ("--fit lots", "--fit lots: give a size such as 24GB"),
        ("--fit 80GB --batch 4", "--fit SIZE finds the micro-batch"),
        ("--fit 80GB --memory 24GB", "--fit SIZE finds the micro-batch"),
        ("--pace 64:1 128:2", "--pace is for --fit"),
        ("--fit 80GB --pace 64:1 lots", "--pace 64:1 lots: give two times as TOKENS:SECONDS"),
        ("--fit 80GB --pace 64:1 64:2", "no cost of a token follows"),
        ("--fit 1MB", "the weights alone take 0.00251 GB of the card; they fit with --gpus 4 --parallel fsdp2"),
        ("--fit 1kB", "they fit with a card of more memory"),
        ("--fit 505MB --optimizer adamw", "one row takes 0.546 GB of the card with adamw; what would help: --release"),
    ],
)
def test_nonsense_gets_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
