"""Plans are held to what really happens: real bytes after a real step, the allocator's own events, the real shards."""

import contextlib
import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch
from registered import COMPOSED
from torch import nn

from apollo_optim import build_optimizer, list_optimizers
from apollo_optim.cli import plan as command
from apollo_optim.cli import tables
from apollo_optim.cli.main import main
from apollo_optim.core import blocks
from apollo_optim.core.codecs import SCALE
from apollo_optim.core.errors import InputError
from apollo_optim.core.matrix import is_wide
from apollo_optim.core.storage import parts
from apollo_optim.optim.parameter import chosen_rule, init_state, static_of
from apollo_optim.plan import (
    PARTS,
    Budget,
    Parallel,
    Plan,
    Trace,
    Traces,
    budget,
    largest_batch,
    plan,
    trace_step,
)
from apollo_optim.plan.draw import draw, followed_rows, table_rows
from apollo_optim.plan.shards import first_part, mesh_of, units
from apollo_optim.plan.trace import most_alive
from apollo_optim.quant import products
from apollo_optim.train import chunked, measure
from apollo_optim.train.config import DataConfig, ModelConfig, OptimConfig, QuantConfig, RunConfig, TrainConfig
from apollo_optim.train.loss import summed_loss
from apollo_optim.train.models import build_model, low_bit, skeleton
from apollo_optim.train.plan import model_of, planned, trace_of

NAMES = [info.name for info in list_optimizers()]
every_optimizer = pytest.mark.parametrize("name", NAMES)
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
SHORT = {*(("float32", name) for name in NAMES), ("bfloat16", "apollo"), ("bfloat16", "q-apollo")}
each_in_float32 = pytest.mark.parametrize(  # and two of them in bfloat16
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[pytest.mark.slow] * (name in COMPOSED or (dtype, name) not in SHORT))
        for dtype in ("float32", "bfloat16")
        for name in NAMES
    ],
)
ROWS, SEQ = 2, 64
BITS = {info.name: info.bits for info in list_optimizers()}
SMALL = ModelConfig("llama-1m")


def run_of(name: str, dtype: str = "float32", **changes: object) -> RunConfig:
    """A run of this optimizer, with the weights that it is for."""
    model = dataclasses.replace(SMALL, dtype=dtype, **changes)
    return RunConfig(model=model, data=DataConfig(seq_len=SEQ), optim=OptimConfig(name))


@functools.cache
def traced(bits: int | None, dtype: str = "float32") -> Trace:
    name = next(name for name in NAMES if BITS[name] == bits)
    return trace_step(model_of(run_of(name, dtype)), summed_loss, ROWS, SEQ)


@functools.cache
def plan_of(name: str, dtype: str = "float32", **ways: object) -> Plan:
    return plan(model_of(run_of(name, dtype)), name, traced(BITS[name], dtype), **ways)


def real_of(name: str, dtype: str = "float32", **changes: object) -> torch.nn.Module:
    cfg = run_of(name, dtype, **changes)
    return build_model(cfg.model, quant=low_bit(cfg)).train()


