"""Curves and bars of a page: SVG and HTML that fit any width by themselves; `page.html` adds what one sees on hovering.

A curve is drawn in a field of 1000 x 1000 that is stretched to its place; lines keep their width, and labels are text
of the page: readable on a phone as on a wide screen, in light and dark, and without a script.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from apollo_optim.core.printing import printable
from apollo_optim.report.picture import STYLES, loss_window, smoothed
from apollo_optim.report.read import PARTS, Run, labels, token_word
from apollo_optim.report.units import byte_scale, human_bytes, time_scale, token_scale

FIELD = 1000
POINTS = 500  # of a curve, more than a screen tells apart
DASHES = dict(zip(STYLES, ("", "8 4", "8 3 2 3", "2 3"), strict=True))
HUES = 7  # the page names so many colours, --c0 ...
Point = tuple[float, ...]


def key(runs: Sequence[Run]) -> str:
    """Which line is which run's."""
    items = (
        f'<li><svg class="line" viewBox="0 0 30 10">{_path([(0, 5), (30, 5)], i, "eval")}</svg>{_text(name)}</li>'
        for i, name in enumerate(labels(runs))
    )
    return f'<ul class="key">{"".join(items)}</ul>'


def losses(runs: Sequence[Run], *, to_the_end: bool = False) -> str:
    """Loss against tokens and against time. `to_the_end`: the axis reaches to where runs that go on will end."""
    charts = (("tokens", partial(token_scale, word=token_word(runs))), ("seconds", time_scale))
    told = []
    for figure, scale in charts:
        reached = max(max((*run.steps.column(figure), *run.evals.column(figure)), default=0.0) for run in runs)
        width = max([reached, *(run.expected(figure) for run in runs if to_the_end)])
        told.append(_chart(runs, figure, width or 1.0, *scale(width)))
    return "\n".join(told)


def _chart(runs: Sequence[Run], figure: str, width: float, unit: float, name: str) -> str:
    low, high = loss_window(runs) or (0.0, 2 * max(run.final["loss"] for run in runs if run.final) or 1.0)
    title = "Loss against time" if figure == "seconds" else "Loss against tokens"
    lines, data = [], []
    for i, (label, run) in enumerate(zip(labels(runs), runs, strict=True)):
        training = _thinned([*zip(run.steps.column(figure), smoothed(run), strict=True)])
        evals = _thinned([*zip(*(run.evals.column(k) for k in (figure, "loss", "perplexity")), strict=True)])
        for kind, points in (("train", training), ("eval", evals), ("dots", evals)):
            placed = [(FIELD * x / width, FIELD * (high - y) / (high - low)) for x, y, *_ in points]
            lines.append(_path(placed, i, kind))
        data.append({"name": printable(label), "train": _scaled(training, unit), "eval": _scaled(evals, unit)})
    across, up = ticks(0, width / unit), ticks(low, high)
    grid = "".join(f"M0 {FIELD * (high - y) / (high - low):.1f}h{FIELD}" for y in up)
    grid += "".join(f"M{FIELD * x * unit / width:.1f} 0v{FIELD}" for x in across)
    told = json.dumps({"width": width / unit, "unit": name, "runs": data}).replace("<", "\\u003c")
    aside = "".join(f'<span class="y" style="top:{100 * (high - y) / (high - low):.2f}%">{y:g}</span>' for y in up)
    below = "".join(f'<span class="x" style="left:{100 * x * unit / width:.2f}%">{x:g}</span>' for x in across)
    return (
        f'<figure class="chart"><figcaption>{title} <small>nats per token</small></figcaption>\n'
        f'<div class="plot" tabindex="0" role="img" aria-label="{title}; arrow keys read it off">'
        f'<svg viewBox="0 0 {FIELD} {FIELD}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="grid" d="{grid}"/>{"".join(lines)}</svg>{aside}{below}</div>\n<p class="axis">{name}</p>'
        f'<script type="application/json">{told}</script></figure>'
    )


def _path(points: Sequence[Point], run: int, kind: str) -> str:
    """A curve; of kind "dots", a round point at each place (a line without length, whose ends are round)."""
    joint, back = ("M", "h0") if kind == "dots" else ("L", "")
    d = "M" + joint.join(f"{x:.1f} {y:.1f}{back}" for x, y in points) if points else ""
    dash = DASHES[STYLES[run % len(STYLES)]] if kind == "eval" else ""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="{kind}" style="--c:var(--c{run % HUES})"{dashed} d="{d}"/>'


def bars(runs: Sequence[Run]) -> str:
    """What stays (weights, gradients, state) and the peak of the process, a bar for each run."""
    names = [*map(_text, labels(runs))]
    kept = [{part: run.memory.get(part, 0) for part in PARTS} for run in runs]
    peaks = [{"peak": run.memory.get("peak", 0)} for run in runs]
    return _bars("Weights, gradients and optimizer state", names, kept) + _bars(
        "Peak memory of the process", names, peaks
    )


def _bars(title: str, names: Sequence[str], sizes: Sequence[dict[str, int]]) -> str:
    widest = max((sum(parts.values()) for parts in sizes), default=0) or 1
    factor, unit = byte_scale(widest)
    rows = []
    for i, (name, parts) in enumerate(zip(names, sizes, strict=True)):
        pieces = "".join(
            f'<i class="{part}" style="width:{100 * size / widest:.2f}%" title="{part}: {human_bytes(size)}"></i>'
            for part, size in parts.items()
            if size
        )
        total = sum(parts.values())
        rows.append(
            f'<dt>{name}</dt><dd style="--c:var(--c{i % HUES})"><span>{pieces}</span>'
            f"<em>{f'{total / factor:.3g}' if total else 'not measured yet'}</em></dd>"
        )
    shades = "" if len(sizes[0]) == 1 else f", from full to pale: {', '.join(PARTS).replace('optimizer', 'state')}"
    return (
        f'<figure class="bars"><figcaption>{title} <small>{unit}{shades}</small></figcaption>'
        f"<dl>{''.join(rows)}</dl></figure>"
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, three to six of them."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= max(factor for factor in (1, 2, 5) if (high - low) / (step * factor) >= 3)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """So many at most, the last among them; a place or loss that is not known is none."""
    known = [point for point in points if not any(map(math.isnan, point[:2]))]
    every = -(-len(known) // POINTS) or 1
    return known[::-1][::every][::-1]


def _scaled(points: Sequence[Point], unit: float) -> list[list[Any]]:
    return [
        [float(f"{x / unit:.5g}"), *(None if math.isnan(y) else float(f"{y:.7g}") for y in rest)] for x, *rest in points
    ]


def _text(name: str) -> str:
    return html.escape(printable(name))
