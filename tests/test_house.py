"""The house stands: floors, what an import costs and brings along, and the size of the base class.

The floors are read from the source by an ast walk, so an import inside a function counts as well.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "apollo_optim"
FLOORS = {"core": 0, "rules": 1, "quant": 1, "optim": 2, "data": 3, "plan": 3, "parallel": 3, "train": 4, "bench": 4}
FLOORS |= {"cli": 6}
# `import apollo_optim` is the library: these rooms, and nothing that they would have to drag in.
LIBRARY = {"core", "rules", "optim", "quant"}
MOST_LINES = 300
TOO_LONG = {  # rooms that are still to be cleared
    "bench/low_bit_formats.py",
    "bench/memory.py",
    "bench/report.py",
    "bench/step.py",
}


def imported_modules(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Every absolute name that `module` (a dotted path; packages end in `.__init__`) imports, with its line."""
    package = module.rpartition(".")[0].split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            # `from apollo_optim import core` and `from .. import core` name rooms, too.
            names = [f"{target}.{alias.name}" for alias in node.names] if target == "apollo_optim" else [target]
            yield from ((node.lineno, name) for name in names)


def broken_floors(source: str, module: str) -> list[str]:
    """What in `module` breaks the floors, one line each."""
    room = module.split(".")[1]
    problems = []
    for line, name in imported_modules(source, module):
        parts = name.split(".")
        if parts[0] != "apollo_optim" or len(parts) == 1:
            continue
        # What the package re-exports (`from apollo_optim import Apollo`) is the library's floor.
        other = parts[1] if parts[1] in FLOORS else "optim"
        if room == "__init__":
            allowed = other in LIBRARY
        else:
            lower = FLOORS[other] < FLOORS[room]
            allowed = lower or other == room or (room, other) == ("bench", "train")
        if not allowed:
            problems.append(f"{module}:{line} imports {name}")
    return problems


def modules() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_floors() -> None:
    problems = [problem for path, module in modules() for problem in broken_floors(path.read_text(), module)]
    assert not problems, "\n".join(problems)


def test_every_room_has_a_floor() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(FLOORS), f"rooms without a floor: {rooms - set(FLOORS)}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("apollo_optim.core.matrix", "from apollo_optim.optim import apply"),
        ("apollo_optim.core.matrix", "from ..rules.base import Rule"),
        ("apollo_optim.core.matrix", "from apollo_optim import Apollo"),
        ("apollo_optim.optim.apply", "def f():\n    from .. import data"),
        ("apollo_optim.rules.apollo", "import apollo_optim.quant.format"),
        ("apollo_optim.rules.apollo", "from apollo_optim.optim.apply import Static"),
        ("apollo_optim.data.__init__", "from ..train.config import RunConfig"),
        ("apollo_optim.train.loop", "from apollo_optim.bench.report import read_run"),
        ("apollo_optim.__init__", "from .train import loop"),
    ],
)
def test_a_broken_floor_is_seen(module: str, source: str) -> None:
    assert broken_floors(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("apollo_optim.bench.report", "from apollo_optim.train.config import RunConfig"),
        ("apollo_optim.rules.apollo", "from .base import Rule\nfrom ..core import matrix\nimport torch"),
        ("apollo_optim.cli.main", "from apollo_optim import list_optimizers\nfrom ..train.loop import pretrain"),
        ("apollo_optim.__init__", "from .optim.classes import Apollo"),
    ],
)
def test_a_sound_floor_is_left_alone(module: str, source: str) -> None:
    assert not broken_floors(source, module)


def test_core_uses_torch_alone_and_neither_nn_nor_optim() -> None:
    stdlib = sys.stdlib_module_names | {"torch", "apollo_optim"}
    for path, module in modules():
        if module.split(".")[1] not in LIBRARY:
            continue
        for line, name in imported_modules(path.read_text(), module):
            assert name.split(".")[0] in stdlib, f"{module}:{line} imports {name}"
            if module.startswith("apollo_optim.core."):
                assert not name.startswith(("torch.nn", "torch.optim")), f"{module}:{line} imports {name}"


