"""The training room: models, schedules, the loss, the loop, the log, and what it says to wrong input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from train_tiny import MODEL, records, tiny

from apollo_optim.core.errors import InputError
from apollo_optim.data import Batch
from apollo_optim.train import build, events
from apollo_optim.train import step as steps_of
from apollo_optim.train.config import (
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    check,
    from_dict,
    load_config,
    save_config,
    to_dict,
)
from apollo_optim.train.display import Live, duration, in_bytes
from apollo_optim.train.draw import draw_weights
from apollo_optim.train.evaluate import evaluate
from apollo_optim.train.failures import TrainingFailed
from apollo_optim.train.loss import summed_loss, targets
from apollo_optim.train.metrics import Metrics, cut_back
from apollo_optim.train.models import SIZES, build_model, model_config, skeleton, usable_vocabulary
from apollo_optim.train.optimizer import make_optimizer
from apollo_optim.train.pretrain import pretrain
from apollo_optim.train.run_dir import claim
from apollo_optim.train.schedule import factor, set_lr, warmup_steps
from apollo_optim.train.state import TrainState
from apollo_optim.train.step import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished run that several tests look at."""
    folder = tmp_path_factory.mktemp("done")
    pretrain(tiny(folder, schedule={"warmup": 2}))
    return folder / "run"


# --- the optimizer ---


def test_a_run_file_gives_embedding_head_and_norms_their_own_rates(tmp_path):
    cfg = tiny(tmp_path, optim={"rest_lr": 2e-2, "embedding_lr": "4e-2", "norm_lr": 5e-3})
    save_config(from_dict(to_dict(cfg)), tmp_path / "run.yaml")
    cfg = load_config(tmp_path / "run.yaml")
    optimizer = make_optimizer(cfg.optim, skeleton(ModelConfig("llama-1m", config=MODEL)))
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"matrices": 1e-2, "embedding": 4e-2, "head": 2e-2, "norms": 5e-3}


# --- models ---


def test_sizes_are_the_published_ones():
    published = {
        "llama-60m": 58.1e6,
        "llama-130m": 134.1e6,
        "llama-350m": 367.97e6,
        "llama-1b": 1.339e9,
    }
    ours = {"llama-1m": 1.45e6, "llama-4m": 3.4e6, "llama-9m": 8.4e6}
    for name, expected in (published | ours).items():
        model = skeleton(ModelConfig(name))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=0.03), name
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert model.config.vocab_size == (4096 if name in ours else 32000)
    assert (SIZES["llama-13b"].hidden, SIZES["llama-13b"].ffn, SIZES["llama-13b"].layers) == (5120, 13824, 40)


