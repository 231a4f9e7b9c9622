"""Sizes of memory as people write them."""

import re

from apollo_optim.core.errors import InputError

UNITS = {"": 1e9, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
UNITS |= {unit + b: 1e3**power for power, unit in enumerate("KMGT", 1) for b in ("", "B")}


def size_of(what: str, said: str | float) -> float:
    """Bytes of "24GB", "24" (GB, too) or "80 GiB"; a number is bytes already. `what` is said in the InputError."""
    if isinstance(said, int | float):
        size = float(said)
        if 0 < size < 1e6:
            raise InputError(f'{what} {said}: a number is bytes, and that is no model\'s: write "{said:g}GB"')
    elif not isinstance(said, str):
        size = 0.0
    else:
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)", said.strip())
        size = float(found[1]) * UNITS.get(found[2].upper(), 0.0) if found else 0.0
    if not size > 0:
        raise InputError(f"{what} {said}: give a size such as 24GB or 80GiB")
    return size
