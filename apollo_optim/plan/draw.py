"""A plan as a table, a picture (the stacked bars of the paper's Figure 2) and a page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from apollo_optim.core import disk
from apollo_optim.core.printing import literal, printable
from apollo_optim.plan.budget import PARTS, Followed, Plan
from apollo_optim.plan.traffic import Sends, Traffic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARDS = (8, 12, 16, 24, 40, 80)  # GB
# Okabe and Ito's palette, which people with any colour vision tell apart, with lighter shades; violet for its black,
# which a dark page hides.
COLOURS = {
    "weights": "#0072B2",
    "gradients": "#D55E00",
    "state, matrices": "#009E73",
    "state, rest": "#7FCEB9",
    "activations": "#E69F00",
    "logits": "#F0E442",
    "buffers": "#9467BD",
    "float copies": "#56B4E9",
    "update": "#CC79A7",
    "parallel": "#999999",
    "allocator": "#A6761D",
    "context": "#7A7A7A",
}
NOTE = (
    'Bytes of tensors at the fullest moment of a step ("peak in"): a part may be larger at another one. Not counted: '
    "Python and its libraries, the context of a GPU (half a GB each), what the allocator wastes, the scratch memory of "
    "single kernels. The update is the eager one; a compiled one takes less. GB = 1e9 bytes."
)
CUDA_NOTE = (
    'As PyTorch reserves it on a GPU at the fullest moment of a step ("peak in"). allocator: what is rounded up to its '
    "segments, without holes. context: not measured here, taken as 0.5 GB. Not counted: scratch memory of single "
    "kernels. The update is the eager one; a compiled one takes less. GB = 1e9 bytes."
)
SENDS = "What each process sends in a step"
SENDS_NOTE = (
    "Collectives, and the bytes of their tensors: of the larger of what goes in and what comes out. optimizer: what "
    "its step asks for, beside torch's gathers and sums of weights and gradients. its first step: and each that makes "
    "a basis anew. wire: what leaves each process, the first step apart, if collectives are rings. Not counted: the "
    "loss, the question whether to stop and the norms for train.clip, a few numbers each."
)
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def unit_of(plans: Sequence[Plan]) -> tuple[float, str]:
    """One unit for all figures of a table."""
    most = max(plan.total for plan in plans)
    return next((unit for unit in UNITS if most >= unit[0]), UNITS[-1])


def smallest_card(total: int) -> str:
    return next((f"{card} GB" for card in CARDS if total <= card * 1e9), f"> {CARDS[-1]} GB")


def table_rows(plans: Sequence[Plan], largest: Sequence[int | None] | None = None) -> list[list[str]]:
    """The table by rows, the first one its head. A part that no plan has is left out.

    The parts of a column add up to its total as bytes; as printed, to the last digit but rounding.
    """
    unit, name = unit_of(plans)
    rows = [[name, *(plan.optimizer for plan in plans)]]
    rows += [
        [part, *(f"{plan.rows[part] / unit:.3f}" for plan in plans)]
        for part in PARTS
        if any(plan.rows[part] for plan in plans)
    ]
    rows.append(["total", *(f"{plan.total / unit:.3f}" for plan in plans)])
    rows.append(["peak in", *(plan.peak.when.partition(" of ")[0] for plan in plans)])
    rows.append(["smallest card", *(smallest_card(plan.total) for plan in plans)])
    if largest is not None:
        rows.append(["largest micro-batch", *("-" if batch is None else str(batch) for batch in largest)])
    return rows


def followed_rows(plans: Sequence[Plan]) -> list[list[str]]:
    """What every group of every optimizer follows, by rows, the first one their head; equal groups in one row."""
    unit, name = unit_of(plans)
    optimizers: dict[Followed, list[str]] = {}
    for plan in plans:
        for followed in plan.followed:
            optimizers.setdefault(followed, []).append(plan.optimizer)
    rows = []
    for row, names in optimizers.items():
        whose = "all" if len(names) == len(plans) > 1 else ", ".join(names)
        rows.append([whose, *row[:3], f"{row.size / unit:.3f}"])
    return [["optimizer", "group", "rule", "state", name], *rows]


def sends_rows(sends: Mapping[str, Sends]) -> list[list[str]]:
    """What a step sends, a row an optimizer, the first row their head; AdamW before them, asked for or not."""
    some = next(iter(sends.values()))
    adamw = sends.get("adamw", Sends(some.weights, some.adamw, some.adamw, some.adamw))
    every = {"adamw": adamw, **sends}
    rows = [["optimizer", "weights, gradients", "optimizer", "its first step", "wire"]]
    for name, one in every.items():
        first = said(one.first) if one.first != one.optimizer else "-"
        rows.append([name, said(one.weights), said(one.optimizer), first, sized(one.weights.wire + one.optimizer.wire)])
    return rows if any(row[3] != "-" for row in rows[1:]) else [[*row[:3], row[4]] for row in rows]


def said(traffic: Traffic) -> str:
    """Its collectives and their bytes."""
    return f"{traffic.collectives:,}: {sized(traffic.nbytes)}" if traffic.sent else "-"


def sized(size: float) -> str:
    """Bytes in their own unit."""
    if size < 1000:
        return f"{size:.0f} B"
    unit, word = next((unit for unit in UNITS if size >= unit[0]), UNITS[-1])
    figure = size / unit
    return f"{figure:,.{2 if figure < 9.995 else 1 if figure < 99.95 else 0}f} {word}"


def draw(plans: Sequence[Plan], title: str) -> Figure:
    """One stacked bar for each plan, and the sizes of the usual cards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(plans)), layout="constrained", dpi=140)
    axes = figure.subplots()
    unit, name = unit_of(plans)
    widest = max(plan.total for plan in plans) / unit
    shown = [part for part in PARTS if any(plan.rows[part] for plan in plans)]
    seen = {part for part in shown if any(plan.rows[part] / unit > 0.001 * widest for plan in plans)}
    for part in shown:
        sizes = [plan.rows[part] / unit for plan in plans]
        lefts = [sum(plan.rows[before] for before in shown[: shown.index(part)]) / unit for plan in plans]
        axes.barh(
            range(len(plans)),
            sizes,
            left=lefts,
            height=0.7,
            color=COLOURS[part],
            edgecolor="white",
            label=part if part in seen else None,
        )
    for row, plan in enumerate(plans):
        axes.text(
            plan.total / unit,
            row,
            f" {plan.total / unit:.3g}",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "pad": 1, "linewidth": 0},
        )
    for card in CARDS:
        place = card * 1e9 / unit
        if place < 1.1 * widest:
            axes.axvline(place, color="0.4", linewidth=0.8, linestyle=":", zorder=0)
            axes.text(place, -0.62, f"{card} GB", ha="center", va="bottom", fontsize=8, color="0.35")
    axes.set_yticks(range(len(plans)), [plan.optimizer for plan in plans])
    axes.set(xlabel=f"{name} at the fullest moment of a step", xlim=(0, 1.12 * widest))
    axes.set_ylim(len(plans) - 0.4, -0.95)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(seen), 5), frameon=False, fontsize=8)
    figure.suptitle(literal(title), fontsize=11)
    return figure


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 65rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }}
h1 {{ font-size: 1.4rem }}
img {{ max-width: 100%; height: auto }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
.note {{ color: #555; font-size: .85rem }}
</style></head><body>
<h1>{title}</h1>
<p><img alt="Memory by part, one bar for each optimizer. The figures are in the table below." src="data:image/png;base64,{image}"></p>
{table}
<p class="note">{note}</p>
<h2>Rules and state</h2>
{followed}
{sends}
</body></html>
"""  # noqa: E501


class Written(NamedTuple):
    picture: Path
    page: Path


def write_plan(
    plans: Sequence[Plan],
    title: str,
    out: str | Path,
    largest: Sequence[int | None] | None = None,
    note: str = NOTE,
    sends: Mapping[str, Sends] | None = None,
) -> Written:
    """Write `plan.png` and `plan.html`, which needs nothing beside it, into the directory `out`."""
    buffer = io.BytesIO()
    draw(plans, title).savefig(buffer, format="png")
    page = PAGE.format(
        title=html.escape(printable(title)),
        image=base64.b64encode(buffer.getvalue()).decode(),
        table=_table(table_rows(plans, largest)),
        followed=_table(followed_rows(plans)),
        note=html.escape(note),
        sends=f"<h2>{SENDS}</h2>\n{_table(sends_rows(sends))}\n<p class=note>{SENDS_NOTE}</p>" if sends else "",
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = Written(out / "plan.png", out / "plan.html")
    disk.write(written.picture, buffer.getvalue())
    disk.write(written.page, page)
    return written


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = "\n".join(f"<tr>{_cells('td', row)}</tr>" for row in body)
    return (
        f'<div class="wide"><table><thead><tr>{_cells("th", head)}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'
    )


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(printable(text))}</{tag}>" for text in texts)
