"""Tables and pictures of runs, from their logs and from nothing else.

A run directory holds `metrics.jsonl`; `read_run` makes a `Run` of it, `write_report` a picture, a table and one
self-contained HTML page of several of them. Runs are only put side by side where their numbers can be compared:
the same corpus (by its hash) and the same tokenizer.
"""

import base64
import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

Event = dict[str, Any]

# Okabe and Ito's palette, which people with any colour vision tell apart, the strongest contrasts on white first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PALE = ("#E69F00", "#56B4E9")  # too light for white letters
STYLES = ("-", "--", "-.", ":")
PARTS = (("weights", 1.0), ("gradients", 0.55), ("optimizer", 0.25))  # a part of the memory, its share of the colour
SMOOTHING = 60  # the training loss is drawn as a running mean over this fraction of the run


@dataclass(frozen=True)
class Run:
    """One run, as its log tells it."""

    path: Path
    """Its directory, or its log where that was kept alone."""
    start: Event
    """The last start: a resumed run has several, of the same configuration."""
    steps: list[Event]
    evals: list[Event]
    sizes: dict[str, int]
    """Bytes of weights, gradients and optimizer state after the first step."""
    end: Event | None
    """None while a run goes on, or when it was stopped."""
    resumes: int

    def setting(self, section: str, key: str) -> Any:
        return (self.start["config"].get(section) or {}).get(key)

    def peak(self, rate: str) -> float | None:
        """The highest learning rate that was logged."""
        return max((event[rate] for event in self.steps if event.get(rate) is not None), default=None)

    @property
    def optimizer(self) -> str:
        return str(self.setting("optim", "name"))

    @property
    def final(self) -> Event:
        """The last evaluation; of a run without one, the last step."""
        return (self.evals or self.steps or [{}])[-1]

    @property
    def seconds(self) -> float | None:
        return max((event["seconds"] for event in (*self.steps, *self.evals) if "seconds" in event), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        last = self.steps[-1] if self.steps else {}
        return last["tokens"] / last["seconds"] if last.get("seconds") else None

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by part: the end's; before it, those counted after the first step, when the optimizer has its state."""
        return self.sizes | ((self.end or {}).get("memory") or {})


def read_run(path: str | Path) -> Run:
    """Read the log of a run directory, or a log that was kept alone, under a name of its own."""
    path = Path(path)
    if path.name == "metrics.jsonl":
        path = path.parent
    log = path / "metrics.jsonl" if path.is_dir() else path
    if not log.is_file():
        raise InputError(f"{path}: no metrics.jsonl there; name the directory of a run (what `pretrain --out` named)")
    events = read_events(log)
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        raise InputError(f"{log}: no start event in it, so it is not the log of a run")
    return Run(
        path=path,
        start=starts[-1],
        # A loss that is null was not a number.
        steps=[event for event in events if event["event"] == "step" and event["loss"] is not None],
        evals=[event for event in events if event["event"] == "eval" and event["loss"] is not None],
        sizes=sizes_of(starts[-1], *(event for event in events if event["event"] == "memory")),
        end=next((event for event in reversed(events) if event["event"] == "end"), None),
        resumes=len(starts) - 1,
    )


def read_events(log: Path) -> list[Event]:
    """The events of a log. A last line without its newline was cut short by a kill, or is being written: it is left."""
    lines = log.read_text(encoding="utf-8").split("\n")
    events = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            event["event"] + ""
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise InputError(f"{log}, line {number}: not an event of a run's log: {line[:60]!r}") from None
        events.append(event)
    return events


def sizes_of(start: Event, *measured: Event) -> dict[str, int]:
    """The parts' bytes, as the last of these events tells them."""
    last = measured[-1] if measured else start.get("memory", {})
    return {part: last[part] for part, _ in PARTS if part in last}


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its optimizer where that tells them apart, else its directory."""
    optimizers = [run.optimizer for run in runs]
    if len(set(optimizers)) == len(runs):
        return optimizers
    names = [run.path.resolve().name.removesuffix(".jsonl") for run in runs]
    return names if len(set(names)) == len(runs) else [str(run.path) for run in runs]


def check_comparable(runs: Sequence[Run]) -> None:
    """Perplexity depends on the text and on how it is cut: refuse to put runs side by side that differ in either."""
    for what, identity in (("corpora", corpus_of), ("tokenizers", tokenizer_of)):
        groups: dict[str, list[Path]] = {}
        for run in runs:
            groups.setdefault(identity(run), []).append(run.path)
        if len(groups) > 1:
            told = "; ".join(f"{name}: {', '.join(map(str, paths))}" for name, paths in groups.items())
            raise InputError(f"different {what}, so the losses can't be compared ({told}): report these runs apart")


def corpus_of(run: Run) -> str:
    corpus = run.start.get("corpus") or {}
    if corpus.get("sha256"):
        python = f", Python {corpus['python']}" if "python" in corpus else ""
        return f"{corpus['name']} (sha256 {corpus['sha256'][:12]}{python})"
    # A stream is never read to its end and has no hash: what was asked for, in which revision.
    return " ".join(str(corpus[key]) for key in ("name", "subset", "split", "revision") if corpus.get(key)) or "unknown"


def tokenizer_of(run: Run) -> str:
    tokenizer = (run.start.get("corpus") or {}).get("tokenizer") or {}
    return f"{tokenizer.get('name', 'unknown')} (sha256 {str(tokenizer.get('sha256', 'unknown'))[:12]})"


# The table: a title, how a run fills it, and what a reader should know about it.


def number(format_: str, get: Callable[[Run], Any]) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        value = get(run)
        return "-" if value is None else format_.format(value)

    return cell


def memory_cell(part: str) -> Callable[[Run], str]:
    return lambda run: human_bytes(run.memory[part]) if part in run.memory else "-"


COLUMNS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("model", lambda run: str(run.setting("model", "name"))),
    ("params", number("{:,}", lambda run: run.start.get("params"))),
    ("lr", number("{:.3g}", lambda run: run.peak("lr"))),
    ("lr of the rest", number("{:.3g}", lambda run: run.peak("lr_rest"))),
    ("steps", number("{:,}", lambda run: (run.steps or [{}])[-1].get("step"))),
    ("tokens", number("{:,}", lambda run: (run.steps or [{}])[-1].get("tokens"))),
    ("loss", number("{:.4f}", lambda run: run.final.get("loss"))),
    ("perplexity", number("{:.2f}", lambda run: run.final.get("perplexity"))),
    ("bits/byte", number("{:.3f}", lambda run: run.final.get("bits_per_byte"))),
    ("ppl n/(n+1)*", number("{:.2f}", lambda run: run.final.get("perplexity_reference"))),
    ("tokens/s", number("{:,.0f}", lambda run: run.tokens_per_second)),
    ("time", number("{}", lambda run: None if run.seconds is None else human_seconds(run.seconds))),
    ("weights", memory_cell("weights")),
    ("gradients", memory_cell("gradients")),
    ("optimizer", memory_cell("optimizer")),
    ("peak", memory_cell("peak")),
)
NOTE = (
    "Loss and perplexity: token-weighted over the validation text. * the figure that the evaluation loop shared by "
    "GaLore, Fira and APOLLO prints (summed loss over n + 1 batches), for comparison with their tables only. Weights, "
    "gradients and optimizer state: bytes as they really are; peak: resident memory of the whole process. "
    "GB = 1e9 bytes."
)


def table_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows. A column that no run fills is left out; a run that has not ended says so in its name."""
    columns = [(title, [cell(run) for run in runs]) for title, cell in COLUMNS]
    columns = [(title, cells) for title, cells in columns if set(cells) != {"-"}]
    names = [name + ("" if run.end else " (not ended)") for name, run in zip(labels(runs), runs, strict=True)]
    rows = [[name, *(cells[i] for _, cells in columns)] for i, name in enumerate(names)]
    return ["run", *(title for title, _ in columns)], rows


def rich_table(runs: Sequence[Run]) -> "Table":
    """The table for a terminal, turned on its side: fifteen figures a run fit no terminal next to each other."""
    from rich.table import Table

    titles, rows = table_rows(runs)
    table = Table(header_style="bold")
    table.add_column("")
    for row in rows:
        table.add_column(row[0], justify="right")
    for i, title in enumerate(titles[1:], start=1):
        table.add_row(title, *(row[i] for row in rows))
    return table


def markdown_table(runs: Sequence[Run]) -> str:
    titles, rows = table_rows(runs)
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{NOTE}\n"


# The picture.


def draw(runs: Sequence[Run]) -> "Figure":
    """Loss against tokens and against time, the memory that stays, and the peak of the process."""
    from matplotlib.figure import Figure

    names, looks = labels(runs), [look(i) for i in range(len(runs))]
    height = 0.32 * len(runs) + 1.1
    figure = Figure(figsize=(11, 4.2 + height), layout="constrained", dpi=140)
    (by_tokens, by_time), (resident, peak) = figure.subplots(2, 2, gridspec_kw={"height_ratios": [4, height]})
    longest = max((run.seconds or 0.0 for run in runs), default=0.0)
    time_unit, time_name = unit_of(longest / 2, ((3600, "hours"), (60, "minutes"), (1, "seconds")))
    most = max((run.steps[-1]["tokens"] for run in runs if run.steps), default=0)
    counts = ((1e9, "billions of tokens"), (1e6, "millions of tokens"), (1e3, "thousands of tokens"), (1, "tokens"))
    token_unit, token_name = unit_of(most, counts)

    for run, name, (colour, style) in zip(runs, names, looks, strict=True):
        plot_loss(by_tokens, run, lambda event: event["tokens"] / token_unit, colour=colour, style=style, label=name)
        plot_loss(by_time, run, lambda event: event["seconds"] / time_unit, colour=colour, style=style)
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
    figure.legend(loc="outside lower center", ncols=min(len(runs), 4), frameon=False)
    figure.suptitle(headline(runs), fontsize=11)
    return figure


def look(i: int) -> tuple[str, str]:
    """Colour and line style of run number i: the style changes, too, so that no pair rests on colour alone."""
    return COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]


