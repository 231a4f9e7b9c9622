"""The log of the formats as tables; nothing is measured here."""

import statistics
from collections.abc import Sequence

from benchmarks.kit import Line
from benchmarks.table import markdown

KINDS = ("error", "drift", "perplexity")
LR, REST_LR = 1.25e-3, 2e-2  # results/race/llama-4m: the best short runs of apollo-mini


def table(rows: Sequence[Line]) -> str:
    """Markdown, a section for each kind of measurement that there is."""
    sections = {"error": error_table, "drift": drift_table, "perplexity": perplexity_table}
    found = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    return "\n\n".join(sections[kind](of) for kind, of in found.items() if of)


def error_table(rows: Sequence[Line]) -> str:
    """To nearest, a column for each distribution."""
    distributions = list(dict.fromkeys(row["distribution"] for row in rows))
    errors: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        name, size = row["format"].partition("-")[0], f"{row['bytes_per_weight']:.4f}"
        at = (str(row["bits"]), str(row["group_size"]), name, size)
        errors.setdefault(at, {})[row["distribution"]] = row["error"]
    cells = [[*at, *(f"{found[d]:.3%}" if d in found else "" for d in distributions)] for at, found in errors.items()]
    title = "## Rounding to nearest: error relative to the entries (root mean squares)"
    return f"{title}\n\n{markdown(['bits', 'group', 'format', 'bytes a weight', *distributions], cells)}"


DRIFT = """\
## Drift after 100 steps of 1e-3, relative to the entries (root mean squares)

bias: mean signed deviation, and the standard error of such a mean; realised: <moved, intended> / <intended, \
intended>; scales changed: in how many groups at a step."""


def drift_table(rows: Sequence[Line]) -> str:
    """A row for each line."""
    head = ("bits", "group", "updates", "format", "deviation", "of untouched entries", "bias", "realised")
    cells = [
        [
            *(str(row[key]) for key in ("bits", "group_size", "updates", "format")),
            f"{row['deviation']:.2%}",
            "" if row["deviation_untouched"] is None else f"{row['deviation_untouched']:.2%}",
            f"{row['bias']:+.3%} ({row['bias_error']:.3%})",
            f"{row['realised']:.3f}",
            f"{row['scales_changed']:.1%}",
        ]
        for row in rows
    ]
    return f"{DRIFT}\n\n{markdown([*head, 'scales changed'], cells)}"


def perplexity_table(rows: Sequence[Line]) -> str:
    """A row for every format, each against the library's of as many bits, over the seeds that both have."""
    lines = ["## Perplexity of a short run"]
    head = ("bits", "format", "perplexity, each seed", "mean", "against symmetric-keep, paired", "against bf16, paired")
    for model, steps, warmup in dict.fromkeys((row["model"], row["steps"], row["warmup"]) for row in rows):
        of: dict[tuple[int, str], dict[int, float]] = {}
        for row in rows:
            if (row["model"], row["steps"], row["warmup"]) == (model, steps, warmup):
                of.setdefault((row["bits"], row["format"]), {})[row["seed"]] = row["perplexity"]
        cells = [
            [
                *(str(bits), name, ", ".join(f"{by_seed[seed]:.2f}" for seed in sorted(by_seed))),
                f"{statistics.mean(by_seed.values()):.2f}",
                against(by_seed, of.get((bits, "symmetric-keep"), {})),
                against(by_seed, of.get((16, "bf16"), {})),
            ]
            for (bits, name), by_seed in sorted(of.items(), reverse=True)
        ]
        about = (
            f"{model}, {steps} steps of 16 x 256 tokens of packages, {warmup:.0%} of warm-up, APOLLO-Mini, "
            f"lr {LR:g} / {REST_LR:g}."
        )
        lines += ["", about, "", markdown(head, cells)]
    return "\n".join(lines)


def against(ours: dict[int, float], base: dict[int, float]) -> str:
    """The paired difference, its mean and its range."""
    both = [ours[seed] / base[seed] - 1 for seed in sorted(ours.keys() & base.keys())]
    if not both or ours is base:
        return "-"
    return f"{statistics.mean(both):+.2%} ({min(both):+.2%} to {max(both):+.2%})"
