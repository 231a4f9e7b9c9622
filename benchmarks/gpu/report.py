"""The tables and the picture of a log, nothing else: figures come from lines, never from memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit import FAULTS, Line, gb, number
from benchmarks.table import Table

Lines = Sequence[Line]


def of(lines: Lines, part: str, **keys: Any) -> list[Line]:
    """The lines of a part that have these figures."""
    return [line for line in lines if line["part"] == part and all(line.get(k) == v for k, v in keys.items())]


def in_short(lines: Lines) -> str:
    """How a case went."""
    counts = Counter(line["status"] for line in lines)
    ends = [line for line in lines if line["kind"] == "end" and line["status"] != "ok"]
    text = ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing"
    return text + "".join(f" ({line['reason']})" for line in ends)


def faults(lines: Lines) -> list[str]:
    """What should not be, of ours: one line each."""
    return [f"{where(line)}: {why(line)}" for line in lines if line["status"] in FAULTS and not line.get("peer")]


def where(line: Line) -> str:
    """Which line of a log that is."""
    keys = ("what", "contender", "optimizer", "weights", "of", "batch", "seq", "compile")
    more = " ".join(f"{key}={line[key]}" for key in keys if line.get(key) is not None)
    return f"{line['part']} {line['case']} {more}".strip()


def why(line: Line) -> str:
    """What is wrong with it."""
    said = line.get("reason") or line.get("syncs")
    if said is None and line.get("difference") is not None:
        said = f"{number(line['difference'])} apart at {line.get('worst')}, the limit is {number(line['limit'])}"
        said += f"; never moved: {', '.join(line['not_moved'])}" if line.get("not_moved") else ""
    return f"{line['status']}{f': {said}' if said else ''}"


def tables(lines: Lines) -> list[Table]:
    """All of them; empty ones have no rows."""
    steps = [step_table(lines, case) for case in dict.fromkeys(line["case"] for line in of(lines, "step"))]
    return [
        environment(lines),
        *steps,
        large_table(lines),
        golden_table(lines),
        contract_table(lines),
        compiled_table(lines),
        training_table(lines, "train"),
        training_table(lines, "race"),
        tools_table(lines),
        graph_table(lines),
        others(lines),
    ]


def environment(lines: Lines) -> Table:
    """What it ran on."""
    table = Table("Environment", ("what", "is"), words=2)
    if not lines:
        return table
    table.rows += [("commit", str(lines[0]["commit"])), ("cpu", f"{lines[0]['hardware'].get('cpu')}")]
    table.rows += [(package, str(version or "not installed")) for package, version in lines[0]["versions"].items()]
    for line in of(lines, "env", what="device"):
        keys = ("name", "capability", "driver", "total_bytes", "free_bytes", "allocator")
        table.rows += [(key, str(line[key])) for key in keys if line.get(key) is not None]
        table.rows += [(f"torch's {key}", str(value)) for key, value in line["torch"].items() if value]
    for line in of(lines, "env", what="copy", status="ok"):
        table.rows.append(("copy, GB/s, read and written", number(line["bytes_per_s"] / 1e9)))
    for line in of(lines, "env", what="matmul", status="ok"):
        table.rows.append((f"bf16 matmul of {line['n']}, TFLOP/s", number(line["flops"] / 1e12)))
    for line in of(lines, "env", what="compiler", status="ok"):
        table.rows.append(("compiler", f"works, {line['seconds']:.1f} s" if line["works"] else str(line["fault"])))
    return table


def step_table(lines: Lines, case: str) -> Table:
    """Of one size."""
    head = ("step", "ms", "quartiles", "/ fused", "x floor", "state GB", "extra MB", "launches", "host ms", "first s")
    table = Table(f"Step, {case}", head)
    for line in of(lines, "step", case=case, what="stage", status="ok"):
        table.title += f": {line['parameters'] / 1e9:.3g}e9 parameters, {line['layers']} of {line['of']} layers"
        absent = ", ".join(line["not_installed"])
        table.note = "not installed: " + absent if absent else ""
    for line in of(lines, "step", case=case, status="ok"):
        if "contender" not in line:
            continue
        mode = {True: ", compiled", False: ", eager"}.get(line.get("compile"), "")  # type: ignore[arg-type]
        name = line["contender"] + mode + " (!)" * (line.get("moved") is False)
        first = number(line.get("first_seconds"))
        if "seconds" not in line:
            table.rows.append((name, *["-"] * 8, first))
            continue
        time, extra = line["seconds"], line.get("extra_allocated")
        launched = line.get("launches") or line.get("operations")
        cells = (
            *(number(1e3 * time["median"]), f"{number(1e3 * time['low'])}-{number(1e3 * time['high'])}"),
            *(number(line["ratio"]["median"]), number(line["over_floor"]), gb(line["state_bytes"])),
            "-" if extra is None else number(extra / 1e6),
            ("-" if launched is None else f"{launched:,}") + " a layer" * ("launches_of" in line),
            *(number(1e3 * line["host_seconds"]["median"]), first),
        )
        table.rows.append((name, *cells))
    return table


def planned(lines: Lines, line: Line) -> int | None:
    """The plan of this line's step, in bytes."""
    found = of(lines, "plan", of=line["case"], batch=line["batch"], seq=line["seq"], status="ok")
    return found[-1]["planned"] if found else None


