"""The long half: what one environment's clients do, a JSON object a line. `make test-clients` makes the table of it.

    python tests/clients/long.py [--keep DIR] [--from DIR ...] [--only trainer low_bit trl processes ...]

Every figure is the largest difference between two runs' weights and states: 0.0 is bitwise. `--keep` leaves checkpoints
of this version for `--from` of another.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from command_runs import far
from trainer_runs import KINDS, RELEASED, TORCH_ADAMW, Run, train
from trl_runs import train_trl

from apollo_optim import RuleOptimizer, rule_of
from apollo_optim.optim.parameter import init_state
from apollo_optim.rules import RULES

Row = dict[str, Any]
TRAINER = f"Trainer, transformers {version('transformers')}"
TRL = f"TRL {version('trl')}"
PEFT = f"LoRA, PEFT {version('peft')}"
STEPS, CHECKPOINTS = 16, ("checkpoint-8", "checkpoint-12")  # the end of the first epoch, and within the second
DTYPES = ("float32", "bfloat16")
CODECS = ("float32", "bfloat16", "8bit", "4bit")


def difference(one: Run, other: Run) -> float:
    return max(far(one.weights, other.weights), far(one.state, other.state))


def followed(run: Run, rule: str) -> str:
    """How many of the trained matrices use the rule: by the type of the optimizer, and by what it keeps for each."""
    optimizer = run.optimizer
    assert isinstance(optimizer, RuleOptimizer), type(optimizer)
    matrices, own = 0, 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert (p in optimizer.state) == p.requires_grad
            if not p.requires_grad:
                continue
            state, expected = optimizer.state[p], init_state(p.detach().to("meta"), group)
            assert {k: getattr(v, "shape", ()) for k, v in state.items()} == {
                k: getattr(v, "shape", ()) for k, v in expected.items()
            }
            assert int(state["step"]) == STEPS
            matrices += group["name"].startswith("matrices")
            own += group["name"].startswith("matrices") and rule_of(p, group) == rule
    assert own > 0
    return f"{own} of {matrices}"


def compared(run: Callable[..., Run], out: Path, rule: str) -> Row:
    """A run against the same with release, and against itself resumed, with release and without."""
    full = run(out)
    released = run(f"{out}-released", callbacks=RELEASED, save_strategy="no")
    resumed = [run(f"{out}-resumed", resume=out / name, save_strategy="no") for name in CHECKPOINTS]
    both = [run(f"{out}-both", resume=out / name, callbacks=RELEASED, save_strategy="no") for name in CHECKPOINTS]
    return {
        "follows": followed(full, rule),
        "release": difference(full, released),
        "resumed": max(difference(full, other) for other in resumed),
        "resumed_released": max(difference(full, other) for other in both),
    }


def torch_resumes(run: Callable[..., Run], out: Path) -> float:
    """How far the same client, resumed, is off with torch's own AdamW."""
    full = run(out, TORCH_ADAMW)
    others = [run(f"{out}-resumed", TORCH_ADAMW, resume=out / name, save_strategy="no") for name in CHECKPOINTS]
    return max(difference(full, other) for other in others)


def in_parts(out: Path) -> float:
    """Four micro-batches against the whole batch at once, as a share of the way that the weights went."""
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    own: dict[str, Any] = {"name": "apollo-mini", "max_steps": 3, "save_strategy": "no"}
    start, parts, once = (train(out, **{**own, **more}) for more in ({"learning_rate": 0.0}, {}, whole))
    return far(parts.weights, once.weights) / far(parts.weights, start.weights)


def trainer_rows(out: Path) -> Iterator[Row]:
    yield {"client": TRAINER, "case": "llama, float32, apollo-mini", "accumulated": in_parts(out / "parts")}
    for kind in KINDS:
        for dtype in DTYPES:
            run = partial(train, kind=kind, dtype=dtype)
            adamw = torch_resumes(run, out / f"{kind}-{dtype}-adamw")
            for codec in CODECS:
                ours = partial(run, name="apollo", knobs={"rank": 16, "state_dtype": codec})
                found = compared(ours, out / f"{kind}-{dtype}-{codec}", "apollo")
                yield {"client": TRAINER, "case": f"{kind}, {dtype}, state {codec}", **found, "adamw": adamw}
    for name in [*sorted(RULES.keys() - {"apollo"}), "muon+scale"]:
        found = compared(partial(train, name=name), out / name, name.partition("+")[0])
        yield {"client": TRAINER, "case": f"llama, float32, {name}", **found}