def test_new_weights_come_module_by_module_and_as_transformers_draws_them():
    from transformers import AutoModelForCausalLM

    config = model_config(ModelConfig("llama-1m", config=MODEL | {"tie_word_embeddings": True}))
    drawn: list[int] = []  # parameters that had memory when a module was finished

    def finish(module: torch.nn.Module) -> None:
        drawn.append(sum(not p.is_meta for p in model.parameters()))

    torch.manual_seed(0)
    model = skeleton(ModelConfig("llama-1m"), config)
    draw_weights(model, finish)
    assert drawn == sorted(drawn)
    assert drawn[0] == 1
    assert len(set(drawn)) == len(list(model.parameters()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    usual = AutoModelForCausalLM.from_config(config)
    theirs = dict(usual.named_parameters()) | dict(usual.named_buffers())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == theirs[name].dtype
        assert tensor.device.type == "cpu"
        if tensor.ndim < 2:
            assert torch.equal(tensor, theirs[name]), name  # norms and rotary frequencies
        else:
            assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name


def test_a_model_with_a_value_from_its_constructor_is_refused():
    model = skeleton(ModelConfig("llama-1m"), model_config(ModelConfig("llama-1m", config=MODEL)))
    with torch.device("meta"):
        model.model.layers[0].own = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(InputError, match=r"layers.0.own its first value"):
        draw_weights(model)


def test_bfloat16_is_pure_and_leaves_the_rotary_frequencies_alone():
    model = build_model(ModelConfig("llama-1m", dtype="bfloat16", config=MODEL), 300)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_vocabulary_leaves_out_special_tokens_at_the_end():
    class T5:
        bos_token_id, eos_token_id, pad_token_id, unk_token_id = None, 1, 0, 2
        all_special_ids = (1, 0, 2, *range(32000, 32100))

        def __len__(self):
            return 32100

    assert usable_vocabulary(T5()) == 32000
    T5.eos_token_id = 32099  # a token that ends documents does occur
    assert usable_vocabulary(T5()) == 32100


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (ModelConfig("llama-2m"), "no such size"),
        (ModelConfig("nowhere/at-all-really"), "neither a size"),
        (ModelConfig("llama-1m", pretrained=True), "has no weights"),
        (ModelConfig("llama-1m", config={"hiden_size": 3}), "hiden_size"),
        (ModelConfig("llama-1m", config={"max_position_embeddings": 16}), "longer than the context"),
        (ModelConfig("llama-1m", config=MODEL, attention="nonsense"), "cannot build"),
    ],
)
def test_wrong_models_are_refused(cfg, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=words) as refusal:
        build_model(cfg, 300, seq_len=32)
    assert "\n" not in str(refusal.value)


def test_any_causal_model_of_transformers_can_be_built_and_go_on_from_its_weights(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    theirs.save_pretrained(tmp_path)
    new = build_model(ModelConfig(str(tmp_path)), 4096, seq_len=64)  # its own vocabulary, not the tokenizer's
    assert new.config.vocab_size == 300
    again = build_model(ModelConfig(str(tmp_path), pretrained=True))
    assert torch.equal(again.transformer.wte.weight, theirs.transformer.wte.weight)
    assert not torch.equal(new.transformer.wte.weight, theirs.transformer.wte.weight)
    with pytest.raises(InputError, match="64 tokens"):
        build_model(ModelConfig(str(tmp_path)), seq_len=65)


# --- schedules ---


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_schedules(kind):
    cfg = ScheduleConfig(kind=kind, warmup=0.1, min_lr=0.1, decay=0.2)
    values = [factor(step, 100, cfg) for step in range(1, 101)]
    assert values[:10] == [step / 10 for step in range(1, 11)]
    assert values[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))
    halfway = {"cosine": 0.55, "linear": 0.55, "constant": 1.0, "wsd": 1.0}[kind]
    assert values[54] == pytest.approx(halfway)
    if kind == "wsd":
        assert values[79] == 1.0
        assert values[80] < 1.0


def test_warmup_counts_steps_or_fractions_and_may_be_none():
    assert warmup_steps(100, ScheduleConfig(warmup=0.25)) == 25
    assert warmup_steps(100, ScheduleConfig(warmup=7)) == 7
    assert factor(1, 1, ScheduleConfig(warmup=0)) == pytest.approx(0.1)
    assert factor(3, 3, ScheduleConfig(warmup=3)) == 1.0
    assert factor(1, 10, ScheduleConfig(kind="wsd", warmup=0, decay=1.0)) < 1.0


def test_every_group_follows_its_own_peak():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.4}], lr=1.0)
    for value in (0.5, 0.25):
        set_lr(optimizer, value)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1 * value, 0.4 * value]


# --- the loss ---


def rows(count: int, seq_len: int = 16, padded: bool = True):
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 300, (count, seq_len), generator=generator)
    labels = input_ids.clone()
    if padded:
        for row in range(count):
            labels[row, seq_len - row * 2 :] = -100
    return Batch(input_ids, labels)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(ModelConfig("llama-1m", config=MODEL), 300).train(False)


