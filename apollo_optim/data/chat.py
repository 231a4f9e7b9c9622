"""Questions and answers in the shapes that are about, each brought to one of two: turns of a chat, or a plain pair.

A document of a corpus is then one JSON object: `at` (file and line; the file left out where there is one alone), and
`messages` (a list of role and content), `plain` (prompt and completion), or both, where a tokenizer without a chat
template can do with the plain one. Of messages that end with a given completion, `answers` says how many it has.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from apollo_optim.core.errors import InputError, nearest
from apollo_optim.data.readers import BadRecord, Reading, kind_in_json

ROLES = ("system", "user", "assistant", "tool")
BEFORE = {"user": ("system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
OTHER_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)

Row = Mapping[str, Any]


def text(row: Row, key: str, *, empty: bool = False) -> str:
    """A string of a row that is not blank, unless it may be (then a missing one is, too). Raises BadRecord."""
    value = row.get(key)
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        missing = key not in row
        raise BadRecord(f"no {key!r}" if missing else f"{key!r} is {kind_in_json(value)}, not a string")
    if not value.strip() and not empty:
        raise BadRecord(f"{key!r} is empty")
    return value


def turns(value: Any, name: str, role_key: str = "role", text_key: str = "content") -> list[dict[str, str]]:
    """The messages of a list, roles by the names that chat templates know. Raises BadRecord, naming the message."""
    if not isinstance(value, list) or not value:
        raise BadRecord(
            f"{name!r} is {kind_in_json(value)}, not a list of messages" if value != [] else f"{name!r} is empty"
        )
    messages = []
    for number, turn in enumerate(value):
        at = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise BadRecord(f"{at} is {kind_in_json(turn)}, not an object with {role_key!r} and {text_key!r}")
        try:
            said, role = text(turn, text_key), text(turn, role_key)
        except BadRecord as error:
            raise BadRecord(f"{at}: {error}") from None
        role = OTHER_NAMES.get(role, role)
        if role not in ROLES:
            raise BadRecord(f"{at}: the role {role!r} is none of {', '.join(ROLES)}")
        messages.append({"role": role, "content": said})
    return messages


def in_order(messages: list[dict[str, str]], name: str) -> list[dict[str, str]]:
    """The same. Raises BadRecord where a message may not follow the one before, and where none is an answer."""
    before = None
    for number, role in enumerate(message["role"] for message in messages):
        may_follow = before in BEFORE.get(role, ()) if before else role in ("system", "user")
        if not may_follow:
            after = f"after {before!r}" if before else "at the beginning"
            raise BadRecord(f"{name}[{number}]: roles out of order, {role!r} {after}")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise BadRecord(f"{name!r} holds no answer (no message of the role assistant)")
    return messages


def _messages(row: Row) -> dict[str, Any]:
    return {"messages": in_order(turns(row["messages"], "messages"), "messages")}


def _sharegpt(row: Row) -> dict[str, Any]:
    said = turns(row["conversations"], "conversations", "from", "value")
    in_order(said, "conversations")
    return {"messages": _system(row) + said}


def _alpaca(row: Row) -> dict[str, Any]:
    asked, given, answer = text(row, "instruction"), text(row, "input", empty=True), text(row, "output")
    plain = WITH_INPUT.format(asked, given) if given.strip() else WITHOUT_INPUT.format(asked)
    asked = f"{asked}\n\n{given}" if given.strip() else asked
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": _system(row) + messages, "plain": [plain, answer]}


def _prompt(row: Row) -> dict[str, Any]:
    if isinstance(row["prompt"], list):  # both as messages
        both = [*turns(row["prompt"], "prompt"), *(answer := turns(row["completion"], "completion"))]
        if answer[0]["role"] != "assistant":
            raise BadRecord(f"completion[0]: the role is {answer[0]['role']!r}, not 'assistant'")
        return {"messages": in_order(both, "prompt + completion"), "answers": len(answer)}
    return {"plain": [text(row, "prompt", empty=True), text(row, "completion")]}


def _system(row: Row) -> list[dict[str, str]]:
    said = text(row, "system", empty=True)
    return [{"role": "system", "content": said}] if said.strip() else []


class Shape(NamedTuple):
    """How a row looks."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]]
    """Raises BadRecord."""


SHAPES = {
    "messages": Shape(("messages",), (), _messages),
    "prompt": Shape(("prompt", "completion"), (), _prompt),
    "alpaca": Shape(("instruction", "output"), ("input", "system"), _alpaca),
    "sharegpt": Shape(("conversations",), ("system",), _sharegpt),
}
COLUMNS = {name for shape in SHAPES.values() for name in (*shape.needed, *shape.optional)}


@dataclass
class ChatReading(Reading):
    """Rows of questions and answers, by `data.format` and `data.columns`."""

    format: str = "auto"
    """A shape, or auto: the first of SHAPES whose columns a row has."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where a shape's column has another name in the file: that name."""

    records_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in COLUMNS:
                hint = nearest(name, COLUMNS) or f" (there are {', '.join(sorted(COLUMNS))})"
                raise InputError(f"data.columns: no shape has a {name!r}{hint}")

    def wanted(self, keys: Iterable[str]) -> list[str]:
        there = set(keys)
        shape = self._shape(there)
        if shape is None:
            return []
        return [key for name in (*shape.needed, *shape.optional) if (key := self._key(name)) in there]

    def text_of(self, record: object, at: str) -> str:
        if not isinstance(record, dict):
            raise BadRecord(f"a JSON object is expected, not {kind_in_json(record)}")
        shape = self._shape(record)
        if shape is None:
            raise BadRecord(self._no_shape(record))
        row = {name: record[key] for name in (*shape.needed, *shape.optional) if (key := self._key(name)) in record}
        return json.dumps({"at": at, **shape.read(row)}, ensure_ascii=False)

    def missing(self, where: str, keys: Iterable[str]) -> InputError:
        return InputError(f"{where}: {self._no_shape(keys)}; set data.format and data.columns")

    def _key(self, name: str) -> str:
        return self.columns.get(name, name)

    def _shape(self, keys: Iterable[str]) -> Shape | None:
        shapes = SHAPES if self.format == "auto" else {self.format: SHAPES[self.format]}
        there = set(keys)
        return next((s for s in shapes.values() if there.issuperset(map(self._key, s.needed))), None)

    def _no_shape(self, keys: Iterable[str]) -> str:
        shapes = SHAPES if self.format == "auto" else {self.format: SHAPES[self.format]}
        known = " or ".join(" + ".join(map(self._key, shape.needed)) for shape in shapes.values())
        return f"no {known}; the keys are {', '.join(sorted(map(str, keys))) or '(none)'}"
