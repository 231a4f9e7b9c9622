"""`apollo-optim pretrain`: a run file, changed key by key on the command line."""

import argparse
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.errors import InputError, nearest
from ..train.config import RunConfig, key_types, read_run_file
from ..train.config import make_parser as key_parser
from ..train.config import parse as configured
from .words import CONSENT, CONSENT_HELP, Parser, complain, home

PROG = "apollo-optim pretrain"
USAGE = "[--config RUN.yaml] [--out DIR] [--resume] [--section.key VALUE ...]"
DESCRIPTION = """\
Train a causal language model. A run is a YAML file with the sections below; every key of it can be changed on the
command line, and the file is not needed at all: without it, a small LLaMA learns Python from the standard library.

The run directory gets config.yaml (what was really run), metrics.jsonl (every figure), checkpoints/ and, at the end,
model/ (a Hugging Face directory). Ctrl-C saves before it stops."""
EPILOG = """\
examples:
  apollo-optim pretrain --out out/first
  apollo-optim pretrain --config runs/llama-60m-apollo.yaml --out out/60m       C4 from the hub, for a GPU
  apollo-optim pretrain --config runs/llama-60m-apollo.yaml --optim.lr 5e-3 --train.steps 2000 --out out/60m-short
  apollo-optim pretrain --optim.name adamw --optim.lr 2e-3 --optim.rest_lr 8e-2 --out out/adamw
  apollo-optim pretrain --data.source 'notes/*.md' --model.name llama-1m --out out/notes
  apollo-optim pretrain --out out/first --resume        go on after a stop, exactly where it was
  torchrun --nproc-per-node 2 -m apollo_optim pretrain --parallel.mode fsdp2      the same run in two processes
  apollo-optim report out/first out/adamw               compare the results

A list is written [a, b]; null asks for the default."""
FLAGS = ("--config", "--resume", CONSENT, "--help", "--print_config")


@dataclass(frozen=True)
class Story:
    """The words of a command that runs a run file, and what a run file begins with."""

    prog: str
    description: str
    epilog: str
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of keys, by section, where they are not those of all run files."""

    @property
    def usage(self) -> str:
        """The first line of its help."""
        return f"{self.prog} {USAGE}"


PRETRAIN = Story(PROG, DESCRIPTION, EPILOG)


def run(argv: Sequence[str]) -> int:
    from ..train.pretrain import pretrain

    return run_story(pretrain, argv, PRETRAIN)


def run_story(tell: Callable[..., object], argv: Sequence[str], story: Story) -> int:
    """Do what the words ask for; `tell`: `pretrain` or another one of the same arguments."""
    asked = parse(argv, story)
    from ..parallel.world import ProcessLost, restarted
    from ..train.failures import TrainingFailed
    from ..train.record import lost
    from ..train.run_dir import was_begun

    try:
        resume = asked.resume or (restarted(asked.cfg.parallel.timeout) and was_begun(asked.cfg))
        tell(asked.cfg, resume=resume, trust_remote_code=asked.trust_remote_code)
    except ProcessLost as error:
        return complain(lost(error), 1)
    except TrainingFailed as error:
        return complain(error, 1)
    return 0


class Asked(NamedTuple):
    """What the words ask for."""

    cfg: RunConfig
    resume: bool
    """Go on with an old run."""
    trust_remote_code: bool
    """Said on this command line, and nowhere else."""


def parse(argv: Sequence[str], story: Story = PRETRAIN) -> Asked:
    """The run that the words ask for."""
    check_words(list(argv), story.prog)
    given, words = flags_of(argv, story.prog)
    files = given.config
    if given.resume and not files and given.out:
        files = [str(home(given.out) / "config.yaml")]  # the run directory knows what was run
        if not os.path.exists(files[0]):
            from ..train.run_dir import nothing_to_resume

            raise InputError(f"--out {nothing_to_resume(home(given.out))}")
    if given.out is not None:
        words += ["--out", given.out]
    lengths = {word.partition("=")[0] for word in words} & {"--train.steps", "--train.epochs"}
    if len(lengths) == 2:
        raise InputError("--train.steps and --train.epochs: one of them says how long the run is; leave one out")
    data: dict[str, Any] = {}
    for path in files:  # a later file changes keys of an earlier one
        for name, section in read_run_file(path).items():
            both = isinstance(section, dict) and isinstance(data.get(name), dict)
            data[name] = {**data[name], **section} if both else section
    train = data.get("train") or {}
    if "--train.steps" in lengths:  # they take the place of the file's epochs
        data["train"] = {**train, "epochs": None}
    elif train.get("steps"):
        data["train"] = {"epochs": None, **train}
    for name, section in story.defaults.items():
        data[name] = {**section, **(data.get(name) or {})}
    cfg = configured(data, words, make_parser(story), ", ".join(files))
    return Asked(cfg, given.resume, given.trust_remote_code)


def flags_of(words: Sequence[str], prog: str = PROG) -> tuple[argparse.Namespace, list[str]]:
    """What has to be known before the types are looked at, and the words that are left."""
    parser = Parser(prog, "", add_help=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--out")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(CONSENT, action="store_true")
    return parser.parse_known_args(list(words))


def make_parser(story: Story = PRETRAIN) -> Any:
    """The parser of a run file's keys, with the command's own words."""
    parser = key_parser(prog=story.prog, usage=story.usage, description=story.description, epilog=story.epilog)
    parser.add_argument("--config", action="config", metavar="RUN.yaml", help="the run file")
    resume = "go on with the run in --out from its last checkpoint; without --config, as its config.yaml says"
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument(CONSENT, action="store_true", help=CONSENT_HELP)
    return parser


def check_words(words: list[str], prog: str = PROG) -> None:
    """Refuse a key that does not exist, with the nearest that does."""
    known = key_types()
    valid = [*FLAGS, *(f"--{key}" for key in known)]
    free = tuple(f"--{key}." for key, kind in known.items() if typing.get_origin(kind) is dict)
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag.rstrip("+") not in valid and not flag.startswith(free):
            same = [key for key in valid if key.rpartition(".")[2] == flag[2:]]  # the section was left out
            near = f" (did you mean {' or '.join(same)}?)" if same else nearest(flag, valid)
            raise InputError(f"unknown key {flag}{near}; see {prog} --help")
