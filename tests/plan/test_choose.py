"""Which optimizer for this memory: the best that fits, and why."""

import os
from typing import Any

import pytest
import torch
import yaml
from train_tiny import tiny

from apollo_optim import InputError
from apollo_optim.cli.plan import run
from apollo_optim.core.storage import nbytes
from apollo_optim.optim.describe import state_bytes
from apollo_optim.parallel.world import MEETING
from apollo_optim.plan import CANDIDATES, Moment, Plan
from apollo_optim.plan import choose as choose_for
from apollo_optim.train.choose import choose, free_memory, settled
from apollo_optim.train.config import RunConfig, check, load_config
from apollo_optim.train.loss import summed_loss
from apollo_optim.train.optimizer import make_optimizer
from apollo_optim.train.plan import model_of, planned
from apollo_optim.train.pretrain import pretrain

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}


def falling(cfg: RunConfig) -> Plan:
    """Plans of 50, 40, 30, 20 and 10 GB, in the order of the candidates."""
    place = [(c.name, c.bits) for c in CANDIDATES].index((cfg.optim.name, cfg.quant.bits))
    return Plan(cfg.optim.name, 1, [Moment("forward", {"weights": (5 - place) * 10**10})])


@pytest.mark.parametrize(("memory", "place"), [(1e12, 0), (50e9, 0), (49e9, 1), (35e9, 2), (20e9, 3), (10e9, 4)])
def test_the_best_that_fits_is_taken(memory: float, place: int) -> None:
    found, choice = choose(RunConfig(), memory, falling)
    assert (found.optim.name, found.quant.bits) == (CANDIDATES[place].name, CANDIDATES[place].bits)
    assert choice.chosen == CANDIDATES[place]
    assert [candidate for candidate, _ in choice.passed_over] == list(CANDIDATES[:place])
    assert choice.plan.total <= memory


def test_where_nothing_fits_it_is_said_what_would_help() -> None:
    cfg = RunConfig()
    with pytest.raises(InputError, match=r"nothing fits in 9 GB: .* takes 10 GB. .*train.release true, model.grad"):
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
        state = sum(nbytes(t) for t in model.parameters())
        state += sum(state_bytes(p, group) for group in optimizer.param_groups for p in group["params"])
        sizes.append(state)
        return Plan(cfg.optim.name, 1, [Moment("update", {"weights": state})])

    with pytest.raises(InputError, match="nothing fits"):
        choose(tiny(tmp_path, model={"config": WIDE, "dtype": "bfloat16"}), 1, plan_of)
    assert len(sizes) == len(CANDIDATES)
    assert sizes == sorted(sizes, reverse=True)


def test_a_model_of_ones_own_is_planned_as_the_runs_is(tmp_path: Any) -> None:
    """In the library: a model on the meta device and words for the memory, and not a byte of another plan."""
    cfg = tiny(tmp_path, model={"config": WIDE, "dtype": "bfloat16"}, train={"release": True, "loss": "auto"})
    model = model_of(cfg, 300)
    ways: dict[str, Any] = {
        "batch": 4,
        "seq": cfg.data.seq_len,
        "release": True,
        "loss": lambda *args: summed_loss(*args, how="auto"),
    }
    sizes: list[int] = []

    def plan_of(one: RunConfig) -> Plan:
        one.train.micro_batch = one.train.batch_size = 4
        sizes.append((found := planned(one, vocab_size=300)).total)
        return found

    with pytest.raises(InputError, match="nothing fits"):
        choose(cfg, 1, plan_of)
    for place, size in enumerate(sizes):
        choice = choose_for(model, size, **ways)
        assert (choice.chosen, choice.plan.total) == (CANDIDATES[place], size)
    assert not any(hasattr(p, "bits") for p in model.parameters()), "the model is left as it is"
    assert choose_for(model, "1 GB", **ways).chosen.name == "full"
    with pytest.raises(InputError, match=r"memory 12 gallons: give a size such as 24GB"):
        choose_for(model, "12 gallons")
    with pytest.raises(InputError, match=r"nothing fits in 0.001 GB: q-apollo-mini, .* help: release=True"):
        choose_for(model, "1MB")


def test_the_command_names_it_and_its_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["llama-1m", "--memory", "1GB", "--choose", "--model.config.num_hidden_layers", "1", "--batch", "2"]
    assert run(words) == 0
    told, _, section = capsys.readouterr().out.partition("# for a run file\n")
    assert "full: 0." in told
    assert "docs/race.md" in told
    said = yaml.safe_load(section)
    model = {"name": "llama-1m", "config": {"num_hidden_layers": 1}, "dtype": "bfloat16"}
    assert said == {"model": model, "train": {"batch_size": 2}, "optim": {"name": "full"}}
    assert "# lr 0.008, rest_lr 0.04, embedding_lr 0.32, norm_lr 0.02, momentum 0.8145\n" in section
    assert run([*words, "--release", "--seq", "8"]) == 0
    said = yaml.safe_load(capsys.readouterr().out.partition("# for a run file\n")[2])
    assert (said["train"], said["data"]) == ({"batch_size": 2, "release": True}, {"seq_len": 8})


