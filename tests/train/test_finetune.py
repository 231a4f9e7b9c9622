"""Fine-tuning is the run of pre-training on other rows: packed as unpacked, resumed to the bit, the best one kept."""

from __future__ import annotations

import dataclasses
import json
import random
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from train_tiny import figures, records, tiny
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from apollo_optim.core.errors import InputError
from apollo_optim.data.answers import AnswerRow, Answers, Sample
from apollo_optim.train import checkpoint
from apollo_optim.train.config import RunConfig, load_config
from apollo_optim.train.events import Event
from apollo_optim.train.failures import Interrupted
from apollo_optim.train.finetune import TUNED, finetune, resolved
from apollo_optim.train.loss import check_packing, summed_loss
from apollo_optim.train.pretrain import pretrain
from benchmarks import kill

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64}


class NoTokenizer:
    eos_token_id = 0


def layouts() -> tuple[Any, Any]:
    """The same samples in one row, and in rows of their own."""
    chance = random.Random(3)
    samples = []
    for length in (9, 14, 5, 3):
        ids = [chance.randrange(1, 64) for _ in range(length)]
        samples.append(Sample(array("i", ids), bytearray(n > length // 2 for n in range(length))))
    together = Answers(NoTokenizer(), 36, pack=True).batch([AnswerRow(samples)])
    apart = Answers(NoTokenizer(), 36, pack=False).batch([AnswerRow([sample]) for sample in samples])
    return together, apart


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_is_unpacked(kind, attention):
    torch.manual_seed(0)
    if kind == "llama":
        config: Any = LlamaConfig(**SMALL, intermediate_size=64, num_hidden_layers=2)
        model: Any = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    else:  # positions that are learnt
        config = GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=64, n_positions=64)
        model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
    model.train(False)
    model.double()
    together, apart = layouts()
    gradients, losses = [], []
    for batch in (together, apart):
        model.zero_grad()
        loss = summed_loss(model, batch.input_ids, batch.labels, "full", batch.position_ids)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # summed in fp32
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    logits = model(input_ids=together.input_ids, position_ids=together.position_ids, use_cache=False).logits[0]
    alone = model(input_ids=apart.input_ids, use_cache=False).logits
    start = 0
    for row, length in enumerate((9, 14, 5, 3)):
        torch.testing.assert_close(logits[start : start + length], alone[row, :length], rtol=1e-9, atol=1e-9)
        start += length
    across = model(input_ids=together.input_ids, use_cache=False).logits[0]  # and it is the positions that do it
    assert not torch.allclose(logits[9:31], across[9:31], atol=1e-3)
    check_packing(model)


def test_a_model_that_sees_across_texts_is_refused():
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_head=2, n_layer=1, vocab_size=64))
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=r"data\.mode=pack: BloomForCausalLM .* sees from one text of a row into"):
        check_packing(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base model, and questions of which the answer is the last word."""
    folder = tmp_path_factory.mktemp("tuned")
    pretrain(tiny(folder, "base", train={"steps": 2}))
    chance = random.Random(1)
    for name, count in (("pairs", 160), ("held", 24)):
        words = [[str(chance.randrange(100)) for _ in range(chance.randrange(1, 6))] for _ in range(count)]
        rows = [{"prompt": " ".join(some) + " >", "completion": " " + some[-1]} for some in words]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tuned(folder: Path, name: str, **sections: dict[str, Any]) -> RunConfig:
    cfg = tiny(
        folder,
        name,
        model={"name": str(folder / "base" / "model"), "pretrained": True, "config": {}},
        checkpoint={"every": None, "best": True},
        optim={"name": "apollo", "lr": 3e-2},
    )
    changes: dict[str, dict[str, Any]] = {
        "data": {
            "source": str(folder / "pairs.jsonl"),
            "validation_source": str(folder / "held.jsonl"),
            "format": "auto",
            "tokenizer": "bpe",
        },
        "train": {"epochs": 2, "batch_size": 8},
        "eval": {"every": 2},
    }
    for section in changes.keys() | sections.keys():
        both = changes.get(section, {}) | sections.get(section, {})
        setattr(cfg, section, dataclasses.replace(getattr(cfg, section), **both))
    return cfg


@pytest.fixture(scope="module")
def whole(place) -> Any:
    return finetune(tuned(place, "whole"))


def test_a_run_of_epochs_learns_and_leaves_what_pretraining_leaves(place, whole):
    run = place / "whole"
    cfg = load_config(run / "config.yaml")
    start = records(run, "start")[0]
    assert start["notes"][0].startswith("160 samples in ")
    assert start["notes"][1] == f"train.epochs=2: {cfg.train.steps} steps of 8 rows"
    assert cfg.data.tokenizer == str(place / "base" / "model")
    steps = records(run, "step")
    assert len(steps) == cfg.train.steps > 4
    assert whole.loss < 0.8 * steps[0]["loss"]
    assert start["config"]["train"]["epochs"] == 2
    left = {path.name for path in run.iterdir()} - {".lock"}
    assert left == {"config.yaml", "metrics.jsonl", "checkpoints", "model", "tokenizer"}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(run / "model")
    exported = AutoModelForCausalLM.from_pretrained(run / "model")
    best = min(records(run, "eval"), key=lambda record: record["loss"])
    assert whole.loss == best["loss"]
    kept = checkpoint.checkpoints(run)
    assert best["step"] in kept
    checkpoint.load_weights(kept[best["step"]], (again := type(exported)(exported.config)))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), exported.parameters(), strict=True))


class Stop(Event):
    """Ends the process's run after a step, as a kill would: nothing is saved for it."""

    def due(self, step: int) -> bool:
        return step == 5

    def after(self, report: Any) -> None:
        raise KeyboardInterrupt


def test_killed_and_resumed_it_is_equal_to_the_bit(place, whole, monkeypatch):
    from apollo_optim.train import pretrain as story

    run_job = story.run_job
    monkeypatch.setattr(story, "run_job", lambda job, **how: run_job(job, **how, more=[Stop()]))
    cfg = tuned(place, "parts")
    with pytest.raises(KeyboardInterrupt):
        finetune(cfg)
    assert checkpoint.newest(place / "parts").name == "step-00000004"  # type: ignore[union-attr]
    monkeypatch.setattr(story, "run_job", run_job)
    (place / "base" / "model").rename(place / "base" / "gone")  # a run has all that it needs in its own directory
    try:
        finetune(cfg, resume=True)
    finally:
        (place / "base" / "gone").rename(place / "base" / "model")
    assert figures(place / "parts") == figures(place / "whole")
    assert kill.final_files(place / "parts") == kill.final_files(place / "whole")


def test_the_best_checkpoint_outlives_newer_ones(place):
    """At a rate that rises until it spoils what was learnt, the last weights are not those that are exported."""
    cfg = tuned(place, "spoilt", train={"epochs": None, "steps": 10}, eval={"every": 2})
    cfg.optim = cfg.optim.changed(name="adamw", lr=1.0, rank=None, update_proj_gap=None)
    cfg.schedule.warmup = 10
    cfg.checkpoint = dataclasses.replace(cfg.checkpoint, keep=1)
    result = finetune(cfg)
    evaluations = records(place / "spoilt", "eval")
    best = min(evaluations, key=lambda record: record["loss"])
    assert best["step"] < 10
    assert result.loss == best["loss"] < evaluations[-1]["loss"]
    assert list(checkpoint.checkpoints(place / "spoilt")) == [best["step"], 10]


def test_what_a_run_says_no_rates_of_is_the_papers(place):
    cfg = resolved(tuned(place, "x"))
    assert (cfg.optim.lr, cfg.optim.knobs["rank"]) == (3e-2, 8)  # said
    said_nothing = dataclasses.replace(cfg, optim=type(cfg.optim)("apollo"))
    assert {key: resolved(said_nothing).optim.flat()[key] for key in TUNED["apollo"]} == TUNED["apollo"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"format": "text"}, "train": {"epochs": None}}, r"data\.format=text: fine-tuning learns answers"),
        ({"model": {"pretrained": False}}, r"model\.pretrained=false: fine-tuning starts from the weights"),
        ({"data": {"seq_len": 2}}, r"no row is left to train on \(160 samples; of 160 data\.seq_len=2 cuts off all"),
        ({"train": {"epochs": 0.0}}, r"train\.epochs=0\.0: must be greater than 0"),
    ],
)
def test_what_makes_no_sense_leaves_no_run(place, changes, said):
    with pytest.raises(InputError, match=said):
        finetune(tuned(place, "none", **changes))
    assert not (place / "none" / "config.yaml").exists()


def test_answers_are_not_for_pretraining(place):
    cfg = tuned(place, "none", train={"epochs": None})
    with pytest.raises(InputError, match=r"data\.format=auto: questions and answers are for apollo-optim finetune"):
        pretrain(cfg)


def test_a_stop_says_how_to_go_on(place, monkeypatch):
    from apollo_optim.train import pretrain as story

    def stopped(*given: Any, **how: Any) -> None:
        raise Interrupted("saved after step 3")

    monkeypatch.setattr(story, "run_steps", stopped)
    with pytest.raises(Interrupted, match=r"go on with: apollo-optim finetune --out .*stopped --resume"):
        finetune(tuned(place, "stopped"))
