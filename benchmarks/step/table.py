"""The log of `bench step` as a table and a chart; nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apollo_optim.train.models import DTYPES, SIZES
from benchmarks.kit import Line, mb, spread, told
from benchmarks.step.contenders import BASELINE, CONTENDERS
from benchmarks.step.stage import HALVES
from benchmarks.table import markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Result:
    """A line of the log beside the fused AdamW that stepped in the same rounds."""

    row: Line
    base: Line | None

    @property
    def problem(self) -> str:
        if "seconds" not in self.row:
            return str(self.row["error"])
        if self.base is None or "seconds" not in self.base:
            return f"{BASELINE} failed in its batch"
        return ""

    @staticmethod
    def _times(row: Line, half: str | None) -> list[float]:
        seconds = row["seconds"]
        return seconds[half] if half else [a + b for a, b in zip(*(seconds[half] for half in HALVES), strict=True)]

    def seconds(self, half: str | None = None) -> Line:
        return spread(self._times(self.row, half))

    def paired(self, half: str | None = None) -> Line:
        """The ratio to fused AdamW, round by round."""
        assert self.base is not None
        pairs = zip(self._times(self.row, half), self._times(self.base, half), strict=True)
        return spread([own / base for own, base in pairs])

    @property
    def of_medians(self) -> float:
        assert self.base is not None
        return float(self.seconds()["median"] / spread(self._times(self.base, None))["median"])

    @property
    def floor(self) -> float:
        """The bytes that must move, over AdamW's."""
        assert self.base is not None
        return float(sum(self.row["floor_bytes"].values()) / sum(self.base["floor_bytes"].values()))

    def extra(self, half: str) -> str:
        size, largest = self.row["extra_bytes"][half], self.row["largest_bytes"][half]
        return f"{mb(size, '.1f')} ({size / largest:.2f})"

    @property
    def notes(self) -> str:
        notes = [
            f"left {self.row['untouched']} parameters as they were" if self.row["untouched"] else "",
            "writes into the gradients" if self.row["writes_gradients"] else "",
            "" if self.row["finite"] else "weights not finite at the end of its batch",
        ]
        return "; ".join(note for note in notes if note)


Section = tuple[str, dict[str, Result]]


