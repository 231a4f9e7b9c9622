"""A run, its text and its model, made once; a command on them in a process of its own; and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

FAULTS = ("traceback", "hang", "silent")
LIMIT = 120  # seconds for one input: the slowest takes five on an idle machine
MEMORY = 16 << 30  # bytes of address space
TINY = {
    "model.name": "llama-1m",
    "model.config": "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1}",
    "data.seq_len": 32,
    "data.vocab_size": 300,
    "data.validation_percent": 20,
    "train.batch_size": 2,
    "train.threads": 1,
    "eval.tokens": 128,
    "eval.every": "null",
    "checkpoint.every": 2,
    "log.every": 1,
    "log.display": "plain",
    "schedule.kind": "constant",
    "schedule.warmup": 0,
    "optim.compile": "false",
}


class Case(NamedTuple):
    """What is asked of the command."""

    words: list[str]
    what: str
    """The input, in words."""
    judge: Callable[[], str] | None = None
    """A digest of the result, to be compared with that of the untouched input; None: what is in it counts."""
    wanted: str = ""
    """That digest."""


@dataclass
class Stage:
    """A run, its text and its model, made once; inputs work on a copy."""

    root: Path
    wanted: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = self.base / "text"
        text.mkdir(parents=True)
        for i in range(40):
            (text / f"{i}.txt").write_text(f"line {i} of some words that differ {i * i}\n" * 20)
        (text / "lines.jsonl").write_text("".join(json.dumps({"text": f"record {i} " * 30}) + "\n" for i in range(20)))
        rows = self.base / "answers"
        rows.mkdir()
        pairs = [(f"what is {i} and {i}?", f"{i} and {i} is {2 * i}") for i in range(60)]
        shapes: dict[str, Callable[[str, str], object]] = {
            "pairs": lambda asked, said: {"prompt": asked, "completion": said},
            "alpaca": lambda asked, said: {"instruction": asked, "input": "", "output": said},
        }
        for name, shape in shapes.items():
            (rows / f"{name}.jsonl").write_text("".join(json.dumps(shape(*pair)) + "\n" for pair in pairs))
        self.fresh()
        code, said = in_a_fork(self.pretrain("run", "--train.steps", "4"))
        assert code == 0, said
        shutil.copytree(self.work / "run", self.base / "run", symlinks=True)
        shutil.copytree(
            self.work / "run" / "model", self.base / "model", ignore=shutil.ignore_patterns("manifest.json")
        )
        for kind in ("export", "sample", "sample run", "resume"):
            self.fresh()
            case = self.command(kind)
            code, said = in_a_fork(case.words)
            assert code == 0, said
            self.wanted[kind] = case.judge() if case.judge else ""

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def fresh(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.base, self.work, symlinks=True)

    def pretrain(self, out: str, *more: str) -> list[str]:
        words = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
        text, cache = str(self.work / "text"), str(self.root / "cache")
        return [
            "pretrain",
            "--out",
            str(self.work / out),
            *words,
            "--data.source",
            text,
            "--data.cache_dir",
            cache,
            *more,
        ]

    def finetune(self, out: str, *more: str) -> list[str]:
        model = ["--model.name", str(self.work / "model"), "--model.config", "{}", "--train.steps", "2"]
        _, *words = self.pretrain(out, *model, "--data.seq_len", "256", "--data.tokenizer", model[1], *more)
        return ["finetune", *words]

    def command(self, kind: str) -> Case:
        """A command on the run, and how to tell whether its result is the right one."""
        run, out = str(self.work / "run"), self.work / "out"
        wanted = self.wanted.get(kind, "")
        if kind == "export":
            return Case(["export", run, "--out", str(out)], "", lambda: digest(out), wanted)
        if kind in ("sample", "sample run"):
            if kind == "sample run":
                shutil.rmtree(self.work / "run" / "model", ignore_errors=True)
            return Case(
                ["sample", run, "--max-tokens", "5", "--temperature", "0", "--prompt", "line 1 of"], "", stdout, wanted
            )
        last = self.work / "run" / "checkpoints" / "step-00000006"
        return Case(
            ["pretrain", "--out", run, "--resume", "--train.steps", "6"], "", lambda: digest(last, "weights-*"), wanted
        )


def digest(folder: Path, pattern: str = "*") -> str:
    """Of what is in a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


OUTPUT: dict[str, str] = {}


def stdout() -> str:
    return OUTPUT["stdout"]


def in_a_fork(words: list[str], limit: float = LIMIT) -> tuple[int | None, str]:
    """The command in a process of its own: its exit code, None if it hung, and what it said on stderr."""
    from apollo_optim.cli.main import main

    files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 (closed below)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 70
        try:
            for number, file in enumerate(files):
                os.dup2(file.fileno(), number)
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
            os.chdir(tempfile.mkdtemp(dir=os.environ["FUZZ_ROOT"]))
            code = main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + limit
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < end:
        time.sleep(0.01)
    hung = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    if hung:
        os.kill(child, 9)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for name, file in zip(("stdout", "stderr"), files[1:], strict=True):
        file.seek(0)
        OUTPUT[name] = file.read().decode(errors="replace")
        file.close()
    return (None if hung else code), OUTPUT["stderr"]


def outcome(case: Case, code: int | None, said: str) -> str:
    """What came of it."""
    if code is None:
        return "hang"
    if "Traceback" in said or code not in (0, 1, 2):
        return "traceback"
    if code:  # one line, whatever was noted before
        return (
            "refused"
            if sum(line.startswith(("error: ", "usage: ")) for line in said.splitlines()) <= 1
            else "traceback"
        )
    if case.judge is None:
        return "as it says"
    if case.judge() == case.wanted:
        return "right"
    return "said" if "not bit-for-bit equal" in said or "was a link" in said else "silent"