def headline(runs: Sequence[Run]) -> str:
    models = sorted({str(run.setting("model", "name")) for run in runs})
    corpus = (runs[0].start.get("corpus") or {}).get("name", "unknown text")
    return f"{', '.join(models)} on {corpus}"


def plot_loss(
    axes: "Axes", run: Run, x_of: Callable[[Event], float], *, colour: str, style: str, label: str | None = None
) -> None:
    """The training loss as a thin running mean, the validation loss as the line with markers that one reads off."""
    if run.steps:
        smooth = running_mean([event["loss"] for event in run.steps], max(1, len(run.steps) // SMOOTHING))
        axes.plot([x_of(event) for event in run.steps], smooth, color=colour, alpha=0.35, linewidth=1.0)
    if run.evals:
        xs, ys = [x_of(event) for event in run.evals], [event["loss"] for event in run.evals]
        axes.plot(xs, ys, color=colour, linestyle=style, linewidth=2, marker="o", markersize=3.5, label=label)
    elif label is not None:
        axes.plot([], [], color=colour, linestyle=style, label=label)


def zoom(axes: "Axes", runs: Sequence[Run]) -> None:
    """Look at the part that tells runs apart, not at the fall from the first step or at a run that diverged."""
    losses = [[event["loss"] for event in (run.evals or run.steps)] for run in runs if run.evals or run.steps]
    low, high = min(map(min, losses)), sorted(map(max, losses))[len(losses) // 2]
    if high > low:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.12 * (high - low))


def plot_resident(axes: "Axes", runs: Sequence[Run], names: list[str], looks: list[tuple[str, str]]) -> None:
    """Weights, gradients and optimizer state end to end, from the full colour to its lightest shade."""
    totals = [sum(run.memory.get(part, 0) for part, _ in PARTS) for run in runs]
    factor, unit = byte_scale(max(totals, default=0))
    widest = max(totals, default=0) or 1
    for row, (run, (colour, _)) in enumerate(zip(runs, looks, strict=True)):
        left = 0.0
        for part, share in PARTS:
            size = run.memory.get(part, 0)
            axes.barh(row, size / factor, left=left / factor, height=0.7, color=blend(colour, share), edgecolor="white")
            if size > 0.11 * widest:
                ink = "white" if share == 1 and colour not in PALE else "black"
                text = (f"{part} " if size > 0.22 * widest else "") + f"{size / factor:.3g}"
                middle = (left + size / 2) / factor
                axes.text(middle, row, text, ha="center", va="center", color=ink, fontsize=8)
            left += size
        axes.text(left / factor, row, f" {left / factor:.3g}", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=f"{unit} (dark: weights, light: optimizer state)", xlim=(0, 1.14 * widest / factor))
    axes.invert_yaxis()


def plot_bars(axes: "Axes", sizes: list[int | None], names: list[str], looks: list[tuple[str, str]]) -> None:
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


def unit_of(size: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit that is not larger than `size`, else the smallest one."""
    return next((unit for unit in units if size >= unit[0]), units[-1])


def byte_scale(size: float) -> tuple[float, str]:
    return unit_of(size, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")))


def human_bytes(size: float) -> str:
    factor, unit = byte_scale(size)
    return f"{size / factor:.3g} {unit}"


def human_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"


# The page.

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
img {{ max-width: 100%; height: auto }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
.note {{ color: #555; font-size: .85rem }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem }}
</style></head><body>
<h1>{title}</h1>
<p><img alt="Loss against tokens and time; memory by part and at its peak. The figures are in the table below." src="data:image/png;base64,{image}"></p>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<p class="note">{note}</p>
<h2>Where the figures come from</h2>
{provenance}
</body></html>
"""  # noqa: E501


def html_page(runs: Sequence[Run], image: bytes) -> str:
    """One page that needs nothing beside it: the picture is inside."""
    titles, rows = table_rows(runs)
    provenance = []
    for name, run in zip(labels(runs), runs, strict=True):
        facts = {key: run.start.get(key) for key in ("config", "corpus", "versions", "hardware")}
        text = html.escape(json.dumps(facts, indent=2, default=str))
        resumed = f", resumed {run.resumes} times" if run.resumes else ""
        summary = html.escape(f"{name}: {run.path.resolve().name}{resumed}")
        provenance.append(f"<details><summary>{summary}</summary><pre>{text}</pre></details>")
    return PAGE.format(
        title=html.escape(headline(runs)),
        image=base64.b64encode(image).decode(),
        head=cells("th", titles),
        body="\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows),
        note=html.escape(NOTE),
        provenance="\n".join(provenance),
    )


def cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


@dataclass(frozen=True)
class Report:
    """Where a report was written."""

    picture: Path
    page: Path
    table: Path


def write_report(runs: Sequence[Run], out: str | Path) -> Report:
    """Write `report.png`, `report.html` and `report.md` of comparable runs into the directory `out`."""
    import io

    if not runs:
        raise InputError("no runs to report: name one run directory or several")
    check_comparable(runs)
    if not any(run.steps or run.evals for run in runs):
        raise InputError(f"{', '.join(str(run.path) for run in runs)}: no step is logged yet, there is nothing to draw")
    buffer = io.BytesIO()
    draw(runs).savefig(buffer, format="png")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out / "report.png", out / "report.html", out / "report.md")
    report.picture.write_bytes(buffer.getvalue())
    report.page.write_text(html_page(runs, buffer.getvalue()), encoding="utf-8")
    report.table.write_text(f"# {headline(runs)}\n\n{markdown_table(runs)}", encoding="utf-8")
    return report