def test_the_loss_is_the_plain_one_and_transformers_own(model):
    batch = rows(4)
    with torch.no_grad():
        ours = summed_loss(model, batch.input_ids, batch.labels)
        logits = model(batch.input_ids).logits
        plain = sum(
            F.cross_entropy(logits[row, position], batch.labels[row, position + 1], reduction="sum")
            for row in range(4)
            for position in range(15)
            if batch.labels[row, position + 1] != -100
        )
        theirs = model(batch.input_ids, labels=batch.labels).loss
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)
    assert float(ours) / targets(batch.labels) == pytest.approx(float(theirs), rel=1e-5)


def step_on(model, batch, tmp_path, **changes) -> TrainStep:
    """What makes steps of this one batch, which leave the weights alone."""
    cfg = tiny(tmp_path, train={"batch_size": len(batch.input_ids), **changes})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    state = TrainState(model, optimizer, types.SimpleNamespace(next=lambda count: batch), {})
    return TrainStep(state, cfg.train, lambda step: 1.0)


@pytest.mark.parametrize("micro", [1, 3, 5, 99])
def test_accumulation_weighs_every_token_the_same(model, tmp_path, micro):
    batch = rows(5)
    model.zero_grad()
    first = step_on(model, batch, tmp_path)(1, norm=True)
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    pieces = step_on(model, batch, tmp_path, micro_batch=micro)
    again = pieces(1, norm=True)
    assert again.loss == pytest.approx(first.loss, rel=1e-6)
    assert again.grad_norm.get() == pytest.approx(first.grad_norm.get(), rel=1e-5)
    assert pieces.state.tokens == int((batch.labels != -100).sum())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-7)


def test_clipping_limits_the_gradient_and_reports_the_norm_before(model, tmp_path):
    batch = rows(3)
    model.zero_grad()
    norm = step_on(model, batch, tmp_path)(1, norm=True).grad_norm
    model.zero_grad()
    clipped = step_on(model, batch, tmp_path, clip=norm.get() / 4)(1, norm=False).grad_norm
    assert clipped.get() == pytest.approx(norm.get(), rel=1e-6)
    left = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert left == pytest.approx(norm.get() / 4, rel=1e-3)


def test_evaluation_weighs_tokens_and_shows_the_papers_figure_beside(model):
    batch = rows(5)
    listed = [Batch(ids, labels) for ids, labels in zip(batch.input_ids, batch.labels, strict=True)]
    state = torch.get_rng_state()
    model.train()
    found = evaluate(model, listed, 2, bytes_per_token=3.0)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    model.train(False)
    with torch.no_grad():
        total = float(summed_loss(model, batch.input_ids, batch.labels))
        means = [
            float(summed_loss(model, batch.input_ids[i : i + 2], batch.labels[i : i + 2]))
            / targets(batch.labels[i : i + 2])
            for i in (0, 2, 4)
        ]
    assert found.predictions == targets(batch.labels)
    assert found.loss == pytest.approx(total / found.predictions, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.perplexity_reference == pytest.approx(math.exp(sum(means) / 4), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / 3.0)


# --- a run ---


def test_a_run_leaves_its_log_checkpoints_and_a_model_that_transformers_opens(done):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (start,), (end,) = records(done, "start"), records(done, "end")
    steps, evaluations = records(done, "step"), records(done, "eval")
    assert from_dict(start["config"]) == load_config(done / "config.yaml")
    assert start["resumed_from"] is None
    assert start["memory"]["weights"] == 4 * start["params"]
    assert start["corpus"]["sha256"]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert [record["tokens"] for record in steps] == [128 * step for step in range(1, 9)]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [record["lr"] for record in steps[:2]] == [0.005, 0.01]
    assert all(record["grad_norm"] > 0 for record in steps)
    assert [record["step"] for record in evaluations] == [4, 8]
    assert end["loss"] == evaluations[-1]["loss"]
    (real,) = records(done, "memory")
    assert real["gradients"] == real["weights"] == end["memory"]["gradients"]
    assert real["optimizer"] == end["memory"]["optimizer"] > 0
    assert list(start["baseline"]) == ["imports", "data"]
    peak = 1.01 * end["memory"]["peak"]  # Linux counts what is resident a little late
    assert all(10**8 < size < peak for size in start["baseline"].values())
    assert sorted(path.name for path in (done / "checkpoints").iterdir()) == [
        "latest",
        "step-00000004",
        "step-00000008",
    ]
    assert (done / "checkpoints" / "latest").resolve().name == "step-00000008"
    opened = AutoModelForCausalLM.from_pretrained(done / "model")
    tokenizer = AutoTokenizer.from_pretrained(done / "model")
    assert opened.config.vocab_size == len(tokenizer) == 300
    assert opened.config.eos_token_id == tokenizer.eos_token_id
    assert not list(done.parent.rglob(".tmp-*"))


def test_the_optimizer_gets_its_knobs_and_each_group_its_rate(tmp_path):
    cfg = tiny(tmp_path, optim={"rest_lr": 3e-3, "state_dtype": "bfloat16", "name": "apollo-mini", "rank": None})
    pretrain(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=2)))
    last = records(cfg.out, "step")[-1]
    assert last["lr"] == pytest.approx(last["lr_rest"] / 0.3)
    assert records(cfg.out, "end")[0]["memory"]["optimizer"] < 0.6 * 2 * records(cfg.out, "end")[0]["memory"]["weights"]


