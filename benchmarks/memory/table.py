"""The log as a table and a picture; nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apollo_optim.train.models import SIZES
from benchmarks.kit import Line, mb
from benchmarks.memory.cases import CASES
from benchmarks.table import markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEY = ("case", "size", "dtype", "batch", "seq", "steps", "checkpointing", "malloc")
"""What makes a measurement the same one."""


def newest(rows: Sequence[Line]) -> list[Line]:
    """Of the same measurement the last one, in the order of sizes and cases."""
    kept = {tuple(row[key] for key in KEY): row for row in rows}
    order, sizes = list(CASES), list(SIZES)
    return sorted(kept.values(), key=lambda row: (sizes.index(row["size"]), row["dtype"], order.index(row["case"])))


COLUMNS = (
    *("case", "weights", "gradients", "state", "peak", "planned", "difference"),
    *("library pages", "free heap", "compiler", "other, at rest", "at the peak"),
)
RESIDUAL = ("pages", "heap", "compiler", "rest", "peak")
NOTE = (
    "MB (1e6 bytes). Weights, gradients (the most that were there together) and state: bytes of tensors. Peak: VmHWM "
    "of the process over its whole life, less what it had resident after its imports. Planned: as `apollo-optim plan` "
    "for the same run; peers have no plan. The last five columns are what the difference is made of, as measured: "
    "pages of libraries that were loaded on first use, blocks that are free and kept by glibc, the compiler (of the "
    "step), what else the process keeps between steps beyond weights and state, and what was there "
    "at the peak alone."
)


def grouped(rows: Sequence[Line]) -> dict[str, list[Line]]:
    """The rows of each model and shape, with their heading."""
    groups: dict[str, list[Line]] = {}
    for row in rows:
        title = f"{row['size']}, {row['dtype']}, {row['batch']} x {row['seq']} tokens, {row['steps']} steps"
        title += ", activations recomputed" * row["checkpointing"] + ", malloc as pretrain" * (
            row["malloc"] == "pretrain"
        )
        groups.setdefault(title, []).append(row)
    return groups


def table(rows: Sequence[Line]) -> str:
    """Markdown, a table for each model."""
    text = []
    for title, group in grouped(rows).items():
        text += [f"## {title}", "", markdown(COLUMNS, map(cells, group), "lr"), ""]
    return "\n".join([*text, NOTE, ""])


def line(row: Line) -> str:
    """A row of the table, while it is made."""
    return markdown(cells(row), [], "lr").partition("\n")[0]


def cells(row: Line) -> list[str]:
    """A row of the table."""
    name = row["case"] + (f" ({row['package']})" if row.get("package") else "")
    if row["status"] != "ok":
        what = "cannot be imported" if row["status"] == "missing" else row["status"]
        return [name, f"{what}: {row['reason']}", *[""] * (len(COLUMNS) - 2)]
    found = [name, mb(row["weights"]), mb(row["gradients"]), mb(row["optimizer"]), mb(row["peak"] - row["baseline"])]
    if "plan" in row:
        total = row["plan"]["total"]
        found += [mb(total), f"{row['difference'] / total:+.1%}" + " (other bytes than planned!)" * (not row["equal"])]
        found += [mb(row["residual"].get(part), "+.1f") for part in RESIDUAL]
    return found + ["-"] * (len(COLUMNS) - len(found))


def draw(rows: Sequence[Line]) -> Figure:
    """A stacked bar for each case that was measured, and a mark where its plan is."""
    from matplotlib.figure import Figure

    groups = {
        title: ok for title, group in grouped(rows).items() if (ok := [row for row in group if row["status"] == "ok"])
    }
    heights = [len(group) + 1.5 for group in groups.values()]
    figure = Figure(figsize=(9, 1 + 0.33 * sum(heights)), layout="constrained", dpi=140)
    panels = figure.subplots(len(groups), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (title, group) in zip(panels, groups.items(), strict=True):
        draw_group(axes, title, group)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )
    return figure


def draw_group(axes: Axes, title: str, group: Sequence[Line]) -> None:
    """The bars of one model."""
    from apollo_optim.plan.draw import COLOURS

    parts = (("weights", "weights"), ("gradients", "gradients"), ("optimizer", "state, matrices"))
    peaks = [(row["peak"] - row["baseline"]) / 1e6 for row in group]
    axes.barh(range(len(group)), peaks, height=0.7, color="0.85", label="peak less imports")
    lefts = [0.0] * len(group)
    for key, colour in parts:
        # The gradients of a step inside backward are there at another moment than the peak, maybe.
        sizes = [min(row[key] / 1e6, peak - left) for row, peak, left in zip(group, peaks, lefts, strict=True)]
        label = "optimizer state" if key == "optimizer" else key
        axes.barh(range(len(group)), sizes, left=lefts, height=0.7, color=COLOURS[colour], label=label)
        lefts = [left + size for left, size in zip(lefts, sizes, strict=True)]
    marks = [(row["plan"]["total"] / 1e6, i) for i, row in enumerate(group) if "plan" in row]
    axes.scatter([x for x, _ in marks], [y for _, y in marks], marker="|", s=160, color="black", label="planned")
    for i, peak in enumerate(peaks):
        axes.text(peak, i, f"  {peak:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(group)), [row["case"] for row in group], fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="MB", xlim=(0, 1.12 * max(peaks)))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def write(rows: Sequence[Line], out: Path) -> str:
    """`table.md` and `memory.png` of the log."""
    text = table(rows)
    (out / "table.md").write_text(text, encoding="utf-8")
    if any(row["status"] == "ok" for row in rows):
        draw(rows).savefig(out / "memory.png")
    return text