def low_bit_rows(out: Path) -> Iterator[Row]:
    for kind in KINDS:
        for bits in (8, 4):
            found = compared(
                partial(train, kind=kind, dtype="bfloat16", bits=bits), out / f"{kind}-{bits}", "apollo-mini"
            )
            yield {"client": TRAINER, "case": f"{kind}, bfloat16, weights {bits}bit, apollo-mini", **found}


def trl_rows(out: Path) -> Iterator[Row]:
    for what in ("sft", "dpo"):
        for adapters in (False, True):
            for kind in KINDS:
                run = partial(train_trl, what=what, kind=kind, adapters=adapters)
                found = compared(run, out / f"{what}-{kind}-{adapters}", "apollo")
                client = f"{TRL} {what.upper()}Trainer" + (f", {PEFT}" if adapters else "")
                yield {"client": client, "case": f"{kind}, float32", **found}


FOREIGN = {TORCH_ADAMW: {}, "apollo": {"rank": 16, "state_dtype": "8bit"}}


def keep(out: Path) -> None:
    """Checkpoints for another version, and how this one went on from them."""
    for kind in KINDS:
        for name, knobs in FOREIGN.items():
            run = train(out / kind / name, name, kind=kind, dtype="bfloat16", knobs=knobs)
            torch.save(run.weights, out / kind / name / "weights.pt")
    (out / "version").write_text(version("transformers"))


def foreign_rows(theirs: Path, out: Path) -> Iterator[Row]:
    """From another version's checkpoint: as that version went on?"""
    client = f"{TRAINER}, from a checkpoint of {(theirs / 'version').read_text()}"
    for kind in KINDS:
        found: dict[tuple[str, bool], float] = {}
        for name, knobs in FOREIGN.items():
            last = torch.load(theirs / kind / name / "weights.pt", weights_only=True)
            how: dict[str, Any] = {"kind": kind, "dtype": "bfloat16", "knobs": knobs, "save_strategy": "no"}
            for callbacks in ((),) if name == TORCH_ADAMW else ((), RELEASED):
                run = train(out, name, callbacks=callbacks, resume=theirs / kind / name / CHECKPOINTS[1], **how)
                found[name, bool(callbacks)] = far(run.weights, last)
        yield {
            "client": client, "case": f"{kind}, bfloat16, state 8bit", "follows": followed(run, "apollo"),
            "resumed": found["apollo", False], "resumed_released": found["apollo", True],
            "adamw": found[TORCH_ADAMW, False],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--from", type=Path, nargs="*", default=[], dest="theirs")
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    printed, sys.stdout = sys.stdout, sys.stderr  # Trainer prints its logs
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        makers: dict[str, Callable[[], Iterator[Row]]] = {"trainer": lambda: trainer_rows(out / "trainer")}
        for i, theirs in enumerate(asked.theirs):
            makers[f"foreign{i}"] = partial(foreign_rows, theirs, out / "foreign")
        makers["low_bit"] = lambda: low_bit_rows(out / "low-bit")
        makers["trl"] = lambda: trl_rows(out / "trl")
        if find_spec("lightning"):  # in the environment of the newest versions
            from accelerate_runs import rows as accelerate_rows
            from lightning_runs import rows as lightning_rows
            from trainer_processes import rows as processes_rows

            makers |= {"lightning": lambda: lightning_rows(out / "l"), "accelerate": lambda: accelerate_rows(out / "a")}
            makers["processes"] = processes_rows
        for name in asked.only or makers:
            for row in makers[name]():
                print(json.dumps(row), file=printed, flush=True)
    if asked.keep is not None and not asked.only:
        keep(asked.keep)


if __name__ == "__main__":
    main()