@pytest.mark.parametrize("mode", ["bfloat16", "checkpointing", "pad"])
def test_switches(tmp_path, mode, done):
    ways: dict[str, Any] = {"bfloat16": {"dtype": "bfloat16"}, "checkpointing": {"gradient_checkpointing": True}}
    model = ways.get(mode, {})
    cfg = tiny(
        tmp_path,
        model={"config": MODEL | {"attention_dropout": 0.0}, **model},
        data={"mode": "pad" if mode == "pad" else "pack"},
    )
    result = pretrain(cfg)
    assert math.isfinite(result.perplexity)
    if mode == "checkpointing":  # the same numbers, computed twice
        plain = dataclasses.replace(
            cfg, out=str(tmp_path / "plain"), model=dataclasses.replace(cfg.model, gradient_checkpointing=False)
        )
        assert pretrain(plain).loss == pytest.approx(result.loss, rel=1e-5)


def test_a_run_leaves_the_global_data_order_to_its_seed(tmp_path, done):
    again = pretrain(tiny(tmp_path, schedule={"warmup": 2}))
    assert again.loss == records(done, "end")[0]["loss"]
    other = pretrain(tiny(tmp_path, "other", schedule={"warmup": 2}, train={"seed": 1}))
    assert other.loss != again.loss


def test_a_nan_loss_stops_before_the_step_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    cfg = tiny(tmp_path)
    real, calls = steps_of.summed_loss, []

    def poisoned(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) == 6 else 1.0)

    monkeypatch.setattr(steps_of, "summed_loss", poisoned)
    with pytest.raises(TrainingFailed, match=r"loss is nan at step 6.*step-00000004"):
        pretrain(cfg)
    assert [record["step"] for record in records(cfg.out, "step")] == [1, 2, 3, 4, 5]
    assert records(cfg.out, "failed")[0]["step"] == 6
    monkeypatch.setattr(steps_of, "summed_loss", real)
    assert pretrain(cfg, resume=True).step == 8
    assert not records(cfg.out, "failed")


def test_spoilt_weights_are_never_saved(tmp_path, monkeypatch):
    cfg = tiny(tmp_path, eval={"every": None})
    real = build.make_optimizer

    def breaking(optim, model, graphs=None):
        optimizer = real(optim, model, graphs)

        def spoil(*_):
            if optimizer.param_groups[0]["lr"] and len(spoilt) == 5:
                with torch.no_grad():
                    next(model.parameters())[0, 0] = math.inf
            spoilt.append(1)

        spoilt: list[int] = []
        optimizer.register_step_post_hook(spoil)
        return optimizer

    monkeypatch.setattr(build, "make_optimizer", breaking)
    monkeypatch.setattr(events, "due", lambda step, every, last: step in (4, 6) or step == last)
    with pytest.raises(TrainingFailed, match=r"not finite|loss is nan"):
        pretrain(cfg)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000004"]


