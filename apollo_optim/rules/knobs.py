"""What knobs may be, in words and as tests: the kinds that rules share."""

import math
from numbers import Integral, Real
from typing import Any

from apollo_optim.rules.base import Knob


def is_number(x: Any) -> bool:
    """A real number of Python or numpy; True and False are none."""
    return isinstance(x, Real) and not isinstance(x, bool)


def is_whole(x: Any) -> bool:
    """A whole number of Python or numpy."""
    return isinstance(x, Integral) and not isinstance(x, bool)


def number(low: float, *, above: bool = False, below: float = math.inf) -> Knob:
    """A real number from `low` on (or above it)."""

    def fits(x: Any) -> bool:
        return is_number(x) and (x > low if above else x >= low) and x < below

    until = f" and < {below:g}" if below < math.inf else ""
    return Knob(f"a number {'>' if above else '>='} {low:g}{until}", fits)


def count(low: int = 1) -> Knob:
    """A whole number from `low` on."""
    return Knob(f"a whole number >= {low}", lambda x: is_whole(x) and x >= low)


def one_of(*values: Any) -> Knob:
    """One of these words (or None, True, False)."""
    words = [f'"{v}"' if isinstance(v, str) else str(v) for v in values]
    wanted = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    return Knob(wanted, lambda x: any(x is v or (isinstance(v, str) and x == v) for v in values))


def either(value: Any, kind: Knob, meaning: str = "") -> Knob:
    """This value, or what another knob may be."""
    said = (f'"{value}"' if isinstance(value, str) else str(value)) + (f" ({meaning})" if meaning else "")
    return Knob(f"{kind.wanted}, or {said}", lambda x: one_of(value).fits(x) or kind.fits(x))


SWITCH = one_of(True, False)
BETA = Knob("a number in [0, 1)", number(0, below=1).fits)
BETAS = Knob("two numbers in [0, 1)", lambda x: isinstance(x, (tuple, list)) and len(x) == 2 and all(map(BETA.fits, x)))
EPS = number(0)
