"""How a file is changed: its bytes, a value of its JSON or YAML, the header of its safetensors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud800",
    "../..",
    "/",
    "[/b]",
    "$\\frac$",
    "\x1b]0;t\x07",
    "9" * 5000,
    [],
    {},
    [[]],
    {"": ""},
    [None],
    "float32",
    "null",
    "é",
    "\u202e",
    {"$tensor": "x"},
    {"$dtype": "nn"},
    {"$tuple": 3},
    {"$items": [[[], 1]]},
)
NAMES = (
    "[/b]",
    "$\\frac$",
    "a b",
    "-x",
    "\x1b[2J",
    "é\u202e",
    "x" * 250,
    "<img src=x>|",
    "~",
    "%s{0}",
    "a\nb",
    "*",
    ".",
    "",
    "CON",
)
YAMLS = (
    "[" * 5000,
    "a: &a [*a]",
    "{",
    "!!python/object/apply:os.system [x]",
    "- 1",
    "3",
    "a: b: c",
    "\t",
    "? [a]\n: b",
    "train: {steps: 1e99}",
    "train: {steps: 0x10}",
    "data: {source: [[]]}",
    "optim: {lr: .nan}",
    "optim: {lr: '1'}",
    "model: {config: {a: {}}}",
    "out: 2020-13-41",
    "&x a: *x",
    "train: &t {steps: 1}\neval: *t",
    "\ufeffmodel: {}",
    "model: {name: !!binary aGk=}",
    "log: {to: [null]}",
    "1: 2",
    "null: 1",
    "a: &a [x,x,x,x,x,x,x,x]\n"
    + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefghij", "bcdefghijk", strict=True)),
)


def harm(path: Path, chance: random.Random) -> str:
    """Change the bytes of a file."""
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data)) if data else 0
    how = chance.choice(
        (
            "a bit flipped",
            "a bit flipped",
            "cut",
            "emptied",
            "zeros",
            "bytes put in",
            "a byte doubled",
            "deleted",
            "noise",
        )
    )
    if how == "a bit flipped" and data:
        data[at] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "emptied":
        data.clear()
    elif how == "zeros":
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    elif how == "bytes put in":
        data[at:at] = chance.randbytes(chance.randrange(1, 9))
    elif how == "a byte doubled":
        data[at:at] = data[at : at + 1]
    elif how == "noise":
        data = bytearray(chance.randbytes(chance.randrange(5000)))
    path.unlink() if how == "deleted" else path.write_bytes(bytes(data))
    return f"{how} at {at}"


def replaced(path: Path, chance: random.Random) -> str:
    """Put an odd value in the place of one in a JSON file, or take it out."""
    content = json.loads(path.read_bytes())
    at, name = content, ""
    parents: list[tuple[Any, Any, str]] = []

    def walk(value: Any, prefix: str) -> None:
        for key in value if isinstance(value, dict) else range(min(len(value), 5)) if isinstance(value, list) else ():
            parents.append((value, key, f"{prefix}.{key}"))
            walk(value[key], f"{prefix}.{key}")

    walk(at, "")
    if not parents:
        path.write_text("[]")
        return "[]"
    parent, key, name = chance.choice(parents)
    if chance.random() < 0.2:
        del parent[key]
        how = "taken out"
    else:
        parent[key] = chance.choice(ODD)
        how = repr(parent[key])[:30]
    path.write_text(json.dumps(content))
    return f"{name} {how}"


def odd_yaml(path: Path, chance: random.Random) -> str:
    chosen = chance.choice(YAMLS)
    path.write_text(chosen)
    return repr(chosen[:40])


def odd_key(path: Path, chance: random.Random) -> str:
    import yaml

    content = yaml.safe_load(path.read_text())
    section = chance.choice([key for key, value in content.items() if isinstance(value, dict)])
    key = chance.choice(list(content[section]))
    content[section][key] = value = chance.choice(
        [odd for odd in ODD if not (isinstance(odd, str) and "\ud800" in odd)]
    )
    path.write_text(yaml.safe_dump(content))
    return f"{section}.{key} {value!r:.30}"


def header(path: Path, chance: random.Random) -> str:
    """Change the header of a safetensors file, its length kept true, or its tensors."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if chance.random() < 0.3:
        return harm(path, chance)
    one = path.with_suffix(".header")
    one.write_bytes(data[8 : 8 + size])
    how = replaced(one, chance)
    changed = one.read_bytes()
    one.unlink()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + size :])
    return f"header {how}"