def test_a_choice_needs_a_memory_and_leaves_the_rest_open() -> None:
    with pytest.raises(InputError, match=r"--choose needs .* --memory 24GB"):
        run(["llama-1m", "--choose"])
    for more in (["--optimizer", "adamw"], ["--bits", "8"]):
        with pytest.raises(InputError, match="--choose finds optimizer and bits itself"):
            run(["llama-1m", "--choose", "--memory", "1GB", *more])


def test_what_cannot_be_chosen_for_is_said() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("llama-7b", "24GB"), {}, r"choose\(model, memory\): the model comes first"),
        ((model, 24), {}, r'memory 24: a number is bytes, and that is no model\'s: write "24GB"'),
        ((model, None), {}, "memory None: give a size"),
        ((model, "24G"), {"batch": 0}, "batch=0: a whole number, at least 1"),
        ((model, "24G"), {"seq": 1.5}, "seq=1.5: a whole number"),
        ((model, "24G"), {}, r"Sequential.forward takes \(input\), not input_ids and labels: say loss="),
        ((model, "24G"), {"device": "gpu", "loss": lambda m, x, y: m(torch.zeros(1, 8)).sum()}, "device='gpu': a plan"),
    ]
    for words, more, told in wrong:
        with pytest.raises(InputError, match=told):
            choose_for(*words, **more)
    with pytest.raises(InputError, match="no parameter of this model is trained"):
        choose_for(model.requires_grad_(False), "24G")


def test_a_gpu_is_planned_by_any_of_its_names(tmp_path: Any) -> None:
    model = model_of(tiny(tmp_path, model={"dtype": "bfloat16"}), 300)
    totals = [choose_for(model, "9GB", batch=1, seq=8, device=name).plan.total for name in ("cuda", "cuda:1", "cpu")]
    assert totals[0] == totals[1] > totals[2]


def test_rows_of_a_named_model(capsys: pytest.CaptureFixture[str]) -> None:
    several = ["--train.batch_size=8", "--train.micro_batch=2"]
    for words, rows in (([], 1), (["--train.micro_batch", "4"], 4), (["--batch", "3"], 3), (several, 2)):
        assert run(["llama-1m", "--optimizer", "nano", *words]) == 0
        assert f"micro-batch {rows} x 256 tokens" in capsys.readouterr().out


def test_auto_is_the_best_that_fits_in_what_is_free(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("apollo_optim.train.choose.free_memory", lambda device: 33e9)
    cfg = tiny(tmp_path, optim={**dict.fromkeys(tiny(tmp_path).optim.flat()), "name": "auto", "seed": 3})
    found = settled(cfg, False, falling)
    assert (found.optim.name, found.quant.bits, found.optim.seed) == ("lite", 8, 3)
    assert (
        "optimizer: lite, weights of 8 bits, a plan of 30.00 GB where 33.0 are free: 1 % below its perplexity"
        in capsys.readouterr().out
    )
    assert settled(found, False) is found
    monkeypatch.setattr("apollo_optim.train.choose.free_memory", lambda device: 19e9)
    assert settled(cfg, False, falling).quant.bits == 4
    assert "q-apollo-mini, weights of 4 bits, a plan of 10.00 GB" in capsys.readouterr().out


def test_auto_trains_and_goes_on_with_what_it_chose(tmp_path: Any) -> None:
    nothing = {**dict.fromkeys(tiny(tmp_path).optim.flat()), "name": "auto"}
    cfg = tiny(tmp_path, optim=nothing, train={"steps": 2})
    pretrain(cfg)
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert kept.optim.name == "full"
    assert pretrain(cfg, resume=True).step == 2


def test_auto_is_said_to_be_for_one_process_without_knobs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = RunConfig()
    cfg.optim.name, cfg.optim.lr, cfg.quant.bits = "auto", 0.1, 8
    with pytest.raises(InputError, match=r"its own rates, knobs and bits: leave optim\.lr, quant\.bits out"):
        settled(cfg, False)
    cfg.optim.lr = cfg.quant.bits = None
    with pytest.raises(InputError, match="name the run to go on with"):
        settled(cfg, True)
    with pytest.raises(InputError, match="how much memory is free on meta is not known"):
        free_memory(torch.device("meta"))
    for name, value in zip(MEETING, ("0", "2", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="is for one process"):
        settled(cfg, False)


def test_free_memory_is_no_more_than_there_is() -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory(torch.device("cpu")) < there
