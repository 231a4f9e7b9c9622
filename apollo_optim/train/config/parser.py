"""The keys of a run file - of its sections and of the optimizers' rules - and the parser that knows their types.

What a value may be is asked twice: its type here, of jsonargparse; what it means in `check`, which asks the rules.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

from apollo_optim.core.errors import InputError, nearest
from apollo_optim.optim.recipes import list_optimizers
from apollo_optim.rules import RULES, Rule
from apollo_optim.train.config.sections import OptimConfig, RunConfig

Value = bool | int | float | str | tuple[float | str, ...] | None  # of a rule's knob: the rule knows what it may be
KEYS: dict[str, Any] = typing.get_type_hints(RunConfig)
SECTIONS: dict[str, Any] = {key: hint for key, hint in KEYS.items() if dataclasses.is_dataclass(hint)}


def key_types(section: str | None = None) -> dict[str, Any]:
    """The keys of a section - or of all of them, dotted - with their types."""
    if section is None:
        dotted = {f"{name}.{key}": hint for name in SECTIONS for key, hint in key_types(name).items()}
        return dotted | {key: hint for key, hint in KEYS.items() if key not in SECTIONS}
    hints = typing.get_type_hints(SECTIONS[section])
    if SECTIONS[section] is OptimConfig:
        del hints["knobs"]
        hints |= {key: Value for rule in RULES.values() for key in rule.knobs() if key not in hints}
    return hints


def knob_help() -> dict[str, str]:
    """What every knob of every rule means, rule by rule: its docstring, what it may be, and its default."""
    told: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for recipe in (recipe for recipe in list_optimizers() if recipe.name in RULES):
        for field in dataclasses.fields(recipe.cls):
            doc, wanted = field.metadata["doc"], field.metadata["kind"].wanted
            default = plain(recipe.defaults[field.name]) if field.name in recipe.defaults else "none"
            told.setdefault(field.name, {}).setdefault((doc, wanted), {})[recipe.name] = default
    return {key: " ".join(_meaning(*said, of) for said, of in meanings.items()) for key, meanings in told.items()}


def _meaning(doc: str, wanted: str, defaults: dict[str, str]) -> str:
    same = len(set(defaults.values())) == 1
    default = next(iter(defaults.values())) if same else ", ".join(f"{name} {x}" for name, x in defaults.items())
    return f"{', '.join(defaults)}: {doc} ({wanted}; default: {default})"


def plain(value: Any) -> str:
    """As a run file would write it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(plain, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def make_parser(**about: Any) -> Any:
    """A jsonargparse parser of every key, with types and docstrings of the sections and of the rules' fields."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

    told = {f"optim.{key}": text for key, text in knob_help().items()}

    class Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """jsonargparse's types and defaults, but for knobs; a description's lines stand as they are."""

        def _get_help_string(self, action: argparse.Action) -> str:
            return told.get(action.dest) or str(super()._get_help_string(action))

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, formatter_class=Help, **about)
    parser.add_argument("--out", type=str | None, help="the run directory; null: out/<model>-<optimizer>")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name, skip={"knobs"} if section is OptimConfig else None)
        if section is OptimConfig:
            title = "Knobs of the optimizer's rule: which rules know it, what it may be, and its default"
            group = parser.add_argument_group(title)
            for key in (key for key in key_types(name) if key not in section.__dataclass_fields__):
                group.add_argument(f"--{name}.{key}", type=Value, help=key)
    for action in parser._actions:
        # jsonargparse also offers `--model FILE`, a file for one section: one way to name a run is enough.
        if action.dest in SECTIONS:
            action.help = argparse.SUPPRESS
    return parser


@functools.lru_cache(4)
def _plain_parser(rules: tuple[type[Rule], ...]) -> Any:
    return make_parser()


def parse(data: dict[str, Any], words: Sequence[str] = (), parser: Any = None, where: str = "") -> RunConfig:
    """The run that a file's plain data and a command's words ask for; what neither says is as by default.

    Raises InputError for an unknown key, naming the nearest, and for a value of another type; `where` it was read.
    """
    parser = parser or _plain_parser(tuple(RULES.values()))
    try:
        check_names(data)
        values = _typed(parser.parse_object, {key: value for key, value in data.items() if value is not None})
    except InputError as error:
        raise InputError(f"{where}: {error}" if where else str(error)) from None
    if words:
        values = _typed(functools.partial(parser.parse_args, namespace=values), list(words))
    found = values.as_dict()
    sections = {name: section(**found[name]) for name, section in SECTIONS.items() if section is not OptimConfig}
    return RunConfig(**sections, optim=OptimConfig.of(**found["optim"]), out=found["out"])


def _typed(parsed: Callable[[Any], Any], given: Any) -> Any:
    """jsonargparse's values, its complaints in one line."""
    try:
        values = parsed(given)
    except argparse.ArgumentError as error:
        raise InputError(one_line(error)) from None
    for key, hint in key_types().items():  # it takes None for a missing value, whatever the type
        if values.get(key) is None and type(None) not in typing.get_args(hint):
            raise InputError(f"{key}: a value is missing")
    return values


def check_names(data: dict[str, Any]) -> None:
    """Refuse a key that no section has, naming the nearest."""
    for name, section in data.items():
        if name not in KEYS:
            raise InputError(f"unknown key {name}{nearest(name, KEYS)}")
        if name not in SECTIONS or section is None:
            continue
        if not isinstance(section, dict):
            raise InputError(f"{name}: expected keys and values, not {section!r}")
        for key in section:
            if key not in (known := key_types(name)):
                raise InputError(f"unknown key {name}.{key}{nearest(key, known, name + '.')}")


def one_line(error: argparse.ArgumentError) -> str:
    """jsonargparse explains a value that does not fit in ten lines; a person needs the key, the value and the type."""
    message, types = str(error), key_types()
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    if key and value and key[1] in types:
        kind = types[key[1]]
        name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        return f"{key[1]}={value[1]}: expected {name.replace('NoneType', 'None').replace('None', 'null')}"
    return " ".join(message.split())
