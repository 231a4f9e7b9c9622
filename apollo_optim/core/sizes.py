"""Sizes of memory as people write them."""

import re

from apollo_optim.core.errors import InputError

UNITS = {"": 1e9, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_of(what: str, said: str | float) -> float:
    """Bytes of "24GB", "24" (GB, too) or "80 GiB"; a number is bytes already. `what` is said in the InputError."""
    if not isinstance(said, str):
        size = float(said)
    else:
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", said.strip())
        size = float(found[1]) * UNITS.get(found[2].upper(), 0.0) if found else 0.0
    if not size > 0:
        raise InputError(f"{what} {said}: give a size such as 24GB or 80GiB")
    return size
