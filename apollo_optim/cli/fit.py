"""`apollo-optim plan --fit`: what every optimizer can do on cards of one size."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..core.printing import say

if TYPE_CHECKING:
    from ..plan import Budget, Pace, Plan, Traces
    from ..train.config import RunConfig

NOTE = (
    "The largest micro-batch with which the fullest moment of a step is within the memory, and what a card holds then; "
    "- : not even one row fits, and the parts are those of one row. A step is one micro-batch on every card. "
)
PACED = (
    "tokens/s: of all cards, by seconds = {fixed:.3g} + {per_token:.3g} x tokens of a card, as of the two of --pace. "
)


def fit_rows(
    cfg: "RunConfig",
    runs: "Mapping[str, RunConfig]",
    of: "Callable[[RunConfig], tuple[Any, Traces]]",
    budget: "Callable[[RunConfig, Any], Budget]",
    limit: float,
    cards: int,
    pace: "Pace | None" = None,
    *,
    shares: bool,
) -> list[list[str]]:
    """The table by rows, the first one its head; progress goes to stderr.

    Args:
        cfg: What is common to `runs`, which go by the names of their optimizers.
        of: The model and the traces of a run.
        budget: Of a run and its model.
        shares: Each card has a part of the weights.

    Raises InputError where nothing fits, saying what would.
    """
    from ..plan import fit, held_weights
    from ..plan.draw import table_rows

    parts, found, weights = cards if shares else 1, [], []
    for name, run in runs.items():
        model, traces = of(run)
        weights.append(held_weights(model, parts))
        if weights[-1] > limit:
            say(f"{name}: left out, its weights alone take {weights[-1] / 1e9:.2f} GB", error=True)
        else:
            found.append(fit(budget(run, model), traces, limit, telling(name, set(traces.made))))
    if not found:
        raise InputError(too_heavy(cfg, of, min(weights), limit, cards, parts))
    if not any(one.batch for one in found):
        raise InputError(too_large(cfg, min((one.plan for one in found), key=lambda plan: plan.total), limit, cards))
    tokens = [one.tokens(cfg.data.seq_len, cards) for one in found]
    rows = [row for row in table_rows([one.plan for one in found]) if row[0] != "smallest card"]
    rows.append(["largest micro-batch", *(str(one.batch or "-") for one in found)])
    rows.append(["tokens a step", *(f"{n:,}" if n else "-" for n in tokens)])
    if pace:
        rows.append(["tokens/s", *(f"{n / pace.seconds(n // cards):,.0f}" if n else "-" for n in tokens)])
    return rows


def telling(name: str, known: set[int]) -> Callable[[int, int], None]:
    """A line on stderr for every micro-batch that is looked at first: at 7B it takes a second or two."""

    def told(rows: int, size: int) -> None:
        if rows not in known:
            say(f"{name}: a micro-batch of {rows} takes {size / 1e9:.2f} GB", error=True)

    return told


def too_large(cfg: "RunConfig", least: "Plan", limit: float, cards: int) -> str:
    """Not one row fits with any optimizer, not even with that of the `least` plan; what would help."""
    ways = [] if cfg.train.release else ["--release"]
    ways += [] if cfg.model.gradient_checkpointing else ["--checkpointing"]
    ways += ["more --gpus", "a shorter --seq"]
    size = f"{least.total / 1e9:.3g} GB of {each(cards)} with {least.optimizer}"
    return f"nothing fits in {limit / 1e9:.3g} GB: one row takes {size}; what would help: {', '.join(ways)}"


def too_heavy(
    cfg: "RunConfig",
    of: "Callable[[RunConfig], tuple[Any, Traces]]",
    weights: int,
    limit: float,
    cards: int,
    parts: int,
) -> str:
    """The weights alone do not fit, cut into so many parts; how many cards would hold them, and how many bits."""
    from ..plan import cards_for, held_weights

    enough = cards_for(of(cfg)[0], limit)
    ways = [f"--gpus {enough} --parallel fsdp2"] if enough else []
    for bits in (8, 4) if cfg.quant.bits is None else ():
        quant = dataclasses.replace(cfg.quant, bits=bits)
        size = held_weights(of(dataclasses.replace(cfg, quant=quant))[0], parts)
        if size <= limit:
            ways.append(f"--bits {bits} ({size / 1e9:.3g} GB)")
            break
    helps = " or ".join(ways) or "a card of more memory"
    alone = f"{weights / 1e9:.3g} GB of {each(cards)}"
    return f"nothing fits in {limit / 1e9:.3g} GB: the weights alone take {alone}; they fit with {helps}"


def each(cards: int) -> str:
    """In words."""
    return "the card" if cards == 1 else f"each of {cards} cards"


def pace_of(words: Sequence[str] | None) -> "Pace | None":
    """Of two times as TOKENS:SECONDS."""
    from ..plan import Pace

    if words is None:
        return None
    times = [re.fullmatch(r"([0-9]+):([0-9]+\.?[0-9]*)", word) for word in words]
    if not all(times):
        raise InputError(f"--pace {' '.join(words)}: give two times as TOKENS:SECONDS, of one card, such as 1024:1.61")
    first, second = ((int(time[1]), float(time[2])) for time in times if time)
    return Pace.of(first, second)
