"""A compile that was killed leaves a library cut off in torch's cache: it is removed, and compiled again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apollo_optim.core.libraries import is_cut_off, remember_loads, remove_cut_off

LIBRARY = Path(torch.__file__).parent / "lib" / "libshm.so"
WHOLE = LIBRARY.read_bytes() if LIBRARY.exists() else b""
linux = pytest.mark.skipif(WHOLE[:5] != b"\x7fELF\x02", reason="libraries of Linux")
PROBE = """
import warnings
from apollo_optim.core.compile import can_compile
warnings.simplefilter({filter!r}, UserWarning)
assert can_compile("cpu")
"""


@linux
@pytest.mark.parametrize("size", [0, 1, 63, 64, len(WHOLE) // 2, len(WHOLE) - 1])
def test_what_is_cut_off_is_removed(tmp_path: Path, size: int) -> None:
    folder = tmp_path / "ab"
    folder.mkdir()
    for name, content in {"cut": WHOLE[:size], "new": WHOLE[:size], "whole": WHOLE, "zeros": bytes(size)}.items():
        (folder / f"{name}.so").write_bytes(content)
        if name != "new":  # where a linker may be at work
            os.utime(folder / f"{name}.so", (1e9, 1e9))
    assert sorted(path.stem for path in remove_cut_off(tmp_path)) == ["cut", "zeros"]
    assert sorted(path.stem for path in folder.iterdir()) == ["new", "whole"]


@linux
def test_a_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    (tmp_path / "theirs").write_bytes(b"")
    os.utime(tmp_path / "theirs", (1e9, 1e9))
    (tmp_path / "ab" / "link.so").symlink_to(tmp_path / "theirs")
    assert is_cut_off(tmp_path / "ab" / "link.so")
    assert remove_cut_off(tmp_path) == []


@linux
@pytest.mark.slow
def test_the_run_after_a_killed_compile_compiles(tmp_path: Path) -> None:
    def run(warnings: str) -> str:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        call = [sys.executable, "-c", PROBE.format(filter=warnings)]
        return subprocess.run(call, check=True, env=env, capture_output=True, text=True, timeout=300).stderr

    run(warnings="error")
    libraries = list(tmp_path.glob("*/*.so"))
    assert libraries
    for library in libraries:
        library.write_bytes(library.read_bytes()[:100])
        os.utime(library, (1e9, 1e9))
    assert run(warnings="always").count("a compile was killed there") == len(libraries)
    run(warnings="error")


def test_a_library_that_was_loaded_is_not_loaded_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that could not be is asked for again, and so is one that is newer."""
    isa = pytest.importorskip("torch._inductor.cpu_vec_isa").VecISA
    if not hasattr(isa, "_probe_load"):
        pytest.skip("this torch has another way")
    asked, answers = [], [False, True, True]

    def asks(self: object, library: str) -> bool:
        asked.append(library)
        return answers.pop(0)

    monkeypatch.setattr(isa, "_probe_load", asks)
    remember_loads()
    remember_loads()  # (a second time changes nothing)
    library = tmp_path / "some.so"
    library.touch()
    assert [isa._probe_load(None, str(library)) for _ in range(3)] == [False, True, True]
    assert len(asked) == 2
    later = library.stat().st_mtime_ns + 10**9
    os.utime(library, ns=(later, later))
    assert isa._probe_load(None, str(library))
    assert len(asked) == 3
    answers.append(True)
    assert isa._probe_load(None, str(tmp_path / "gone" / "other.so")), "where nothing can be written"
