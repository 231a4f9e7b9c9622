"""What is asked of which command with which input: all of it follows from a number."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from tools.fuzz.changes import NAMES, harm, header, odd_key, odd_yaml, replaced
from tools.fuzz.stage import Case, Stage


def case_of(stage: Stage, number: int, seed: int, kind: str | None = None) -> Case:
    """Input number `number`, made in the stage's working copy; `kind`: one of `WEIGHTS` alone, by name."""
    chance = random.Random(f"{seed}/{number}")
    stage.fresh()
    makers = {maker: weight for maker, weight in WEIGHTS.items() if kind in (None, maker.__name__)}
    return chance.choices(list(makers), list(makers.values()))[0](stage, chance)


def checked(stage: Stage, chance: random.Random) -> Case:
    """Damage in what has a checksum: a checkpoint, the run's tokenizer, its model."""
    kind = chance.choice(("export", "sample", "sample run", "resume"))
    case = stage.command(kind)
    folders = ["tokenizer", "checkpoints/step-00000004"] if kind != "sample" else ["model"]
    files = [path for folder in folders for path in sorted((stage.work / "run" / folder).iterdir())]
    path = chance.choice(files)
    return case._replace(what=f"{kind}: {harm(path, chance)} in {path.parent.name}/{path.name}")


def resealed(stage: Stage, chance: random.Random) -> Case:
    """A checkpoint that somebody edited, with a manifest that fits: what is in it counts, if it makes sense."""
    from apollo_optim.core.manifest import write_manifest
    from apollo_optim.train.checkpoint.shards import CHECKPOINT

    kind = chance.choice(("export", "sample run", "resume", "resume"))
    case = stage.command(kind)
    point = stage.work / "run/checkpoints/step-00000004"
    path = chance.choice([path for path in sorted(point.iterdir()) if path.name != "manifest.json"])
    how = replaced(path, chance) if path.suffix == ".json" else header(path, chance)
    write_manifest(point, CHECKPOINT, step=4)
    return case._replace(what=f"{kind}: {how} in {path.name}, resealed", judge=None)


def entries(stage: Stage, chance: random.Random) -> Case:
    """Odd things in a run directory."""
    kind = chance.choice(("export", "sample run", "resume"))
    case = stage.command(kind)
    folder = stage.work / "run" / chance.choice((".", "checkpoints", "checkpoints/step-00000004", "tokenizer"))
    name = chance.choice(
        ("model", "x.json", "weights-00002-of-00002.safetensors", ".tmp-x", "step-00000099", "latest", "é", "report")
    )
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    made = {
        "a file": lambda: path.write_bytes(chance.randbytes(9)),
        "a folder": path.mkdir,
        "a FIFO": lambda: os.mkfifo(path),
        "a link to nothing": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to("."),
        "a link to zero": lambda: path.symlink_to("/dev/zero"),
    }
    how = chance.choice(list(made))
    made[how]()
    return case._replace(what=f"{kind}: {how} at {folder.name}/{name}")


def run_file(stage: Stage, chance: random.Random) -> Case:
    """RUN/config.yaml or a run file that was edited, by hand or by a bit."""
    path = stage.work / "run" / "config.yaml"
    how = chance.choice((odd_yaml, odd_key, harm))(path, chance)
    if chance.random() < 0.5:
        return stage.command("resume")._replace(what=f"resume: {how} in config.yaml", judge=None)
    planned = ["plan", str(path), "--optimizer", "adamw"]
    words = planned if chance.random() < 0.5 else stage.pretrain("new", "--config", str(path), "--train.steps", "1")
    return Case(words, f"{words[0]}: {how} in a run file")


def log(stage: Stage, chance: random.Random) -> Case:
    """A log that was edited, cut, or is something else."""
    path = stage.work / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    at = chance.randrange(len(lines))
    how = line_replaced(stage, path, at, chance) if chance.random() < 0.6 else harm(path, chance)
    if chance.random() < 0.4:
        return stage.command("resume")._replace(what=f"resume: {how} in metrics.jsonl")
    return Case(["report", str(stage.work / "run")], f"report: {how} in metrics.jsonl")


