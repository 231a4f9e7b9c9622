"""Which optimizer for this memory: the best that fits, and why."""

from typing import Any

import pytest
import yaml
from train_tiny import tiny

from apollo_optim import InputError
from apollo_optim.cli.plan import run
from apollo_optim.optim.describe import state_bytes
from apollo_optim.plan import Moment, Plan
from apollo_optim.train.choose import CANDIDATES, choose
from apollo_optim.train.config import RunConfig, check
from apollo_optim.train.optimizer import make_optimizer
from apollo_optim.train.plan import model_of


def falling(cfg: RunConfig) -> Plan:
    """Plans of 40, 30, 20 and 10 GB, in the order of the candidates."""
    place = [(c.name, c.bits) for c in CANDIDATES].index((cfg.optim.name, cfg.quant.bits))
    return Plan(cfg.optim.name, 1, [Moment("forward", {"weights": (4 - place) * 10**10})])


@pytest.mark.parametrize(("memory", "place"), [(1e12, 0), (40e9, 0), (39e9, 1), (25e9, 2), (10e9, 3)])
def test_the_best_that_fits_is_taken(memory: float, place: int) -> None:
    choice = choose(RunConfig(), memory, falling)
    assert (choice.cfg.optim.name, choice.cfg.quant.bits) == (CANDIDATES[place].name, CANDIDATES[place].bits)
    assert choice.why == CANDIDATES[place].why
    assert [plan.optimizer for plan in choice.passed_over] == [c.name for c in CANDIDATES[:place]]
    assert choice.plan.total <= memory


def test_where_nothing_fits_it_is_said_what_would_help() -> None:
    cfg = RunConfig()
    with pytest.raises(InputError, match=r"nothing fits in 9.0 GB: .* takes 10.0 GB. .*train.release true, model.grad"):
        choose(cfg, 9e9, falling)
    cfg.train.release = cfg.model.gradient_checkpointing = True
    with pytest.raises(InputError, match=r"What would help: a smaller train\.micro_batch or data\.seq_len"):
        choose(cfg, 9e9, falling)


def test_every_candidate_is_a_run_and_takes_less_state_than_the_one_before(tmp_path: Any) -> None:
    sizes: list[int] = []

    def plan_of(cfg: RunConfig) -> Plan:
        check(cfg)
        model = model_of(cfg, 300)
        optimizer = make_optimizer(cfg.optim, model)
        state = sum(t.nbytes for t in model.parameters())
        state += sum(state_bytes(p, group) for group in optimizer.param_groups for p in group["params"])
        sizes.append(state)
        return Plan(cfg.optim.name, 1, [Moment("update", {"weights": state})])

    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    with pytest.raises(InputError, match="nothing fits"):
        choose(tiny(tmp_path, model={"config": wide, "dtype": "bfloat16"}), 1, plan_of)
    assert len(sizes) == len(CANDIDATES)
    assert sizes == sorted(sizes, reverse=True)


def test_the_command_names_it_and_its_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["llama-1m", "--memory", "1GB", "--choose", "--model.config.num_hidden_layers", "1", "--batch", "16"]
    assert run(words) == 0
    told, _, section = capsys.readouterr().out.partition("# for a run file\n")
    assert "muon+adamw8bit: 0." in told
    assert "docs/race.md" in told
    optim = yaml.safe_load(section)["optim"]
    assert (optim["name"], optim["state_dtype"], optim["lr"], optim["momentum"]) == (
        "muon+adamw8bit", "8bit", 0.008, 0.8145,
    )  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--memory", "1GB", "--optimizer", "adamw"], ["--memory", "1GB", "--bits", "8"]])
def test_a_choice_needs_a_memory_and_leaves_the_rest_open(more: list[str]) -> None:
    with pytest.raises(InputError, match="--choose needs --memory 24GB"):
        run(["llama-1m", "--choose", *more])
