"""Another story than pre-training needs no loop of its own: fine-tuning, in forty lines over the same pieces."""

from __future__ import annotations

import functools
import inspect
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from train_tiny import figures, records, tiny

from apollo_optim.data import IGNORED, Batch
from apollo_optim.data.tokenizer import load_tokenizer
from apollo_optim.parallel.world import ALONE
from apollo_optim.train import checkpoint
from apollo_optim.train.config import RunConfig, to_dict
from apollo_optim.train.events import Event, Log, Save
from apollo_optim.train.failures import Interrupted
from apollo_optim.train.loop import run_steps
from apollo_optim.train.models import build_model
from apollo_optim.train.optimizer import make_optimizer
from apollo_optim.train.pretrain import pretrain
from apollo_optim.train.record import recording
from apollo_optim.train.run_dir import restore
from apollo_optim.train.schedule import factor
from apollo_optim.train.signals import stop_signals
from apollo_optim.train.state import TrainState
from apollo_optim.train.step import TrainStep
from benchmarks import kill

PAIRS = [(f"{a} + {b} =", f" {a + b}") for a in range(8) for b in range(8)]


class Answers:
    """Rows of which only the answer is learnt, in an order of their own."""

    def __init__(self, pairs: list[tuple[str, str]], tokenizer, length: int) -> None:
        self.rows, self.position = [], 0
        for question, answer in pairs:
            asked, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
            ids = [*asked, *said, tokenizer.eos_token_id][:length]
            ids += [tokenizer.eos_token_id] * (length - len(ids))
            labels = [IGNORED] * len(asked) + ids[len(asked) : len(asked) + len(said) + 1]
            self.rows.append((ids, labels + [IGNORED] * (length - len(labels))))

    def next(self, count: int) -> Batch:
        order = [(self.position + i) * 37 % len(self.rows) for i in range(count)]
        self.position += count
        return Batch(*(torch.tensor([self.rows[i][part] for i in order]) for part in (0, 1)))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def finetune(cfg: RunConfig, tokenizer, pairs, *, more: tuple[Event, ...] = ()) -> TrainState:
    """From a model that is there to one that answers; goes on where it was."""
    run, last = Path(str(cfg.out)), cfg.train.steps
    run.mkdir(exist_ok=True)
    torch.manual_seed(cfg.train.seed)
    random.seed(cfg.train.seed)
    model = build_model(cfg.model).train()
    model.get_input_embeddings().requires_grad_(False)
    optimizer = make_optimizer(cfg.optim, model)
    state = TrainState(model, optimizer, Answers(pairs, tokenizer, cfg.data.seq_len), {"sha256": str(hash(len(pairs)))})
    if there := checkpoint.newest(run):
        restore(state, checkpoint.load_state(there) | {"checkpoint": there}, run)
    step = TrainStep(state, cfg.train, functools.partial(factor, steps=last, cfg=cfg.schedule), tokenizer=tokenizer)
    with recording(run, state, to_dict(cfg), "fine-tuning", last, ALONE) as record, stop_signals() as stop:
        events = [
            Log(state, record, cfg.log.every, last),
            *more,
            Save(state, record, run, cfg.checkpoint.every, cfg.checkpoint.keep, last),
        ]
        run_steps(state, step, events, last=last, stop=stop)
    checkpoint.write_model(model, tokenizer, run / "model")
    return state


class CtrlC(Event):
    """Somebody stops the run after a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def due(self, step: int) -> bool:
        return step == self.at

    def after(self, report) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def base(tmp_path) -> Path:
    return pretrain(tiny(tmp_path, "base", train={"steps": 4})).run


def tuned(folder: Path, base: Path, name: str) -> RunConfig:
    return tiny(
        folder,
        name,
        model={"name": str(base / "model"), "pretrained": True, "config": {}},
        train={"steps": 12, "batch_size": 8},
        eval={"every": None},
    )


def test_a_second_story_copies_no_loop():
    assert len(inspect.getsource(finetune).splitlines()) <= 40


def test_it_learns_the_answers_and_leaves_the_frozen_alone(tmp_path, base):
    cfg, tokenizer = tuned(tmp_path, base, "run"), load_tokenizer(str(base / "tokenizer"))
    state = finetune(cfg, tokenizer, PAIRS)
    steps = records(cfg.out, "step")
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert state.tokens == steps[-1]["tokens"]
    before = build_model(cfg.model).get_input_embeddings().weight
    assert torch.equal(state.model.get_input_embeddings().weight, before)
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_it_goes_on_to_the_bit(tmp_path, base):
    tokenizer = load_tokenizer(str(base / "tokenizer"))
    finetune(tuned(tmp_path, base, "whole"), tokenizer, PAIRS)
    parts = tuned(tmp_path, base, "parts")
    with pytest.raises(Interrupted, match="saved after step 6"):
        finetune(parts, tokenizer, PAIRS, more=(CtrlC(5),))
    finetune(parts, tokenizer, PAIRS)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    assert kill.final_files(tmp_path / "parts") == kill.final_files(tmp_path / "whole")
