"""`apollo-optim pretrain`: a run file, changed key by key on the command line."""

import argparse
import dataclasses
import os
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..core.errors import InputError
from ..train.config import RunConfig, from_dict, load_config, read_run_file
from .words import CONSENT, CONSENT_HELP, Parser, complain, home, nearest

PROG = "apollo-optim pretrain"
USAGE = f"{PROG} [--config RUN.yaml] [--out DIR] [--resume] [--section.key VALUE ...]"
DESCRIPTION = """\
Train a causal language model. A run is a YAML file with the sections below; every key of it can be changed on the
command line, and the file is not needed at all: without it, a small LLaMA learns Python from the standard library.

The run directory gets config.yaml (what was really run), metrics.jsonl (every figure), checkpoints/ and, at the end,
model/ (a Hugging Face directory). Ctrl-C saves before it stops."""
EPILOG = """\
examples:
  apollo-optim pretrain
  apollo-optim pretrain --config runs/llama-60m-apollo.yaml --out out/60m
  apollo-optim pretrain --config runs/llama-60m-apollo.yaml --optim.lr 5e-3 --train.steps 2000 --out out/60m-short
  apollo-optim pretrain --optim.name adamw --optim.lr 1e-3 --optim.rest_lr 1e-2 --out out/adamw
  apollo-optim pretrain --data.source 'notes/*.md' --model.name llama-1m --out out/notes
  apollo-optim pretrain --out out/60m --resume          go on after a stop, exactly where it was
  apollo-optim report out/60m out/adamw                 compare the results

A list is written [a, b]; null asks for the default."""
FLAGS = ("--config", "--resume", CONSENT, "--help", "--print_config")


def run(argv: Sequence[str]) -> int:
    asked = parse(argv)
    from ..train.failures import TrainingFailed
    from ..train.pretrain import pretrain

    try:
        pretrain(asked.cfg, resume=asked.resume, trust_remote_code=asked.trust_remote_code)
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


def parse(argv: Sequence[str]) -> Asked:
    """The run that the words ask for."""
    import yaml

    check_words(list(argv))
    given, words = flags_of(argv)
    files = given.config
    if given.resume and not files and given.out:
        files = [str(home(given.out) / "config.yaml")]  # the run directory knows what was run
        if not os.path.exists(files[0]):
            raise InputError(f"--out {given.out}: holds no run to resume; leave --resume out to start one")
    for path in reversed(files):
        load_config(path)  # says which key of the file is wrong, and what was meant
        words = ["--config", yaml.safe_dump(read_run_file(path)), *words]
    if given.out is not None:
        words += ["--out", given.out]
    parser = make_parser()
    try:
        # jsonargparse knows the types: of the file's values as well as of the words.
        found = parser.parse_args(words).as_dict()
    except argparse.ArgumentError as error:
        raise InputError(one_line(error)) from None
    for name in ("config", "print_config", "resume", "trust_remote_code"):
        found.pop(name, None)
    return Asked(from_dict(found), given.resume, given.trust_remote_code)


def flags_of(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What has to be known before the types are looked at, and the words that are left."""
    parser = Parser(PROG, "", add_help=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--out")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(CONSENT, action="store_true")
    return parser.parse_known_args(list(words))


def make_parser() -> Any:
    """A jsonargparse parser over `RunConfig`: its sections, types and docstrings are the command's."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    class Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """jsonargparse's types and defaults below a description whose lines stand as they are."""

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=PROG,
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        exit_on_error=False,
        formatter_class=Help,
    )
    parser.add_argument("--config", action="config", metavar="RUN.yaml", help="the run file")
    resume = "go on with the run in --out from its last checkpoint; without --config, as its config.yaml says"
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument(CONSENT, action="store_true", help=CONSENT_HELP)
    parser.add_class_arguments(RunConfig)
    for action in parser._actions:
        # jsonargparse also offers `--model FILE`, a file for one section: one way to name a run is enough.
        if action.dest in RunConfig.__dataclass_fields__ and action.dest != "out":
            action.help = argparse.SUPPRESS
    return parser


def check_words(words: list[str]) -> None:
    """Refuse a key that does not exist, with the nearest that does."""
    valid = [*FLAGS, *(f"--{key}" for key, _ in keys(RunConfig))]
    free = tuple(f"--{key}." for key, kind in keys(RunConfig) if typing.get_origin(kind) is dict)
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag.rstrip("+") not in valid and not flag.startswith(free):
            same = [key for key in valid if key.rpartition(".")[2] == flag[2:]]  # the section was left out
            near = f" (did you mean {' or '.join(same)}?)" if same else nearest(flag, valid)
            raise InputError(f"unknown key {flag}{near}; see {PROG} --help")


def keys(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a configuration with its type."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def one_line(error: argparse.ArgumentError) -> str:
    """jsonargparse explains a value that does not fit in ten lines; a person needs the key, the value and the type."""
    import re

    message = str(error)
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    types = dict(keys(RunConfig))
    if key and value and key[1] in types:
        kind = types[key[1]]
        name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        return f"{key[1]}={value[1]}: expected {name.replace('NoneType', 'None').replace('None', 'null')}"
    return " ".join(message.split())