def large_table(lines: Lines) -> Table:
    """LLaMA-7B."""
    head = ("weights", "batch", "tokens/s", "s", "forward", "backward", "step", "peak GB", "reserved", "plan", "above")
    note = "forward, backward, step: of an iteration that keeps its gradients. plan: tensors alone, without the context"
    table = Table("LLaMA-7B, the step inside backward", head, note=note)
    for line in of(lines, "7b", status="ok"):
        if line.get("what") not in ("first", "released"):
            continue
        same = {key: line[key] for key in ("case", "batch", "seq", "compile")}
        done = of(lines, "7b", what="released", status="ok", **same)
        if line["what"] == "first" and done:
            continue
        parts: Line = next((s["seconds"] for s in of(lines, "7b", what="split", status="ok", **same)), {})
        plan, peak = planned(lines, line), line.get("allocated")
        seconds = line["seconds"]["median"] if line["what"] == "released" else line["seconds"]
        name = line["case"] + {True: ", compiled", False: ", eager"}.get(line["compile"], "")
        row = (
            *(name + " (first step)" * (line["what"] == "first"), f"{line['batch']} x {line['seq']}"),
            *(number(line.get("tokens_per_s"), 4), number(seconds)),
            *(number(parts.get(key)) for key in ("forward", "backward", "step")),
            *(gb(peak), gb(line.get("reserved")), gb(plan)),
            f"{peak / plan - 1:+.1%}" if peak and plan else "-",
        )
        table.rows.append(row)
    return table


def golden_table(lines: Lines) -> Table:
    """Bits."""
    table = Table("The hash and the rounding, beside the CPU's", ("what", "bitwise", "largest difference"))
    for line in of(lines, "contract", case="golden", kind="figures"):
        difference = number(line.get("largest_difference"))
        table.rows.append((line["what"], "yes" if line.get("equal") else "NO", difference))
    return table


def contract_table(lines: Lines) -> Table:
    """A row for each optimizer and kind of weights."""
    head = ("optimizer", "weights", "difference", "limit", "worst", "entries unequal", "release", "waits")
    table = Table("On the device beside the CPU, eager", head, words=2)
    for line in of(lines, "contract", what="numbers"):
        same = {key: line[key] for key in ("optimizer", "weights")}
        inside = next(iter(of(lines, "contract", what="release", **same)), {"status": "-"})
        sync = next(iter(of(lines, "contract", what="no sync", **same)), None)
        waits = "-" if sync is None else "no" if sync["status"] == "ok" else "YES"
        released = "bitwise" if inside["status"] == "ok" else inside["status"]
        if line.get("difference") is None:
            table.rows.append((line["optimizer"], line["weights"], line["status"], *["-"] * 3, released, waits))
            continue
        figures = number(line["difference"]) + " (!)" * (line["status"] != "ok"), number(line["limit"]), line["worst"]
        table.rows.append((*same.values(), *figures, f"{line['unequal']:.2%}", released, waits))
    return table


def compiled_table(lines: Lines) -> Table:
    """A row for each rule and kind of weights."""
    table = Table(
        "Compiled beside eager", ("rule", "weights", "compile s", "graphs", "difference", "entries unequal"), words=2
    )
    for line in of(lines, "compiled", what="rule"):
        name = line["optimizer"], line["weights"]
        if line.get("difference") is None:
            table.rows += [(*name, line["status"], "-", "-", "-")] * (line["status"] != "skipped")
            continue
        difference = number(line["difference"]) + " (!)" * (line["status"] != "ok")
        cells = number(line["compile_seconds"]), str(line["graphs"]), difference, f"{line['unequal']:.2%}"
        table.rows.append((*name, *cells))
    return table


def training_table(lines: Lines, part: str) -> Table:
    """Pace, and the loss where the shortest run ended."""
    runs = [line for line in of(lines, part, what="run", status="ok") if line["curve"]]
    same = min((line["tokens"] for line in runs), default=0)
    head = ("optimizer", "tokens/s", "steps", "tokens", "train s", f"loss at {same:,}", "validation", "peak GB")
    table = Table(f"{part}: {runs[0]['config']['size'] if runs else ''}", head)
    for line in runs:
        at = [loss for tokens, loss in line["curve"] if tokens <= same][-1:]
        cells = (
            *(line["optimizer"], number(line["tokens_per_s"], 4), f"{line['steps']:,}", f"{line['tokens']:,}"),
            *(f"{line['train_seconds']:.1f}", f"{at[0]:.3f}" if at else "-"),
            *(f"{line['validation']:.3f}" if line["validation"] else "-", gb(line.get("allocated"))),
        )
        table.rows.append(cells)
    return table


