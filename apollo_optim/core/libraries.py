"""Libraries in torch's cache: those that a kill in the middle of a compile left cut off, and what is known of others.

torch looks only whether a file is there, and fails to load it in every later run: steps would be eager from then on,
slower and with other last bits than those of the run that is resumed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import struct
import time
from pathlib import Path
from typing import Any

from apollo_optim.core import disk

SETTLED = 20.0
"""Seconds without a write after which a library counts as complete or cut off: its linker may be at work."""
HEADER = struct.Struct("<4s36xQ10xHH2x")  # of ELF, 64 bits, little-endian: magic, e_shoff, e_shentsize, e_shnum


def is_cut_off(library: Path) -> bool:
    """Whether a shared library of Linux ends before its header says; of another system, whether it is empty."""
    with library.open("rb") as file:
        start = file.read(HEADER.size)
        size = os.fstat(file.fileno()).st_size
    if len(start) < HEADER.size:
        return True
    if start[:5] != b"\x7fELF\x02":
        return not any(start)  # a linker may write the header last
    _, table, entry, entries = HEADER.unpack(start)
    return bool(size < table + entry * entries)


def remove_cut_off(cache: Path) -> list[Path]:
    """Remove from a folder of torch's compiler what is cut off, so that it is compiled again; what was removed.

    What was written in the last `SETTLED` seconds is left alone, and so is what another user has.
    """
    removed = []
    for library in cache.glob("*/*.so"):
        try:
            if not library.is_symlink() and library.stat().st_mtime < time.time() - SETTLED and is_cut_off(library):
                disk.remove(library)
                removed.append(library)
        except OSError:  # gone meanwhile, or not ours to read or remove: torch says what it cannot do
            continue
    return removed


def remember_loads() -> None:
    """Ask once whether a library of some instructions can be loaded, not once in every process.

    Before its first compile for a CPU torch 2.13 starts a Python for each instruction set of the processor, up to ten
    one after the other, that loads a library out of the cache. What was loaded is marked by a file beside it, and asked
    again once the library is newer. torch has no option for it that is not part of the keys of all that is compiled;
    one that lacks these names does as it likes.
    """
    isa: Any = getattr(importlib.import_module("torch._inductor.cpu_vec_isa"), "VecISA", None)
    asks = getattr(isa, "_probe_load", None)
    if asks is None or hasattr(asks, "__wrapped__"):
        return

    @functools.wraps(asks)
    def loads(self: Any, library: str) -> bool:
        loaded = Path(f"{library}.loaded")
        if loaded.exists() and loaded.stat().st_mtime_ns >= Path(library).stat().st_mtime_ns:
            return True
        fine = bool(asks(self, library))
        with contextlib.suppress(OSError):  # a cache that is not ours to write: it is asked again
            if fine:
                disk.write(loaded, "")
        return fine

    isa._probe_load = loads