# --- wrong input ---


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("train", {"steps": 0}, "train.steps=0"),
        ("train", {"batch_size": -1}, "train.batch_size"),
        ("train", {"micro_batch": 0}, "train.micro_batch"),
        ("train", {"clip": math.nan}, "train.clip"),
        ("train", {"clip_tensor": 0.0}, "train.clip_tensor=0"),
        ("train", {"clip": 1.0, "release": True}, "train.clip=1.0.*before the total norm.*train.clip_tensor"),
        ("train", {"clip": 1.0, "clip_tensor": 1.0}, "choose one"),
        ("train", {"device": "abacus"}, "train.device=abacus"),
        ("checkpoint", {"keep": 0}, "checkpoint.keep"),
        ("schedule", {"min_lr": 2.0}, "schedule.min_lr"),
        ("schedule", {"warmup": 100}, "longer than the run"),
        ("schedule", {"kind": "sine"}, "schedule.kind=sine: expected Literal"),
        ("log", {"to": ["abacus"]}, "log.to"),
        ("optim", {"rank": 0}, "rank"),
        ("optim", {"name": "apolo"}, "apollo"),
        ("data", {"seq_len": 4096}, "longer than the context"),
        ("data", {"source": "/nowhere/*.txt"}, "nowhere"),
    ],
)
def test_wrong_input_gets_one_line_and_leaves_no_run(tmp_path, section, changes, words):
    cfg = tiny(tmp_path, **{section: changes})
    with pytest.raises(InputError, match=words) as refusal:
        pretrain(cfg)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_directory_with_another_run_is_refused_and_untouched(tmp_path, done):
    before = (done / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"already holds a run \(step 8"):
        pretrain(dataclasses.replace(load_config(done / "config.yaml"), out=str(done)))
    assert (done / "metrics.jsonl").read_bytes() == before
    with pytest.raises(InputError, match="no run to resume"):
        pretrain(tiny(tmp_path), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a run directory"):
        pretrain(tiny(tmp_path, "file"))


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    with (
        claim(tmp_path / "run", False),
        pytest.raises(InputError, match="another process"),
        claim(tmp_path / "run", False),
    ):
        pass


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="occurs"):
        pretrain(tiny(tmp_path, model={"vocab_size": 260}))


# --- configs ---