def test_nothing_pickles() -> None:
    """Checkpoints are safetensors and JSON. (torch.load elsewhere would need a very good reason.)"""
    for path, _ in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                assert called not in {"torch.save", "torch.load", "pickle.load", "pickle.dump", "yaml.load"}, (
                    f"{path.relative_to(ROOT)}:{node.lineno} uses {called}"
                )


def test_files_stay_small() -> None:
    long = {str(path.relative_to(PACKAGE)) for path, _ in modules() if len(path.read_text().splitlines()) > MOST_LINES}
    assert long <= TOO_LONG, f"more than {MOST_LINES} lines: {sorted(long - TOO_LONG)}"


def circles(sources: dict[str, str]) -> set[tuple[str, ...]]:
    """Modules (their sources by dotted path) that import each other, directly or around; sorted names.

    What only type checkers import (`if TYPE_CHECKING`) is not counted, imports inside of functions are.
    """
    imports = {
        module: {name for name in runtime_imports(source, module) if name in sources and name != module}
        for module, source in sources.items()
    }
    reached = {module: reach(imports, module) for module in imports}
    return {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in imports
        if module in reached[module]
    }


def reach(imports: dict[str, set[str]], start: str) -> set[str]:
    """All that a module imports, in the end."""
    reached, waiting = set(), list(imports[start])
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += imports[module]
    return reached


def runtime_imports(source: str, module: str) -> set[str]:
    """The modules that a module imports when it runs; of `from package import name`, the module `package.name`, too."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    package = module.rpartition(".")[0].split(".")
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names |= {target, *(f"{target}.{alias.name}" for alias in node.names)}
    return names


def test_no_circles() -> None:
    sources = {module: path.read_text() for path, module in modules() if not module.endswith("__init__")}
    assert not circles(sources)


def test_a_circle_is_seen() -> None:
    a, b, c = "apollo_optim.core.a", "apollo_optim.core.b", "apollo_optim.core.c"
    around = {a: "from .b import x", b: "def f():\n    from apollo_optim.core import c", c: f"import {a}"}
    assert circles(around) == {(a, b, c)}
    around[c] = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import apollo_optim.core.a"
    assert not circles(around)


def private_names(source: str, module: str) -> list[str]:
    """What a module takes of others that begins with an underscore: by import, or as an attribute of a module."""
    tree, ours, found = ast.parse(source), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("apollo_optim")):
            found += [f"{module}:{node.lineno} {alias.name}" for alias in node.names if is_private(alias.name)]
            ours |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            found += [f"{module}:{node.lineno} {node.value.id}.{node.attr}"] * is_private(node.attr)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_nobody_takes_private_names_of_others() -> None:
    problems = [problem for path, module in modules() for problem in private_names(path.read_text(), module)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "source",
    ["from .b import _x", "from apollo_optim.core import b\nb._x()", "from . import b\ndef f():\n    b._x = 1"],
)
def test_a_private_name_is_seen(source: str) -> None:
    assert private_names(source, "apollo_optim.core.a")
    assert not private_names(source.replace("_x", "x").replace("._", "."), "apollo_optim.core.a")


FRESH = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import apollo_optim
apollo_optim.Apollo, apollo_optim.build_optimizer  # whatever is lazy is loaded by a first use
print(json.dumps({"seconds": time.process_time() - start, "new": sorted(set(sys.modules) - before)}))
"""


def test_import_is_cheap_and_brings_nothing_along() -> None:
    # Seconds of processor time, the better of two: another program on the machine is not our import's cost.
    runs = [json.loads(run_python("-c", FRESH)) for _ in range(2)]
    ours = sys.stdlib_module_names | {"apollo_optim", "torch"}
    foreign = [name for name in runs[0]["new"] if name.split(".")[0] not in ours]
    assert not foreign, f"import apollo_optim also imports {foreign}"
    seconds = min(run["seconds"] for run in runs)
    assert seconds <= 0.15, f"import apollo_optim takes {seconds:.2f} s"


def run_python(*words: str) -> str:
    return subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True, cwd=ROOT).stdout