def sections(rows: Sequence[Line]) -> list[Section]:
    """The newest line of each contender by model, dtype and machine, in the order of the table."""
    bases = {row["batch"]: row for row in rows if row["kind"] == "step" and row["contender"] == BASELINE}
    found: dict[tuple[Any, ...], dict[str, Result]] = {}
    for row in rows:
        if row["kind"] == "step":
            hardware = row["hardware"]
            place = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
            key = (row["size"], row["cut"], row["dtype"], place)
            found.setdefault(key, {})[row["contender"]] = Result(row, bases.get(row["batch"]))
    order = {name: i for i, name in enumerate(CONTENDERS)}

    def rank(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return list(SIZES).index(key[0]), key[1], list(DTYPES).index(key[2]), key[3]

    return [
        (
            f"{key[0]}, {SHORT[key[2]]}" + (f", {key[1].upper()}" if key[1] else "") + f": {key[3]}",
            dict(sorted(found[key].items(), key=lambda pair: order.get(pair[0], len(order)))),
        )
        for key in sorted(found, key=rank)
    ]


HEAD = (
    "optimizer", "what", "ms", "x fused AdamW, paired", "of medians", "byte floor, x AdamW's", "over its floor",
    "matrices only, ms", "matrices only, x", "first step, s", "graphs", "state, MB",
    "extra MB, matrices (of the largest)", "extra MB, rest (of the largest)", "notes",
)  # fmt: skip
LEGEND = """\
Everything included (embedding, head and norms, too) unless a column says otherwise. ms and x: median (quartiles) over
the rounds; paired: the ratio of each round. Byte floor: what the rule must move, over what AdamW must; over its floor:
how much longer the step takes than these bytes would at fused AdamW's speed. First step: building, compiling, stepping.
Extra: the most that one step allocates beyond weights, gradients and state, and over the largest tensor of its half.
MB = 1e6 bytes."""


def cells(name: str, result: Result) -> list[str]:
    row = result.row
    says = CONTENDERS[name].says if name in CONTENDERS else ""
    says = says.replace("rank r", f"rank {row['rank']}") if row["rank"] else says
    if result.problem:
        return [name, says, result.problem, *[""] * (len(HEAD) - 3)]
    ratio, matrices = result.paired(), result.paired("matrices")
    return [
        name,
        says,
        told(result.seconds(), 1e3, 1),
        told(ratio),
        f"{result.of_medians:.2f}",
        f"{result.floor:.2f}",
        f"{ratio['median'] / result.floor:.2f}",
        told(result.seconds("matrices"), 1e3, 1),
        told(matrices),
        f"{row['first_step']:.1f}",
        str(row["graphs"]),
        mb(sum(row["state_bytes"].values()), ".1f"),
        result.extra("matrices"),
        result.extra("rest"),
        result.notes,
    ]


def speedups(results: dict[str, Result]) -> list[str]:
    """Ours over apollo-torch's row of the same rule, everything included and matrices alone."""
    lines = []
    for name, result in results.items():
        rival = results.get((CONTENDERS[name].rival if name in CONTENDERS else None) or "")
        if rival is not None and not result.problem and not rival.problem:
            whole, matrices = (
                rival.paired(half)["median"] / result.paired(half)["median"] for half in (None, "matrices")
            )
            lines.append(f"- {name}: {whole:.2f}x as fast as {rival.row['contender']} (matrices only: {matrices:.2f}x)")
    return lines


def table(rows: Sequence[Line]) -> str:
    """Markdown: a section for each model, dtype and machine, then the recompilations."""
    lines = ["# The time of a step", "", LEGEND]
    for title, results in sections(rows):
        lines += ["", f"## {title}", ""]
        measured = [result.row for result in results.values() if not result.problem]
        if measured:
            rounds = sorted({row["rounds"] for row in measured})
            load = max(row["load"] for row in measured)
            lines += [f"Rounds: {', '.join(map(str, rounds))}. Highest load average at a batch's end: {load:.1f}.", ""]
        rows_here = [cells(name, result) for name, result in results.items()]
        lines.append(markdown(HEAD, rows_here, "ll" + "r" * (len(HEAD) - 3) + "l"))
        if faster := speedups(results):
            lines += ["", *faster]
    newest = {(row["contender"], row["dtype"]): row for row in rows if row["kind"] == "schedule"}
    compiled = [row for row in newest.values() if "error" in row or row["graphs"]]
    if compiled:
        lines += ["", "## Recompilations under a cosine schedule", ""]
        head = ("optimizer", "dtype", "model", "steps", "graphs of the first step", "later graphs")
        lines.append(markdown(head, map(recompiled, compiled), "lllr"))
    return "\n".join(lines) + "\n"


def recompiled(row: Line) -> list[str]:
    """A row of the table of recompilations."""
    found = [row["error"], ""] if "error" in row else [str(row["graphs"]), str(row["recompiled"])]
    return [row["contender"], SHORT[row["dtype"]], row["size"], str(row["steps"]), *found]


COLOURS = {"apollo-optim": "#0072B2", "torch": "#999999"}  # Okabe and Ito's palette
PEER = "#E69F00"
WIDEST = 8.0  # longer bars are cut; their figure is beside them


def draw(rows: Sequence[Line], path: Path) -> None:
    """Bars of the paired ratio, everything included, and a line at fused AdamW."""
    from matplotlib.figure import Figure

    parts = sections(rows)
    if not parts:
        return
    heights = [len(results) + 2 for _, results in parts]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 0.6), layout="constrained", dpi=140)
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)
    for (title, results), axes in zip(parts, panels[:, 0], strict=True):
        draw_section(axes, title, results)
    figure.savefig(path)


def draw_section(axes: Axes, title: str, results: dict[str, Result]) -> None:
    for y, (name, result) in enumerate(results.items()):
        if result.problem:
            axes.text(0.03, y, result.problem[:90], va="center", fontsize=7, color="0.4", style="italic")
            continue
        ratio = result.paired()
        median, low, high = (min(ratio[key], WIDEST) for key in ("median", "low", "high"))
        colour = COLOURS.get(CONTENDERS[name].package, PEER) if name in CONTENDERS else PEER
        axes.barh(y, median, height=0.7, color=colour)
        axes.plot([low, high], [y, y], color="black", linewidth=1)
        axes.plot([result.floor] * 2, [y - 0.35, y + 0.35], color="#D55E00", linewidth=2)
        axes.text(max(median, high), y, f" {ratio['median']:.2f}", va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yticks(range(len(results)), list(results), fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
    widest = max((min(r.paired()["high"], WIDEST) for r in results.values() if not r.problem), default=1.0)
    axes.set_xlim(0, 1.1 * max(widest, 1.0))
    axes.set_xlabel(
        f"time of a step over fused AdamW's (bars end at {WIDEST:g}); black: quartiles, red: the byte floor", fontsize=8
    )
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