def test_configs_survive_yaml_and_unknown_keys_are_refused(tmp_path):
    cfg = tiny(tmp_path, optim={"betas": (0.9, 0.95), "targets": ["attn"]}, train={"clip": 1.0})
    save_config(cfg, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == cfg
    assert json.loads(json.dumps(to_dict(cfg))) == to_dict(cfg)
    for text, words in (
        ("train: {stps: 3}", "train.stps.*did you mean train.steps"),
        ("trian: {steps: 3}", "unknown key trian"),
        ("train: {steps: many}", "train.steps=many"),
        ("train: 3", "train"),
        ("a: [", "not a YAML"),
        ("- 1", "not a run file"),
        ("optim: {lr: fast}", "optim.lr=fast"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            load_config(tmp_path / "bad.yaml")
    (tmp_path / "good.yaml").write_text("optim: {lr: 1e-3}\n")  # which YAML 1.1 reads as text
    assert load_config(tmp_path / "good.yaml").optim.lr == 1e-3
    with pytest.raises(InputError, match="cannot read"):
        load_config(tmp_path / "missing.yaml")


def test_the_defaults_make_sense():
    check(RunConfig())


# --- the log ---


def test_the_log_is_json_whatever_happens_and_is_cut_back_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, [])
    metrics.write("start", config={"x": math.inf}, resumed_from=None)
    for step in range(1, 6):
        metrics.write("step", step=step, tokens=step, loss=math.nan)
    metrics.write("start", config={}, resumed_from=3)
    metrics.write("start", config={}, resumed_from=5)
    metrics.write("end", step=3)
    metrics.close()
    with path.open("a") as file:
        file.write('{"event": "step", "step"')

    def refuse(constant):
        raise AssertionError(constant)

    cut_back(path, 3)
    kept = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [(record["event"], record.get("step", record.get("resumed_from"))) for record in kept] == [
        ("start", None),
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("start", 3),
    ]


def fake_tracker(calls: list[Any]) -> types.SimpleNamespace:
    def note(name):
        return lambda *args, **kwargs: calls.append((name, args, kwargs)) or run

    run = types.SimpleNamespace(log=note("log"), finish=note("finish"))
    return types.SimpleNamespace(init=note("init"), log=note("log"), finish=note("finish"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_figure(tmp_path, monkeypatch, name):
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, name, fake_tracker(calls))
    pretrain(tiny(tmp_path, log={"to": [name]}, train={"steps": 2}))
    assert [call[0] for call in calls] == ["init", "log", "log", "log", "finish"]
    assert calls[0][2]["config"]["train"]["steps"] == 2
    assert "train/loss" in calls[1][1][0]
    assert "eval/perplexity" in calls[3][1][0]
    assert calls[3][2] == {"step": 2}


def test_tensorboard_and_missing_trackers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    pretrain(tiny(tmp_path, log={"to": ["tensorboard"]}, train={"steps": 2}))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        pretrain(tiny(tmp_path, "other", log={"to": ["wandb"]}))


# --- the display ---


def test_plain_lines_show_what_a_person_wants_to_know(tmp_path, capsys):
    pretrain(tiny(tmp_path, log={"display": "plain"}, train={"steps": 2}))
    shown = capsys.readouterr().err
    for words in (
        "loss",
        "lr 0.0",
        "grad norm",
        "tokens/s",
        "ETA",
        "peak",
        "weights",
        "gradients",
        "optimizer",
        "bits per byte",
        f"next: apollo-optim sample {tmp_path / 'run'}",
    ):
        assert words in shown
    assert "n/(n+1)" not in shown  # a figure for tables


def test_a_dead_run_is_said_to_be_dead(tmp_path, capsys, monkeypatch):
    real = build.make_optimizer

    def killing(optim, model, graphs=None):
        for p in model.parameters():
            p.register_hook(torch.zeros_like)
        return real(optim, model, graphs)

    monkeypatch.setattr(build, "make_optimizer", killing)
    pretrain(tiny(tmp_path, log={"display": "plain"}))
    assert capsys.readouterr().err.count("at step 1 every gradient is 0: the model is dead") == 1


def test_the_live_panel_can_be_drawn(tmp_path, capsys):
    pytest.importorskip("rich")
    pretrain(tiny(tmp_path, log={"display": "rich"}, train={"steps": 2}))
    panel = Live("title", 10)
    panel.close()
    assert "tokens/s" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [36, 45, 100])
def test_the_live_panel_cuts_no_figure_and_takes_names_as_they_are(columns, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(columns))
    panel = Live("[/b] [red]x", 10)
    record = {"lr": 0.01, "lr_rest": 0.02, "loss": 1.25, "grad_norm": 3.5, "tokens_per_s": 12345.0, "step": 3}
    panel.step(record, 61.0)
    panel.close()
    shown = capsys.readouterr().err
    for figure in ("1.2500", "0.01 (rest 0.02)", "3.500", "12,345", "1:01"):
        assert figure in shown, figure
    assert "[/b]" in shown


def test_figures_are_readable():
    assert [in_bytes(n) for n in (999, 12_345, 1_234_567, 5 * 10**9)] == ["999 B", "12.3 kB", "1.23 MB", "5 GB"]
    assert [duration(n) for n in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]
