"""The picture of runs: loss against tokens and time, the memory that stays, the peak."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from apollo_optim.core.printing import literal, printable
from apollo_optim.report.read import PARTS, Run, labels, token_word
from apollo_optim.report.units import byte_scale, time_scale, token_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any colour vision tell apart, the strongest contrasts on white first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PALE = ("#E69F00", "#56B4E9")  # too light for white letters
STYLES = ("-", "--", "-.", ":")
SHADES = dict(zip(PARTS, (1.0, 0.55, 0.25), strict=True))  # a part's share of the colour
WORDY = 0.3  # of the longest bar: from here on a part has room for its name
POINTS = 20_000  # of a curve, more than a picture has columns
SMOOTHING = 60  # the training loss is drawn as a running mean over this fraction of the run


def draw(runs: Sequence[Run]) -> Figure:
    """Loss against tokens and against time, the memory that stays, and the peak of the process."""
    from matplotlib.figure import Figure

    names, looks = [literal(name) for name in labels(runs)], [look(i) for i in range(len(runs))]
    height = 0.32 * len(runs) + 1.1
    figure = Figure(figsize=(11, 4.2 + height), layout="constrained", dpi=140)
    (by_tokens, by_time), (resident, peak) = figure.subplots(2, 2, gridspec_kw={"height_ratios": [4, height]})
    most = max((run.steps[-1]["tokens"] for run in runs if run.steps), default=0)
    token_unit, token_name = token_scale(most, token_word(runs))
    time_unit, time_name = time_scale(max((run.seconds or 0.0 for run in runs), default=0.0))

    for run, name, (colour, style) in zip(runs, names, looks, strict=True):
        plot_loss(by_tokens, run, "tokens", token_unit, colour, style, label=f" {name}")  # `_x` would be left out
        plot_loss(by_time, run, "seconds", time_unit, colour, style)
    by_tokens.set(xlabel=token_name, ylabel="loss (nats per token)", title="Loss against tokens")
    by_time.set(xlabel=time_name, ylabel="loss (nats per token)", title="Loss against time")
    for axes in (by_tokens, by_time):
        axes.set_xlim(left=0)
        zoom(axes, runs)
    note = {"transform": by_tokens.transAxes, "ha": "right", "va": "top", "fontsize": 8, "color": "0.35"}
    by_tokens.text(0.98, 0.97, "line with points: validation; thin: training", **note)

    plot_resident(resident, runs, names, looks)
    plot_bars(peak, [run.memory.get("peak") for run in runs], names, looks)
    resident.set_title("Weights, gradients and optimizer state")
    peak.set_title("Peak memory of the process")
    for axes in (by_tokens, by_time, resident, peak):
        axes.title.set_fontsize(11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6, axis="both" if axes in (by_tokens, by_time) else "x")
        axes.set_axisbelow(True)
    legend = figure.legend(loc="outside lower center", ncols=min(len(runs), 4), frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    figure.suptitle(literal(headline(runs)), fontsize=11)
    return figure


def look(i: int) -> tuple[str, str]:
    """Colour and line style of run number i: the style changes, too, so that no pair rests on colour alone."""
    return COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]


def headline(runs: Sequence[Run]) -> str:
    models = sorted({str(run.setting("model", "name")) for run in runs})
    corpus = (runs[0].start.get("corpus") or {}).get("name", "unknown text")
    return printable(f"{', '.join(models)} on {corpus}")


def plot_loss(axes: Axes, run: Run, key: str, unit: float, colour: str, style: str, label: str | None = None) -> None:
    """The training loss as a thin running mean, the validation loss as the line with markers that one reads off.

    `key`: the figure to the right, in so many of which the axis counts; a record without it is not drawn.
    """
    if run.steps:
        every = -(-len(run.steps) // POINTS)
        xs = [x / unit for x in run.steps.column(key)[::every]]
        axes.plot(xs, smoothed(run)[::every], color=colour, alpha=0.35, linewidth=1.0)
    if run.evals:
        xs, ys = [x / unit for x in run.evals.column(key)], list(run.evals.column("loss"))
        axes.plot(xs, ys, color=colour, linestyle=style, linewidth=2, marker="o", markersize=3.5, label=label)
    elif label is not None:
        axes.plot([], [], color=colour, linestyle=style, label=label)


def zoom(axes: Axes, runs: Sequence[Run]) -> None:
    """Look at the part that tells runs apart."""
    if window := loss_window(runs):
        axes.set_ylim(*window)


def loss_window(runs: Sequence[Run]) -> tuple[float, float] | None:
    """The losses that tell runs apart: neither the fall from the first step, nor a run that diverged. None: all one."""
    losses = [drawn(run) for run in runs if run.evals or run.steps]
    low, high = min(map(min, losses)), sorted(map(max, losses))[len(losses) // 2]
    return (low - 0.08 * (high - low), high + 0.12 * (high - low)) if high > low else None


def drawn(run: Run) -> list[float]:
    """What is to be inside: every evaluation, and the smoothed training loss from the first of them on."""
    if not run.evals:
        return list(run.steps.column("loss"))
    first, smooth = run.evals[0]["tokens"], smoothed(run)
    late = [loss for tokens, loss in zip(run.steps.column("tokens"), smooth, strict=True) if tokens >= first]
    return [*run.evals.column("loss"), *late]


def smoothed(run: Run) -> list[float]:
    """The training loss as it is drawn."""
    return running_mean(run.steps.column("loss"), max(1, len(run.steps) // SMOOTHING))


def plot_resident(axes: Axes, runs: Sequence[Run], names: list[str], looks: list[tuple[str, str]]) -> None:
    """Weights, gradients and optimizer state end to end, from the full colour to its lightest shade."""
    totals = [sum(run.memory.get(part, 0) for part in PARTS) for run in runs]
    factor, unit = byte_scale(max(totals, default=0))
    widest = max(totals, default=0) or 1
    for row, (run, (colour, _)) in enumerate(zip(runs, looks, strict=True)):
        left = 0.0
        for part, share in SHADES.items():
            size = run.memory.get(part, 0)
            axes.barh(row, size / factor, left=left / factor, height=0.7, color=blend(colour, share), edgecolor="white")
            if size > 0.1 * widest:
                ink = "white" if share == 1 and colour not in PALE else "black"
                text = (f"{part} " if size > WORDY * widest else "") + f"{size / factor:.3g}"
                middle = (left + size / 2) / factor
                axes.text(middle, row, text, ha="center", va="center", color=ink, fontsize=8)
            left += size
        axes.text(left / factor, row, f" {left / factor:.3g}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=f"{unit}, from dark to light: weights, gradients, state", xlim=(0, 1.14 * widest / factor))
    axes.invert_yaxis()


def plot_bars(axes: Axes, sizes: list[int | None], names: list[str], looks: list[tuple[str, str]]) -> None:
    largest = max((size for size in sizes if size), default=1)
    factor, unit = byte_scale(largest)
    for row, (size, (colour, _)) in enumerate(zip(sizes, looks, strict=True)):
        axes.barh(row, (size or 0) / factor, height=0.7, color=colour)
        text = f" {size / factor:.3g}" if size else " not measured yet"
        axes.text((size or 0) / factor, row, text, va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=unit, xlim=(0, 1.14 * largest / factor))
    axes.invert_yaxis()


def blend(colour: str, share: float) -> tuple[float, float, float]:
    """A colour mixed with white."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return (1 - share * (1 - red), 1 - share * (1 - green), 1 - share * (1 - blue))


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last `width` values (fewer at the beginning)."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