def line_replaced(stage: Stage, path: Path, at: int, chance: random.Random) -> str:
    """An odd value in line `at` of JSON lines. Returns what was done."""
    lines, one = path.read_bytes().splitlines(), stage.work / "line.json"
    one.write_bytes(lines[at])
    how = replaced(one, chance)
    lines[at] = one.read_bytes()
    path.write_bytes(b"\n".join(lines) + b"\n")
    return how


def foreign(stage: Stage, chance: random.Random) -> Case:
    """Somebody's model, which has no manifest."""
    path = chance.choice(sorted((stage.work / "model").iterdir()))
    change = (
        replaced
        if path.suffix == ".json" and chance.random() < 0.7
        else header
        if path.suffix == ".safetensors"
        else harm
    )
    how = change(path, chance)
    model = str(stage.work / "model")
    words = {
        "sample": ["sample", model, "--max-tokens", "2", "--prompt", "line"],
        "plan": ["plan", model, "--optimizer", "adamw", "--seq", "8"],
        "pretrain": stage.pretrain(
            "new",
            "--train.steps",
            "1",
            "--model.name",
            model,
            "--model.config",
            "{}",
            "--model.pretrained",
            "true",
            "--data.tokenizer",
            model,
        ),
    }
    kind = chance.choices(list(words), (5, 3, 2))[0]
    return Case(words[kind], f"{kind}: {how} in a model's {path.name}")


def text(stage: Stage, chance: random.Random) -> Case:
    """Damaged text, odd files among it."""
    path = chance.choice(sorted((stage.work / "text").iterdir()))
    suffix = chance.choice((".txt", ".jsonl", ".jsonl.gz", ".parquet", ".md", ".py", ".json.gz"))
    odd = path.with_name(chance.choice(NAMES).replace("/", "_")[:200] + suffix)
    path.rename(odd)
    how = harm(odd, chance)
    source = chance.choice(("", "*", "**", "**/*.txt", odd.name))
    more = ["--data.source", str(stage.work / "text" / source), "--train.steps", "1"]
    return Case(stage.pretrain("new", *more), f"pretrain: {how} in {odd.name!r}, source {source!r}")


def answers(stage: Stage, chance: random.Random) -> Case:
    """Damaged questions and answers, to be fine-tuned on or looked at."""
    path = chance.choice(sorted((stage.work / "answers").iterdir()))
    at = chance.randrange(len(path.read_bytes().splitlines()))
    how = line_replaced(stage, path, at, chance) if chance.random() < 0.6 else harm(path, chance)
    mode, bad = chance.choice(("pack", "pad")), chance.choice(("error", "skip"))
    keys = ["--data.source", str(path), "--data.mode", mode, "--data.on_bad_line", bad]
    if chance.random() < 0.5:
        return Case(stage.finetune("new", *keys), f"finetune: {how} in {path.name}, {mode}, {bad}")
    config = stage.work / "answers.yaml"
    config.write_text(f"data: {{format: auto}}\nmodel: {{name: {stage.work / 'model'}}}\n")
    words = ["data", str(config), "--rows", "2", *keys]
    return Case(
        [*words, "--data.seq_len", "256", "--data.validation_percent", "20"],
        f"data: {how} in {path.name}, {mode}, {bad}",
    )


def names(stage: Stage, chance: random.Random) -> Case:
    """Odd names through every command."""
    name, run = chance.choice(NAMES), str(stage.work / "run")
    command = chance.choice(
        ("report", "export", "sample", "plan", "pretrain", "optimizers", "bench", "--out", "model", name)
    )
    if command == "--out":
        return Case(stage.pretrain(name.replace("/", "_") or "x", "--train.steps", "1"), f"pretrain --out {name!r}")
    if command == "model":
        odd = stage.work / (name.replace("/", "_") or "x")
        (stage.work / "model").rename(odd) if not odd.exists() else None
        return Case(["sample", str(odd), "--max-tokens", "1"], f"sample {name!r}")
    words = [
        command,
        *chance.choices(
            (name, run, "--out", "--step", "--prompt", "--config", "--model.name", "--seed", "4", "-1"), k=3
        ),
    ]
    keep = ["--train.steps", "1", "--out", str(stage.work / "new")] if command == "pretrain" else []
    return Case([*words, *keep], f"{command} {words[1:]!r}".replace(str(stage.root), "."))


WEIGHTS = {checked: 25, resealed: 15, entries: 10, run_file: 10, log: 12, foreign: 12, text: 8, names: 8, answers: 10}