def tools_table(lines: Lines) -> Table:
    """How two runs that are alike differ, and a resumed one, or one on shards."""
    head = ("tool", "optimizer", "weights", "made again", "resumed, or on shards")
    table = Table("pretrain, transformers' Trainer, FSDP2", head, words=3)
    for line in of(lines, "tools", kind="figures"):
        unlike = {text.partition(":")[0]: "DIFFERS" for text in line.get("unlike", [])}
        found = [line.get("again"), line.get("resumed", line.get("difference"))]
        cells = [number(t) if t else "bitwise" for t in found] if "unlike" not in line else ["bitwise"] * 2
        cells = [unlike.get(which, cell) for which, cell in zip(("again", "resumed"), cells, strict=True)]
        cells = cells if line["status"] in ("ok", "differs") else [line["status"]] * 2
        cells[0] = "-" if line["what"] == "FSDP2" else cells[0]
        table.rows.append((*(line[key] for key in ("what", "optimizer", "weights")), *cells))
    return table


def graph_table(lines: Lines) -> Table:
    """Medians of a step and of its graph."""
    head = ("step as a CUDA graph", "ms", "of the graph", "host ms", "of the graph", "note")
    table = Table("CUDA graphs", head, note="rates and keys are those of the capture: a measurement, no way to train")
    for line in of(lines, "graph", what="graph", status="ok"):
        name = line["optimizer"] + (", compiled" if line["compile"] else ", eager")
        pairs = (
            [line[key][which] for key in ("device", "host") for which in ("step", "graph")] if line["captured"] else []
        )
        cells = [number(1e3 * pair["median"]) for pair in pairs] or ["-"] * 4
        table.rows.append((name, *cells, line.get("note", "")))
    return table


def others(lines: Lines) -> Table:
    """What is no figure: failures, what did not fit, what was left out."""
    table = Table("What did not go well, or not at all", ("what", "why"), words=2)
    table.rows += [(where(line), why(line)) for line in lines if line["status"] != "ok"]
    return table


# --- the picture ---


def draw(lines: Lines, path: Path) -> bool:
    """Steps beside fused AdamW, 7B's peaks beside their plans, losses by tokens; False if it could not."""
    steps = [line for line in of(lines, "step", status="ok") if "contender" in line and "ratio" in line]
    peaks = [line for line in of(lines, "7b", what="released", status="ok") if line.get("allocated")]
    runs = [line for line in (*of(lines, "train", what="run"), *of(lines, "race", what="run")) if line.get("curve")]
    panels = [(data, paint) for data, paint in ((steps, _steps), (peaks, _peaks), (runs, _runs)) if data]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not panels:
        return False
    heights = [0.25 * len(data) + 1.2 if paint is not _runs else 3.5 for data, paint in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained", dpi=140)
    axes = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (data, paint) in zip(axes, panels, strict=True):
        paint(axis, data, lines)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(str(lines[0]["hardware"].get("gpu") or lines[0]["hardware"].get("cpu")), fontsize=10)
    figure.savefig(path)
    return True


def _steps(axis: Any, steps: Lines, _: Lines) -> None:
    modes = {True: ", compiled", False: ", eager"}
    names = [f"{line['case']} {line['contender']}{modes.get(line.get('compile'), '')}" for line in steps]  # type: ignore[arg-type]
    colours = ["0.6" if line.get("peer") else "tab:blue" for line in steps]
    axis.barh(range(len(steps)), [line["ratio"]["median"] for line in steps], color=colours)
    axis.set_yticks(range(len(steps)), names, fontsize=6)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="time of a step / torch's fused AdamW")
    axis.invert_yaxis()


def _peaks(axis: Any, peaks: Lines, lines: Lines) -> None:
    axis.barh(range(len(peaks)), [line["reserved"] / 1e9 for line in peaks], color="0.85", label="reserved")
    axis.barh(range(len(peaks)), [line["allocated"] / 1e9 for line in peaks], height=0.5, label="allocated")
    marks = [(plan / 1e9, i) for i, line in enumerate(peaks) if (plan := planned(lines, line))]
    axis.scatter([x for x, _ in marks], [y for _, y in marks], marker="|", s=160, color="black", label="planned")
    axis.set_yticks(range(len(peaks)), [f"{x['case']}, {x['batch']} x {x['seq']}" for x in peaks], fontsize=7)
    axis.set(xlabel="peak, GB")
    axis.legend(fontsize=7, frameon=False)
    axis.invert_yaxis()


def _runs(axis: Any, runs: Lines, _: Lines) -> None:
    for line in runs:
        tokens, losses = zip(*line["curve"], strict=True)
        axis.plot(tokens, losses, label=f"{line['part']} {line['optimizer']}", linewidth=1)
    axis.set(xlabel="tokens", ylabel="loss")
    axis.legend(fontsize=7, frameon=False)
