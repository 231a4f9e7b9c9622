"""The table and the pictures, from the lines alone; the page of both is `page.py`'s."""

import functools
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from apollo_optim.core.errors import InputError
from apollo_optim.train.config import from_dict
from apollo_optim.train.plan import state_of
from benchmarks.kit import mb
from benchmarks.race.agenda import Board, Row, front, paired
from benchmarks.race.methods import AXES
from benchmarks.race.names import keep_apart
from benchmarks.race.protocol import LEADERS, SEARCH_SHARE, SETTINGS, STAGES, Setting, Trial, config_of
from benchmarks.race.trial import events
from benchmarks.table import markdown


def one_text(rows: Iterable[Row], what: str) -> None:
    """Raises InputError where lines of two corpora would be compared, naming both."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["corpus"], row)
    if len(first) > 1:
        told = "; ".join(f"{corpus[:12]}... ({row['method']}, seed {row['seed']})" for corpus, row in first.items())
        raise InputError(
            f"{what} would compare lines of {len(first)} corpora: {told}. Take the lines of one of them out"
        )


# --- the table ---


def table(board: Board, setting: Setting) -> str:
    """Markdown: every method with a full run, best first.

    A difference is of losses, paired by seed, in per cent of perplexity; its error is that of the mean over seeds.

    Raises InputError where the lines are of several corpora.
    """
    finals = {name: trials for name in board.methods if (trials := board.finals(setting, name))}
    one_text((board.rows[trial] for trials in finals.values() for trial in trials), f"the table of {setting.name}")
    if not finals:
        return f"No full run of {setting.name} yet."
    base = board.baseline(setting)
    order = sorted(finals, key=lambda name: mean_loss(board, finals[name]))
    head = [
        "method",
        "perplexity, each seed",
        "mean",
        "sd",
        f"against {base}, paired",
        "bits per byte",
        "state, MB",
        "at 7B, GB",
    ]
    head += [
        "lr matrices / embedding / head",
        "knob",
        "search",
        "off by 2x",
        "optimizer, ms a step (processors differ)",
    ]
    cells = [table_row(board, setting, name, finals[name], finals.get(base, [])) for name in order]
    return markdown(head, cells, "llrrlrrrllllr")


def table_row(board: Board, setting: Setting, name: str, trials: list[Trial], base: list[Trial]) -> list[str]:
    """One line of the table."""
    rows, trial = [board.rows[trial] for trial in trials], trials[0]
    perplexities = [math.exp(board.loss(trial)) for trial in trials]
    bits = [row["bits_per_byte"] for row in rows if row["bits_per_byte"] is not None]
    searched, method = board.searched(setting, name), board.methods[name]
    found = f"{len(searched.tried)} runs" if setting.budget else f"as in {setting.rates_of}"
    if searched.open_axes:
        found += f", {', '.join(searched.open_axes)} open"
    slow = [row["step_optimizer"] for row in rows if row["step_optimizer"] is not None]
    return [
        label(board, name),
        ", ".join(f"{p:.2f}" for p in perplexities),
        f"{statistics.mean(perplexities):.2f}",
        f"{statistics.stdev(perplexities):.2f}" if len(trials) > 1 else "",
        against(board, trials, base),
        f"{statistics.mean(bits):.3f}" if bits else "",
        mb(rows[0]["state_total"], ".2f"),
        f"{state_at_7b(board, trial) / 1e9:.2f}",
        f"{trial.lr:g} / {trial.embedding_lr:g} / {trial.head_lr:g}",
        f"{method.knob.key.removeprefix('optim.')} half-life {trial.knob:g}",
        found,
        basin(board, searched.tried),
        f"{1e3 * statistics.median(slow):.0f}" if slow else "",
    ]


def state_at_7b(board: Board, trial: Trial) -> int:
    """Bytes that this method would keep for LLaMA-7B, as the planner counts them."""
    cfg = config_of(trial, "out", board.methods)
    optim = {key: value for key, value in cfg.optim.flat().items() if not key.endswith("lr") and key != "seed"}
    return _state_at_7b(json.dumps(optim))


@functools.cache
def _state_at_7b(optim: str) -> int:
    return state_of(from_dict({"model": {"name": "llama-7b", "dtype": "bfloat16"}, "optim": json.loads(optim)}))


def mean_loss(board: Board, trials: list[Trial]) -> float:
    """Over the seeds."""
    return statistics.mean(board.loss(trial) for trial in trials)


def against(board: Board, trials: list[Trial], base: list[Trial]) -> str:
    """The paired difference and its standard error, of the perplexity: `+3.4% +- 0.2% (3 seeds)`."""
    pairs = paired(board, trials, base)
    if not pairs or trials == base:
        return "-"
    differences = [board.loss(one) - board.loss(other) for one, other in pairs]
    mean = statistics.mean(differences)
    told = f"{math.expm1(mean):+.1%}"
    if len(differences) > 1:  # of losses; a small one moves the perplexity by so many times the ratio
        told += f" +- {math.exp(mean) * statistics.stdev(differences) / math.sqrt(len(differences)):.1%}"
    told += f" ({len(differences)} seed{'s' * (len(differences) > 1)})"
    kinds = [{board.rows[trial]["hardware"]["capability"] for trial in pair} for pair in pairs]
    return told + " on several processors" * any(len(kind) > 1 for kind in kinds)


def label(board: Board, name: str) -> str:
    """A method's name, and the recipe's in the library where it has one."""
    recipe = board.methods[name].recipe
    return f"{name} ({recipe})" if recipe else name


def basin(board: Board, tried: tuple[Trial, ...]) -> str:
    """How much a search run is worse at twice and at half of each best rate: `lr +9/+4 %, embedding +2/+1 %`.

    Of the best pair of runs that differ in this rate alone: the others may have become better since.
    """
    if not tried:
        return ""
    best = min(tried, key=board.loss)
    told = []
    for axis in (axis for axis in AXES if axis != "knob"):
        sides = []
        for factor in (2.0, 0.5):
            wanted = getattr(best, axis) * factor
            there = [trial for trial in tried if math.isclose(getattr(trial, axis), wanted, rel_tol=0.01)]
            at_best = {replace(trial, **{axis: getattr(best, axis)}): trial for trial in there}
            pairs = [(board.loss(here), board.loss(at_best[here])) for here in tried if here in at_best]
            here_loss, there_loss = min(pairs, default=(0.0, math.nan))
            worse = math.expm1(there_loss - here_loss)
            sides.append("?" if math.isnan(worse) else "stopped" if math.isinf(worse) else f"{100 * worse:+.0f}")
        told.append(f"{axis.removesuffix('_lr')} {'/'.join(sides)} %")
    return ", ".join(told)


# --- where the race stands ---


def status(board: Board, running: list[str]) -> str:
    """What is done, what is running, what comes next, what the whole race costs."""
    rows = board.rows.values()
    lines = ["method                       setting  search        best so far                       full runs"]
    for setting in SETTINGS.values():
        for name in board.methods:
            searched, finals = board.searched(setting, name), board.finals(setting, name)
            tried = [trial for trial in searched.tried if trial in board.rows]
            if not tried and not finals:
                continue
            state = "done" if searched.finished else "open"
            best = min(tried, key=board.loss, default=None)
            rates = "" if best is None else f"{best.lr:g}/{best.embedding_lr:g}/{best.head_lr:g}/{best.knob:g}"
            figure = "" if best is None else f"{math.exp(board.loss(best)):.2f}"
            full = ", ".join(f"{math.exp(board.loss(trial)):.2f}" for trial in finals)
            count = f"{len(tried)}/{setting.budget} {state}" if setting.budget else "-"
            lines.append(f"{name:<28} {setting.name:<8} {count:<12}  {figure:>6} {rates:<26}  {full}".rstrip())
    wanted = list(board.wanted())
    lines += [
        "",
        f"{len(board.rows)} lines; running: {', '.join(running) or 'nothing'}",
        f"next: {', '.join(trial.name for trial in wanted[:3]) or 'nothing'}",
        f"spent: {hours(sum(row['wall'] for row in rows))} by the clock, {sum(row['tokens'] for row in rows):,} tokens",
        f"ahead: about {hours(ahead(board))} of one core, with whole budgets and no method falling behind",
    ]
    return "\n".join(lines)


def hours(seconds: float) -> str:
    """In words."""
    return f"{seconds / 3600:.1f} hours"


def ahead(board: Board) -> float:
    """Processor seconds that the queue may take: tokens still to train, at the pace of the lines there are.

    A method that has no full run yet counts as one that will be close to the best.
    """
    rows = [row for row in board.rows.values() if row["step_cpu"] and row["model"] == "llama-4m"]
    pace = statistics.median(row["step_cpu"] / row["batch_tokens"] for row in rows) if rows else 1 / 4096
    ranked = board.ranking()
    unknown = [name for name in board.methods if name not in ranked]
    total, counted = 0.0, set()
    for stage in STAGES:
        setting = SETTINGS[stage.setting]
        run = pace * setting.tokens * setting.steps * (2.5 if setting.model == "llama-9m" else 1.0)  # by its parameters
        most = LEADERS + 1 if stage.who in ("leaders", "winners") else len(board.methods)
        for name in [*dict.fromkeys([*board.chosen(stage), *unknown])][:most]:
            searched = board.searched(setting, name)
            if not searched.finished and (setting.name, name) not in counted:
                counted.add((setting.name, name))
                total += (setting.budget - len(searched.tried)) * run / SEARCH_SHARE
            seeds = {trial.seed for trial in board.finals(setting, name)}
            total += len(set(stage.seeds) - seeds) * run
    return total


# --- the pictures ---


def describe(setting: Setting) -> str:
    """A setting in words."""
    return f"{setting.name}: {setting.model} on `{setting.source}`, {setting.steps} steps of {setting.tokens:,} tokens"


def pareto(board: Board, settings: list[Setting], path: Path) -> Path:
    """Loss against bytes of state, a panel a setting. Filled: two seeds and more. The line: what nothing beats."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    columns = min(2, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.8 * rows), layout="constrained")
    for place, setting in enumerate(settings, 1):
        axes = figure.add_subplot(rows, columns, place)
        finals = {name: trials for name in board.methods if (trials := board.finals(setting, name))}
        one_text((board.rows[trial] for trials in finals.values() for trial in trials), "the picture")
        points = {
            name: (board.rows[trials[0]]["state_total"] / 1e6, math.exp(mean_loss(board, trials)), len(trials))
            for name, trials in finals.items()
            if math.isfinite(mean_loss(board, trials))
        }
        for name, (size, perplexity, seeds) in points.items():
            axes.plot(size, perplexity, "o", color="C0", fillstyle="full" if seeds > 1 else "none")
            axes.annotate(label(board, name), (size, perplexity), xytext=(4, 4), textcoords="offset points", fontsize=7)
        best = front([(size, perplexity) for size, perplexity, _ in points.values()])
        axes.step([x for x, _ in best], [y for _, y in best], where="post", color="C1", linewidth=1)
        axes.set(title=describe(setting), xlabel="optimizer state, MB", ylabel="validation perplexity", xscale="log")
        axes.margins(0.15)  # room for the names
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3, which="both")
    keep_apart(figure)
    figure.savefig(path, dpi=150)
    return path


def curves(board: Board, setting: Setting, results: Path) -> Path:
    """Training loss over the tokens, the mean over the seeds with the band between the lowest and the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(board.methods):
        logs = [results / "logs" / f"{trial.name}.jsonl" for trial in board.finals(setting, name)]
        runs = [steps for log in logs if (steps := events(log, "step"))]
        if not runs:
            continue
        tokens = [[record["tokens"] / 1e6 for record in steps] for steps in runs]
        losses = [[record["loss"] for record in steps] for steps in runs]
        together = list(zip(*losses, strict=True))
        axes.plot(
            tokens[0],
            list(map(statistics.mean, together)),
            color=f"C{number % 10}",
            linewidth=1,
            label=label(board, name),
        )
        if len(runs) > 1:
            axes.fill_between(
                tokens[0], list(map(min, together)), list(map(max, together)), color=f"C{number % 10}", alpha=0.2
            )
    axes.set(title=describe(setting), xlabel="million tokens", ylabel="training loss", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    if axes.lines:
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(results / "curves.png", dpi=150)
    return results / "curves.png"