def rows(batch: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(batch, SEQ, dtype=torch.int64)
    return ids, torch.zeros_like(ids)


def at(one: Plan, when: str) -> dict[str, int]:
    return next(moment.rows for moment in one.moments if moment.when.startswith(when))


@each_in_float32
def test_planned_bytes_are_the_real_ones_after_a_real_step(name: str, dtype: str) -> None:
    one = plan_of(name, dtype)
    model = real_of(name, dtype)
    optimizer = build_optimizer(name, model)
    summed_loss(model, *rows()).backward()
    gradients = measure.memory(model, optimizer)["gradients"]
    optimizer.step()
    real = measure.memory(model, optimizer)
    assert one.rows["weights"] == real["weights"]
    assert one.rows["state, matrices"] + one.rows["state, rest"] == real["optimizer"]
    assert at(one, "update")["gradients"] == gradients
    matrices = {p for group in optimizer.param_groups if group["name"] == "matrices" for p in group["params"]}
    kept = [t for p in matrices for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    assert one.rows["state, matrices"] == measure.tensor_bytes(kept)
    assert one.rows["buffers"] == measure.tensor_bytes(model.buffers())


def allocated(step: object) -> int:
    """The most bytes that the CPU allocator had given out at once, from its own events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()  # type: ignore[operator]
    events = [(e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize("name", ["apollo", "q-apollo"])
@both_dtypes
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_forward_and_backward_take_what_the_allocator_gives(name: str, dtype: str, checkpointing: bool) -> None:
    bare = model_of(run_of(name, dtype, gradient_checkpointing=checkpointing))
    model = real_of(name, dtype, gradient_checkpointing=checkpointing)
    trace = trace_step(bare, summed_loss, ROWS, SEQ)
    kept = [b._replace(died=trace.end + 2) if b.kind == "gradients" else b for b in trace.blocks]
    expected = most_alive(kept)

    def step() -> None:
        summed_loss(model, *rows()).backward()

    step()
    model.zero_grad(set_to_none=True)
    real = allocated(step)
    # Checkpoints keep the state of the random generator, which is no tensor of the model: 5 kB a layer.
    slack = 5056 * 2 if checkpointing else 0
    assert expected <= real <= expected + slack
    if not checkpointing:  # gradients that are freed at once, as the step inside backward does it
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        assert allocated(step) == most_alive(trace.blocks)


@both_dtypes
def test_products_in_blocks_take_what_the_allocator_gives(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PRODUCT_BLOCK", 1 << 14)
    trace = trace_step(model_of(run_of("q-apollo", dtype)), summed_loss, ROWS, SEQ)
    sizes = {block.size for block in trace.blocks if block.kind == "float copies"}
    assert (1 << 14) * (4 if dtype == "float32" else 2) in sizes
    model = real_of("q-apollo", dtype)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    assert allocated(lambda: summed_loss(model, *rows()).backward()) == most_alive(trace.blocks)


@pytest.mark.parametrize("name", ["apollo", "q-apollo"])
@both_dtypes
def test_a_loss_without_logits_takes_what_the_allocator_gives(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "LOGITS", 1 << 16)
    cfg = dataclasses.replace(run_of(name, dtype), quant=QuantConfig(targets=["attn", "mlp", "lm_head"]))
    whole = dataclasses.replace(cfg, train=TrainConfig(loss="full"))
    trace, full = (trace_of(one, model_of(one), ROWS) for one in (cfg, whole))
    assert {block.kind for block in full.blocks} - {block.kind for block in trace.blocks} == {"logits"}
    assert most_alive(trace.blocks) < most_alive(full.blocks) - ROWS * SEQ * 4096 * 4
    model = build_model(cfg.model, quant=low_bit(cfg)).train()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    assert allocated(lambda: summed_loss(model, *rows()).backward()) == most_alive(trace.blocks)


@pytest.mark.parametrize("rest", ["adamw", "adamw8bit", "adafactor", "scale", "apollo"])
def test_an_update_is_planned_by_a_few_of_its_blocks(rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPU_BLOCK", "BLOCK"):
        monkeypatch.setattr(blocks, name, 1 << 11)
    small = {"vocab_size": 512, "num_hidden_layers": 1}
    model, made = model_of(run_of("apollo", "bfloat16", config=small)), []
    monkeypatch.setattr(budget, "most_alive", lambda found: made.append(len(found)) or most_alive(found))

    def updates() -> tuple[dict[str, int], int]:
        made.clear()
        return budget._updates(build_optimizer("apollo", model, compile=False, rest=rest), model), sum(made)

    few, operations = updates()
    monkeypatch.setattr(budget, "few_blocks", contextlib.nullcontext)
    every, most = updates()
    assert few == every
    assert 2 * operations < most


@each_in_float32
def test_the_update_takes_what_the_allocator_gives(name: str, dtype: str) -> None:
    one = plan_of(name, dtype)
    model = real_of(name, dtype)
    optimizer = build_optimizer(name, model, compile=False)  # as planned; compiled it takes less
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        real = allocated(optimizer.step)
    planned_update = at(one, "update")["update"]
    assert real == pytest.approx(planned_update, abs=64)  # a few scalars are freed a moment later


@every_optimizer
def test_parts_add_up_to_the_total_and_release_takes_less(name: str) -> None:
    ways = {
        "kept": plan_of(name),
        "released": plan_of(name, release=True),
        "accumulated": plan_of(name, accumulate=True),
    }
    sizes = [p.numel() * 4 for p in model_of(run_of(name)).parameters()]
    every = sum(sizes)
    for one in ways.values():
        for moment in one.moments:
            assert moment.rows.keys() == PARTS.keys()
            assert all(size >= 0 for size in moment.rows.values())
            assert sum(moment.rows.values()) == moment.total <= one.total
        assert one.total == sum(one.rows.values())
    assert ways["kept"].most["gradients"] == ways["accumulated"].most["gradients"] == every
    assert at(ways["accumulated"], "forward")["gradients"] == every
    assert ways["released"].most["gradients"] == max(sizes)
    assert ways["released"].total <= ways["kept"].total <= ways["accumulated"].total


def test_the_largest_batch_is_the_largest() -> None:
    model = skeleton(SMALL)
    traces = Traces(lambda batch: trace_step(model, summed_loss, batch, SEQ))
    budgets = [Budget(model, build_optimizer(name, model), name=name) for name in ("adamw", "apollo")]
    limit = budgets[0].at(traces.make(23)).total
    assert largest_batch(budgets[0], traces, limit) == 23
    assert len(traces.made) <= 6, "a line leads there, not a walk"
    assert largest_batch(budgets[0], traces, limit - 1) == 22
    more = largest_batch(budgets[1], traces, limit)
    assert more is not None
    assert budgets[1].at(traces.make(more)).total <= limit < budgets[1].at(traces.make(more + 1)).total
    assert len(traces.made) <= 9, "what was traced serves the next optimizer"
    assert largest_batch(budgets[0], traces, 1000) is None


def test_the_largest_batch_of_what_is_not_linear() -> None:
    """A loss in as many pieces as fit bends the line."""

    def pieces(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cut = (ids[:4], labels[:4]), (ids[4:], labels[4:])
        return sum((summed_loss(model, *piece) for piece in cut if len(piece[0])), torch.zeros(()))

    model = skeleton(SMALL)
    traces = Traces(lambda batch: trace_step(model, pieces, batch, SEQ))
    budget = Budget(model, build_optimizer("adamw", model), name="adamw")
    for batch in (1, 3, 4, 6):
        limit = budget.at(traces.make(batch)).total
        assert limit < budget.at(traces.make(batch + 1)).total
        assert largest_batch(budget, traces, limit) == batch


@pytest.mark.parametrize("gpus", [3, 1000])
@pytest.mark.parametrize("name", [name for name in NAMES if not BITS[name]])
def test_fsdp2_keeps_the_first_chunk(name: str, gpus: int) -> None:
    """`fully_shard` splits as `torch.chunk` does; the state of a wide matrix is split by its columns, the channels."""
    one, model = plan_of(name, parallel=Parallel("fsdp2", gpus)), skeleton(SMALL)
    weights = sum(p.chunk(gpus)[0].numel() * 4 for p in model.parameters())
    assert one.rows["weights"] == weights == at(one, "update")["gradients"]
    optimizer, state = build_optimizer(name, model), 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            static = static_of(p, group, chosen_rule(p, group))
            whole = {
                key for name, stored in static.slots if stored.slot.split == "whole" for key in (name, name + SCALE)
            }
            for key, t in init_state(p, group).items():
                if isinstance(t, torch.Tensor):
                    # A wide matrix is seen transposed: then its rows are columns.
                    across = key == "exp_avg_sq_col" and chosen_rule(p, group).view == "channels" and is_wide(p.shape)
                    part = t.chunk(gpus, -1 if across else 0)[0] if t.ndim and key not in whole else t
                    state += part.numel() * t.element_size()
    assert one.rows["state, matrices"] + one.rows["state, rest"] == state
    assert at(one, "update")["parallel"] == 0 < at(one, "forward")["parallel"]
    released = plan_of(name, parallel=Parallel("fsdp2", gpus), release=True)
    assert at(released, "update")["gradients"] < weights


def test_uneven_shards_are_what_fully_shard_makes() -> None:
    p = nn.Parameter(torch.empty(10, 3, device="meta"))
    assert [first_part(p, mesh_of(n)).to_local().shape[0] for n in (1, 2, 3, 4, 6, 16)] == [10, 5, 4, 3, 2, 1]
    assert first_part(p, mesh_of(4)).shape == (10, 3)


def test_what_fsdp2_gathers_are_the_blocks_and_what_is_around_them() -> None:
    around = (2 * 4096 * 128 + 128) * 4
    block = (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128) * 4
    assert units(skeleton(SMALL)) == (around, block)


def test_ddp_keeps_the_gradients_and_without_views_a_copy() -> None:
    alone, accumulating = plan_of("apollo"), plan_of("apollo", accumulate=True)
    view = plan_of("apollo", parallel=Parallel("ddp", 8))
    copies = plan_of("apollo", parallel=Parallel("ddp", 8, bucket_view=False))
    assert view.total == accumulating.total
    assert copies.total - alone.total == sum(p.numel() * 4 for p in skeleton(SMALL).parameters())
    with pytest.raises(InputError, match="release with ddp"):
        plan_of("apollo", release=True, parallel=Parallel("ddp", 8))


def test_low_bit_weights_have_a_float_copy_of_one_matrix_while_it_is_read() -> None:
    low, plain = plan_of("q-apollo-mini", "bfloat16"), plan_of("apollo-mini", "bfloat16")
    copies = [block for block in traced(8, "bfloat16").blocks if block.kind == "float copies"]
    widths = (128, 352, 384)  # of 128 x 352, rows are stored in whole groups
    assert {block.size for block in copies} == {128 * width * 2 for width in widths}
    assert most_alive(copies) == 128 * 384 * 2
    assert not any(block.kind == "float copies" for block in traced(None, "bfloat16").blocks)
    assert low.rows["state, matrices"] == plain.rows["state, matrices"]
    assert low.rows["weights"] < plain.rows["weights"]


@pytest.mark.parametrize("gpus", [2, 3])
def test_low_bit_weights_are_cut_and_gathered_in_the_form_that_they_are_stored_in(gpus: int) -> None:
    low, plain = (plan_of(name, parallel=Parallel("fsdp2", gpus)) for name in ("q-apollo-mini", "apollo-mini"))
    model = model_of(run_of("q-apollo-mini"))
    stored = {name: parts(p) for name, p in model.named_parameters()}
    assert sum(len(each) > 1 for each in stored.values()) == 14
    rows = [t.chunk(gpus)[0] for each in stored.values() for t in each.values()]
    assert low.rows["weights"] == sum(t.numel() * t.element_size() for t in rows)
    assert low.rows["state, matrices"] == plain.rows["state, matrices"]
    block = units(skeleton(SMALL))[1] - units(model)[1]
    assert block > 0
    forward, backward = ([at(it, when)["parallel"] for it in (low, plain)] for when in ("forward", "backward"))
    assert forward[1] - forward[0] == 2 * block == backward[1] - backward[0]
    assert at(low, "update")["gradients"] == at(plain, "update")["gradients"]


def test_a_run_is_planned_as_its_file_says() -> None:
    cfg = RunConfig(
        model=ModelConfig("llama-1m", dtype="bfloat16"),
        data=DataConfig(seq_len=SEQ),
        optim=OptimConfig("apollo", knobs={"rank": 8}),
        train=TrainConfig(batch_size=4, micro_batch=2),
    )
    one = planned(cfg)
    assert (one.optimizer, one.batch) == ("apollo", 2)
    assert at(one, "forward")["gradients"] > 0, "two micro-batches: the first one's gradients are there"
    small = cfg.optim.changed(rank=4)
    less = planned(dataclasses.replace(cfg, optim=small)).rows["state, matrices"]
    assert less < one.rows["state, matrices"]
    assert planned(cfg, vocab_size=512).rows["weights"] == one.rows["weights"] - 2 * (4096 - 512) * 128 * 2


def test_a_model_with_memory_is_refused() -> None:
    model = nn.Sequential()
    model.mlp = nn.Linear(4, 4)
    with pytest.raises(InputError, match="must be on the meta device"):
        plan(model, "adamw", traced(None), targets="mlp")
    with pytest.raises(InputError, match="must be on the meta device"):
        trace_step(model, summed_loss, 1, 4)


# --- the command ---


def run(*words: str) -> int:
    return main(["plan", *words, "--seq", str(SEQ)])


def test_every_registered_optimizer_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("llama-1m", "--release", "--checkpointing") == 0
    text = capsys.readouterr().out
    for word in (*NAMES, "weights", "gradients", "state, matrices", "state, rest", "total", "smallest card", "8 GB"):
        assert word in text
    assert "largest micro-batch" not in text
    assert "step inside backward, activations recomputed" in " ".join(text.split())


def test_the_command_finds_the_largest_batch(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(run_of("adamw", "bfloat16"))
    limit = plan(model, "adamw", trace_step(model, summed_loss, 4, SEQ)).total
    assert run("llama-1m", "--optimizer", "adamw", "--memory", f"{limit / 1e6}MB") == 0
    assert re.search(r"largest micro-batch │ +4 │", capsys.readouterr().out)


def test_a_run_file_a_model_and_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: llama-1m}\noptim: {name: apollo, rank: 4}\ntrain: {batch_size: 4, micro_batch: 2}\n")
    assert run(str(file), "--optimizer", "apollo", "adamw", "--out", str(tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert f"micro-batch 2 x {SEQ} tokens" in " ".join(text.split())
    assert "apollo-mini" not in text
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "plan.html").read_text()
    assert "<td>state, rest</td>" in page
    assert "http" not in page
    skeleton(SMALL).config.save_pretrained(tmp_path / "hf")
    for what in (tmp_path / "hf", tmp_path / "hf" / "config.json"):
        assert run(str(what), "--optimizer", "adamw", "--gpus", "2", "--parallel", "fsdp2") == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "each of 2 GPUs by fsdp2" in text
        assert "What each process sends in a step" in text


def test_what_a_step_sends_is_beside_what_adamw_sends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpus", "8", "--optimizer", "muon", "apollo-svd", "--rank", "8"]
    assert run("llama-1m", *words, "--parallel", "fsdp2", "--out", str(tmp_path)) == 0
    text = capsys.readouterr().out
    for row in (
        r"adamw +│ +\d+: \S+ MB │ +1: \d+ B │ +- │",
        r"muon .* MB │ +- │",
        r"apollo-svd .* kB │ +\d+: \d+ kB │",
    ):
        assert re.search(row, text), row
    assert "What each process sends" in (tmp_path / "plan.html").read_text()
    assert run("llama-1m", *words[:-2]) == 0  # ddp: every process steps all by itself
    assert re.search(r"muon +│ +\d+: \S+ MB │ +- │", capsys.readouterr().out)
    assert run("llama-1m", "--optimizer", "muon") == 0
    assert "sends" not in capsys.readouterr().out


def test_keys_are_knobs_of_the_one_optimizer_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("llama-1m", "--optimizer", "muon", "--optim.stateless", "true") == 0
    assert re.search(r"state, matrices │ +0\.000 │", capsys.readouterr().out)
    assert run("llama-1m", "--optimizer", "muon", "adamw", "--optim.momentum", "0.9") == 2
    assert "it is a key of" in capsys.readouterr().err.lower()


def test_a_run_whose_optimizer_is_chosen_later_is_planned_with_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: llama-1m, dtype: bfloat16}\noptim: {name: auto}\n")
    assert run(str(file), "--optimizer", "nano", "adamw") == 0
    told = capsys.readouterr()
    assert "nano" in told.out
    assert "adamw" in told.out
    assert "--memory SIZE --choose names" in told.err
    assert run(str(file), "--memory", "1GB", "--choose") == 0
    told = capsys.readouterr()
    assert "name: full" in told.out
    assert "names" not in told.err


def test_the_printed_parts_add_up() -> None:
    plans = [plan_of(name) for name in NAMES]
    head, *body = table_rows(plans)
    assert head == ["MB", *NAMES]
    table = {row[0]: row[1:] for row in body}
    for i, one in enumerate(plans):
        parts = [float(table[part][i]) for part in PARTS if part in table]
        assert sum(parts) == pytest.approx(float(table["total"][i]), abs=0.0005 * (len(parts) + 1))
        assert float(table["total"][i]) == pytest.approx(one.total / 1e6, abs=0.0005)
    bars = draw(plans, "title").axes[0].patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(sum(one.total for one in plans) / 1e6)


def test_a_plan_says_what_every_group_follows_and_keeps() -> None:
    plans = [plan_of(name, state_dtype="8bit") for name in ("apollo", "adamw")]
    for one in plans:
        kept = one.rows["state, matrices"] + one.rows["state, rest"]
        assert sum(row.size for row in one.followed) == kept > 0
    said = {(row.group, row.rule, row.state) for row in plans[0].followed}
    assert said >= {("matrices", "APOLLO r=32", "8bit"), ("embedding", "AdamW", "8bit"), ("norms", "AdamW", "float32")}
    head, *body = followed_rows(plans)
    assert head[:4] == ["optimizer", "group", "rule", "state"]
    assert [row[0] for row in body if row[1] == "embedding"] == ["all"]
    assert [row[:3] for row in body if row[1] == "matrices"] == [
        ["apollo", "matrices", "APOLLO r=32"],
        ["adamw", "matrices", "AdamW"],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to plan: name a size (llama-7b)"),
        ("llama-1m --config x.yaml", "both WHAT and --config"),
        ("llama-7c", "no such size (did you mean llama-7b?); there are llama-1m"),
        ("llama7b", "no such size (did you mean llama-7b?)"),
        ("./no/where", "neither a size"),
        ("nowhere.yaml", "cannot read the run file nowhere.yaml"),
        ("llama-1m --optimizer apolo", "--optimizer apolo: no such optimizer (did you mean apollo?)"),
        ("llama-1m --relase", "unknown argument --relase (did you mean --release?)"),
        ("llama-1m --optim.rnk 3", "unknown key --optim.rnk (did you mean --optim.rank?)"),
        ("llama-1m --batch 0", "--batch 0: at least 1"),
        ("llama-1m --bits 7", "argument --bits: invalid choice: 7"),
        ("llama-1m --bits 16 --optimizer q-apollo", "q-apollo is for low-bit weights"),
        ("llama-1m --bits 32 --dtype bfloat16", "--bits 32 and --dtype bfloat16 contradict"),
        ("llama-1m --memory lots", "--memory lots: give a size such as 24GB"),
        ("llama-1m --gpus 2 --parallel ddp --release", "release with ddp"),
        ("llama-1m --parallel.mode tp+fsdp2", "parallel.mode=tp+fsdp2: ddp and fsdp2 are planned"),
        ("llama-1m --seq 4096", "longer than the context of llama-1m, 2048 tokens"),
    ],
)
def test_wrong_words_get_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--optimizer", "--release", "--memory", "apollo-optim plan llama-7b --release", "WHAT is"):
        assert word in text


def test_other_optimizers_keep_their_own_rule() -> None:
    knobs = {"rank": 1, "scale": 64.0}
    cfg = RunConfig(optim=OptimConfig("apollo-mini", state_dtype="bfloat16", exclude=["gate"], knobs=knobs))
    other = command.with_optimizer(cfg, "apollo", 16).optim
    assert (other.name, other.knobs, other.state_dtype) == ("apollo", {"rank": 16}, "bfloat16")
    assert other.exclude == ["gate"]
    assert command.with_optimizer(cfg, "apollo-mini", 16).optim.knobs == knobs, "one column is what Mini is"
    assert not command.with_optimizer(cfg, "adamw", 16).optim.knobs


def test_a_narrow_terminal_gets_several_tables() -> None:
    rows = [["GB", *NAMES], ["total", *("1.000" for _ in NAMES)]]
    for width in (20, 40, 80):
        found = tables.pieces(rows, width)
        assert [i for columns in found for i in columns if i] == list(range(1, len(NAMES) + 1))
        assert all(columns[0] == 0 for columns in found)
    assert len(tables.pieces(rows, 40)) > len(tables.pieces(rows, 400)) == 1
