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

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, BENCHMARKS = ROOT / "apollo_optim", ROOT / "benchmarks"
FLOORS = {"core": 0, "rules": 1, "quant": 1, "optim": 2, "data": 3, "plan": 3, "parallel": 3, "train": 4, "report": 4}
FLOORS |= {"integrations": 5, "cli": 6}
# `import apollo_optim` is the library: these rooms, and nothing that they would have to drag in.
LIBRARY = {"core", "rules", "optim", "quant"}
MOST_LINES = 300


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
        if parts[0] == "benchmarks":  # above all floors, and not in the wheel: `bench` of the command finds it there
            problems.append(f"{module}:{line} imports {name}")
        if parts[0] != "apollo_optim" or len(parts) == 1:
            continue
        # What the package re-exports (`from apollo_optim import Apollo`) is the library's floor.
        other = parts[1] if parts[1] in FLOORS else "optim"
        if room == "__main__":
            allowed = True  # the command, under the package's name
        elif room == "__init__":
            allowed = other in LIBRARY
        else:
            lower = FLOORS[other] < FLOORS[room]
            allowed = (lower and other != "integrations") or other == room  # those are imported by their users alone
        if not allowed:
            problems.append(f"{module}:{line} imports {name}")
    return problems


def modules(*folders: Path) -> Iterator[tuple[Path, str]]:
    """The files of the package, or of these folders, and the names of their modules."""
    for folder in folders or (PACKAGE,):
        for path in sorted(folder.rglob("*.py")):
            yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_floors() -> None:
    problems = [problem for path, module in modules() for problem in broken_floors(path.read_text(), module)]
    assert not problems, "\n".join(problems)


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Modules that can be reached from themselves."""

    def reached(start: str) -> set[str]:
        found, waiting = set[str](), [start]
        while waiting:
            new = imports[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    return [name for name in imports if name in reached(name)]


def imports_at_run_time() -> dict[str, set[str]]:
    """What every module imports of the package, inside functions too, but not for its types alone."""
    paths = {module.removesuffix(".__init__"): path for path, module in modules(PACKAGE, BENCHMARKS)}
    found = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = [ast.Pass()]
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        names = set[str]()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
                inner = {f"{target}.{alias.name}" for alias in node.names}
                names |= inner & paths.keys() or {target}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[name] = (names & paths.keys()) - {name}
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert not circles(imports_at_run_time())


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert "apollo_optim.train.loop" in imports_at_run_time()["apollo_optim.train.pretrain"]


def test_the_loop_fits_a_screen() -> None:
    assert len((PACKAGE / "train" / "loop.py").read_text().splitlines()) <= 120


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
        ("apollo_optim.train.loop", "from apollo_optim.report import read_run"),
        ("apollo_optim.__init__", "from .train import loop"),
        ("apollo_optim.cli.bench", "from benchmarks import kit"),
        ("apollo_optim.train.loop", "def f():\n    import benchmarks.step.table"),
        ("apollo_optim.integrations.transformers", "from apollo_optim.cli import main"),
        ("apollo_optim.cli.main", "def f():\n    from apollo_optim.integrations import transformers"),
    ],
)
def test_a_broken_floor_is_seen(module: str, source: str) -> None:
    assert broken_floors(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("apollo_optim.report.read", "from ..plan.draw import COLOURS"),
        ("apollo_optim.rules.apollo", "from .base import Rule\nfrom ..core import matrix\nimport torch"),
        ("apollo_optim.cli.main", "from apollo_optim import list_optimizers\nfrom ..train.pretrain import pretrain"),
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
    sizes = {module: len(path.read_text().splitlines()) for path, module in modules(PACKAGE, BENCHMARKS)}
    long = {module: size for module, size in sizes.items() if size > MOST_LINES}
    assert not long, f"more than {MOST_LINES} lines: {long}"


def test_only_the_command_speaks_of_the_benchmarks() -> None:
    """By their name, which is all that importlib needs."""
    speaking = {module for path, module in modules() if names_benchmarks(path.read_text())}
    assert speaking == {"apollo_optim.cli.bench"}


def names_benchmarks(source: str) -> bool:
    """Is `benchmarks`, or a module of it, in a string that is no docstring?"""
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return any(isinstance(text, str) and text.startswith(("benchmarks.", "benchmarks/")) for text in strings)


def test_nothing_that_is_shipped_needs_a_mock() -> None:
    for path, module in modules(PACKAGE, BENCHMARKS):
        names = [name for _, name in imported_modules(path.read_text(), module)]
        assert not [name for name in names if name.startswith("unittest")], module


def private_names(source: str, module: str) -> list[str]:
    """What a module takes of others that begins with an underscore: by import, or as an attribute of a module."""
    tree, ours, found = ast.parse(source), set(), []
    for node in ast.walk(tree):
        ours_too = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("apollo_optim", "benchmarks"))
        if isinstance(node, ast.ImportFrom) and (node.level or ours_too):
            found += [f"{module}:{node.lineno} {alias.name}" for alias in node.names if is_private(alias.name)]
            ours |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            found += [f"{module}:{node.lineno} {node.value.id}.{node.attr}"] * is_private(node.attr)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_nobody_takes_private_names_of_others() -> None:
    everywhere = modules(PACKAGE, BENCHMARKS)
    problems = [problem for path, module in everywhere for problem in private_names(path.read_text(), module)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "source",
    ["from .b import _x", "from apollo_optim.core import b\nb._x()", "from . import b\ndef f():\n    b._x = 1"],
)
def test_a_private_name_is_seen(source: str) -> None:
    assert private_names(source, "apollo_optim.core.a")
    assert not private_names(source.replace("_x", "x").replace("._", "."), "apollo_optim.core.a")


FRESH = """
import json, sys
import torch
before = set(sys.modules)
import apollo_optim
apollo_optim.Apollo, apollo_optim.build_optimizer  # whatever is lazy is loaded by a first use
print(json.dumps(sorted(set(sys.modules) - before)))
"""
HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx")
"""Parts of torch that cost a second: loaded by who needs them, not by an import."""


def test_an_import_brings_nothing_along() -> None:
    # How long it takes is measured by `python -m benchmarks.host`: a time on a busy machine is no test.
    new = json.loads(run_python("-c", FRESH))
    ours = sys.stdlib_module_names | {"apollo_optim", "torch"}
    assert not [name for name in new if name.split(".")[0] not in ours]
    assert not [name for name in new if name.startswith(HEAVY)]
    rooms = {name.split(".")[1] for name in new if name.startswith("apollo_optim.")}
    assert rooms <= {"core", "rules", "optim", "quant"}, "rooms above the optimizer"
    others = [name for name in new if name.startswith("apollo_optim") and not name.startswith("apollo_optim.rules.")]
    assert len(others) < 41, "a rule is a file; all else has to be worth one"


def run_python(*words: str) -> str:
    return subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True, cwd=ROOT).stdout
