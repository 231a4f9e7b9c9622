"""Formats for low-bit weights, against each other: symmetric or affine, scales kept or chosen anew at every step.

Four of them, in 8 and 4 bits; scales are bf16, steps are rounded stochastically with the library's random bits:

- symmetric-keep: what the library ships, its own functions (`quant/format.py`).
- symmetric-anew: the same codes, but every step gives a group it touches the scale of its new largest entry.
- affine-anew: 256 or 16 levels from a group's smallest entry to its largest, both found at every step.
- affine-keep: the same, but the scale is kept until the levels do not reach, as in the library. (The smallest entry may
  change by whole levels: that rounds nothing.)

The smallest entry is an fp32 number here, so that affine formats have the best case; a shipped one would round it, or
count it in levels.

What is measured:

1. error. A 512 x 1024 matrix, normal and Student's t with 4 degrees of freedom, to the nearest code: the root mean
   square error relative to that of the entries. Groups of 64, 128, 256.
2. drift. From a normal 256 x 1024 matrix that was quantised, 100 steps whose root mean square is 1e-3 of the entries'
   (half of its square a fixed direction, half fresh noise), rounded at every step, against the exact fp32 sum. dense:
   every entry is stepped; sparse: a tenth of them, always the same, and the others should stay.
3. perplexity. The race's protocol for a short run (`bench/race.py`): APOLLO-Mini with the best rates of llama-4m,
   corpus packages, 140 steps of 16 x 256 tokens, groups of 128, bf16 arithmetic; seeds paired. The format is put in the
   place of the library's while the run lasts. bf16 is the run without quantisation.

A line of the log for everything that ends; what is there is not done again.
"""

import argparse
import contextlib
import functools
import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from apollo_optim.bench.race import Trial, run_trial
from apollo_optim.core.matrix import Number
from apollo_optim.core.place import Place
from apollo_optim.core.random import Dither, key_at
from apollo_optim.quant import LowBitWeight
from apollo_optim.quant import format as library
from apollo_optim.quant.format import HEADROOM, SMALLEST, TOP, pack, padded, rounded_up, unpack
from apollo_optim.train.measure import hardware, versions

KINDS = ("error", "drift", "perplexity")
GROUP_SIZES = (64, 128, 256)
LR, REST_LR = 1.25e-3, 2e-2  # results/race/llama-4m: the best short runs of apollo-mini
METHODS = {16: "apollo-mini-bf16", 8: "apollo-mini-int8", 4: "apollo-mini-int4"}  # the race's names


@dataclass(frozen=True)
class Format:
    """Three functions with the arguments and results of `quant.format`'s own."""

    name: str
    quantised: Callable[..., tuple[Tensor, Tensor]]
    dequantised: Callable[..., Tensor]
    stepped: Callable[..., tuple[Tensor, Tensor]]
    minimum: int = 0
    """Bytes of a group beyond its scale."""

    def bytes_per_weight(self, bits: int, group_size: int) -> float:
        return bits / 8 + (2 + self.minimum) / group_size


# --- the formats ---
#
# r rows, g groups in a row, s entries in a group, as in quant/format.py. A weight is level * scale + minimum with whole
# levels: symmetric ones from -127 or -7 on (and no minimum), affine ones from 0 on, stored less 128 or 8. Affine
# "scales" hold the scales of a row (bf16 numbers) and then its minima.


def top_of(bits: int, affine: bool) -> int:
    """How far the levels of a group may reach: from zero to either side, or from the smallest to the largest."""
    return 2**bits - 1 if affine else TOP[bits]


def reach(levels_gs: Tensor, affine: bool) -> Tensor:
    """How far they do reach."""
    if not affine:
        return levels_gs.abs().amax(-1, keepdim=True)
    return levels_gs.amax(-1, keepdim=True) - levels_gs.amin(-1, keepdim=True)


def lowest(levels_gs: Tensor, affine: bool) -> Tensor:
    """What becomes level 0."""
    low_g1 = levels_gs.amin(-1, keepdim=True)
    return low_g1 if affine else torch.zeros_like(low_g1)


def grouped(value: Tensor, group_size: int) -> Tensor:
    n = value.shape[-1]
    return F.pad(value, (0, padded(n, group_size) - n)).view(*value.shape[:-1], -1, group_size)


def stored(levels_gs: Tensor, scales_g1: Tensor, minima_g1: Tensor, bits: int, affine: bool) -> tuple[Tensor, Tensor]:
    if not affine:
        return pack(levels_gs.to(torch.int8).flatten(-2), bits), scales_g1.squeeze(-1).to(torch.bfloat16)
    codes = (levels_gs - 2 ** (bits - 1)).to(torch.int8).flatten(-2)
    return pack(codes, bits), torch.cat([scales_g1, minima_g1], -2).squeeze(-1)


def loaded(codes: Tensor, scales: Tensor, affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (.., g, s), scales and minima (.., g, 1), in fp32: the inverse of `stored`."""
    if not affine:
        scales_g1 = scales.float().unsqueeze(-1)
        return unpack(codes).view(*scales.shape, -1).float(), scales_g1, torch.zeros_like(scales_g1)
    scales_g1, minima_g1 = scales.unsqueeze(-1).chunk(2, -2)
    half = 128 if codes.dtype is torch.int8 else 8
    return unpack(codes).view(*scales_g1.shape[:-1], -1).float() + half, scales_g1, minima_g1


def affine_quantised(value: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """To nearest."""
    value_gs = grouped(value.float(), group_size)
    return stored(*anew(value_gs, torch.ones_like(value_gs[..., :1]), 0.5, bits, True), bits, True)


def affine_dequantised(codes: Tensor, scales: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    levels_gs, scales_g1, minima_g1 = loaded(codes, scales, True)
    return (levels_gs * scales_g1 + minima_g1).flatten(-2)[..., :n].to(dtype)


def rounded(value: Tensor, uniform: Tensor | float) -> Tensor:
    """Up with a probability equal to the fraction; to nearest if `uniform` is 0.5."""
    return value.floor() + (uniform < value - value.floor())


def anew(
    wanted_gs: Tensor, scales_g1: Tensor, uniform: Tensor | float, bits: int, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels and scales of `wanted * scales`, rounded with these random numbers, and what became level 0 of them.

    (In units of the old scale, in which a group that nothing changes keeps its scale to the bit.)
    """
    top, low_g1 = top_of(bits, affine), lowest(wanted_gs, affine)
    fresh_g1 = rounded_up(reach(wanted_gs, affine) * scales_g1 / top).clamp(min=SMALLEST)
    levels_gs = rounded((wanted_gs - low_g1) * scales_g1 / fresh_g1, uniform)
    # a quotient may be an ulp above the top
    return levels_gs.clamp(0 if affine else -top, top), fresh_g1, low_g1 * scales_g1


def kept(
    wanted_gs: Tensor, scales_g1: Tensor, touched_g1: Tensor, uniform: Tensor, again: Tensor, bits: int, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, the scale changed only where it must be or that rounds nothing: as the library does it."""
    top = top_of(bits, affine)
    room = top - affine  # both ends of an affine group may be rounded outwards
    small = (reach(wanted_gs, affine) * 2 <= room) & (scales_g1 > SMALLEST) & touched_g1
    wanted_gs, scales_g1 = torch.where(small, wanted_gs * 2, wanted_gs), torch.where(small, scales_g1 / 2, scales_g1)
    levels_gs = rounded(wanted_gs, uniform)
    need, low_g1 = reach(levels_gs, affine), lowest(levels_gs, affine)
    levels_gs = levels_gs - low_g1
    grown_g1 = rounded_up(scales_g1 * need * (HEADROOM / top))
    smaller_gs = rounded(levels_gs * (scales_g1 / grown_g1), again)
    new_gs, new_g1 = torch.where(need > top, smaller_gs, levels_gs), torch.where(need > top, grown_g1, scales_g1)
    return new_gs, new_g1, low_g1 * scales_g1


def stepped(
    codes: Tensor,
    scales: Tensor,
    tensor_rn: Tensor,
    factor: Tensor,
    usable: Tensor,
    lr: Number,
    weight_decay: Number,
    noise: Dither,
    bits: int,
    *,
    affine: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`format.stepped` for all four formats; for (symmetric, keep) the same to the bit."""
    (r, n), (old_rgs, scales_rg1, minima_rg1) = tensor_rn.shape, loaded(codes, scales, affine)
    s = old_rgs.shape[-1]
    update_rgs = grouped(tensor_rn.float() * (factor * lr), s)
    used_rgs = grouped(usable.expand(r, n), s)
    touched_rg1 = used_rgs.any(-1, keepdim=True)
    decayed_rgs = old_rgs * (1 - lr * weight_decay) - minima_rg1 * (lr * weight_decay) / scales_rg1
    wanted_rgs = torch.where(used_rgs, decayed_rgs - update_rgs / scales_rg1, old_rgs)
    noise_rgs = grouped(noise.uniform(), s)
    uniform = noise_rgs + 2.0**-17
    if keep:
        again = (noise_rgs * 2.0**8).frac() + 2.0**-9
        levels_rgs, new_rg1, low_rg1 = kept(wanted_rgs, scales_rg1, touched_rg1, uniform, again, bits, affine)
    else:
        levels_rgs, new_rg1, low_rg1 = anew(wanted_rgs, scales_rg1, uniform, bits, affine)
        levels_rgs = torch.where(touched_rg1, levels_rgs, old_rgs)
        new_rg1, low_rg1 = torch.where(touched_rg1, new_rg1, scales_rg1), torch.where(touched_rg1, low_rg1, 0)
    return stored(levels_rgs, new_rg1, minima_rg1 + low_rg1, bits, affine)


SYMMETRIC, AFFINE = (library.quantised, library.dequantised), (affine_quantised, affine_dequantised)
FORMATS = {
    f.name: f
    for f in (
        Format("symmetric-keep", *SYMMETRIC, library.stepped),
        Format("symmetric-anew", *SYMMETRIC, functools.partial(stepped, affine=False, keep=False)),
        Format("affine-keep", *AFFINE, functools.partial(stepped, affine=True, keep=True), minimum=4),
        Format("affine-anew", *AFFINE, functools.partial(stepped, affine=True, keep=False), minimum=4),
    )
}


@contextlib.contextmanager
def installed(it: Format) -> Iterator[None]:
    """`LowBitWeight` stores its weights in this format within, where it steps them eagerly (as it does small ones).

    Raises RuntimeError if none was ever stepped.
    """
    steps = mock.Mock(side_effect=it.stepped)

    def from_float(cls: type[LowBitWeight], value: Tensor, bits: int = 8, group_size: int = 128) -> LowBitWeight:
        return cls(*it.quantised(value, bits, group_size), value.shape, value.dtype, bits, group_size)

    with (
        mock.patch.multiple(library, quantised=it.quantised, dequantised=it.dequantised, stepped=steps),
        mock.patch.object(LowBitWeight, "from_float", classmethod(from_float)),
    ):
        yield
    if not steps.called:
        raise RuntimeError(f"{it.name}: LowBitWeight never called format.stepped, so this run was not in that format")


# --- what is measured ---


def matrix(*shape: int, distribution: str = "normal", seed: int = 0) -> Tensor:
    """Entries of a standard deviation of 0.02."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator)
    if distribution == "student-t 4":
        squares = torch.randn((4, *shape), generator=generator).square()
        value = value / squares.mean(0).sqrt() / 2**0.5  # its variance is 4 / (4 - 2)
    return value * 0.02


def error(format: str, bits: int, group_size: int, distribution: str) -> dict[str, Any]:
    it, value = FORMATS[format], matrix(512, 1024, distribution=distribution)
    back = it.dequantised(*it.quantised(value, bits, group_size), value.shape[-1], torch.float32)
    return {"error": rms(back - value) / rms(value), "bytes_per_weight": it.bytes_per_weight(bits, group_size)}


def drift(format: str, bits: int, group_size: int, updates: str, steps: int) -> dict[str, Any]:
    """Everything relative to the root mean square of the entries, but `realised`: 1 if the steps arrive."""
    it, shape = FORMATS[format], (256, 1024)
    codes, scales = it.quantised(matrix(*shape), bits, group_size)
    begin = it.dequantised(codes, scales, shape[-1], torch.float32)
    unit = rms(begin)
    touched = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < (0.1 if updates == "sparse" else 1.0)
    direction = matrix(*shape, seed=2)
    exact = begin.double()
    one, usable = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    moved_scales = 0.0
    for t in range(steps):
        update = (direction + matrix(*shape, seed=3 + t)) * (touched * (1e-3 * unit / 0.02 / 2**0.5))
        exact -= update.double()
        before = scales
        noise = Place.of(update).noise(key_at(0, "weight", t), update.device)
        codes, scales = it.stepped(codes, scales, update, one, usable, 1.0, 0.0, noise, bits)
        groups = slice(-(-shape[-1] // group_size))  # not the minima
        moved_scales += (scales != before)[:, groups].float().mean().item() / steps
    end = it.dequantised(codes, scales, shape[-1], torch.float32).double()
    deviation, intended = (end - exact) / unit, (exact - begin)[touched]
    return {
        "deviation": rms(deviation[touched]),
        "deviation_untouched": rms(deviation[~touched]) if updates == "sparse" else None,
        "bias": deviation[touched].mean().item(),
        "bias_error": (deviation[touched].std() / touched.sum().sqrt()).item(),  # of the mean of so many
        "realised": (((end - begin)[touched] * intended).sum() / intended.square().sum()).item(),
        "scales_changed": moved_scales,
    }


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def perplexity(work: Path, format: str, bits: int, model: str, steps: int, warmup: float, seed: int) -> dict[str, Any]:
    trial = Trial(model, METHODS[bits], LR, REST_LR, seed, steps, warmup)
    shutil.rmtree(work, ignore_errors=True)  # of a run that was cut off: a short one starts again
    with contextlib.nullcontext() if format == "bf16" else installed(FORMATS[format]):
        row = run_trial(trial, work)
    shutil.rmtree(work)
    return row


def jobs(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[..., dict[str, Any]]]]:
    """What is to be measured, by what identifies it in the log, and how."""
    formats = list(FORMATS)
    nearest = ("symmetric-keep", "affine-keep")  # to nearest, how a scale is stepped does not matter
    for bits in args.bits:
        for group_size in GROUP_SIZES:
            both = {"bits": bits, "group_size": group_size}
            for distribution in ("normal", "student-t 4"):
                for name in nearest:
                    yield {"kind": "error", "format": name, **both, "distribution": distribution}, error
            for updates in ("dense", "sparse"):
                for name in formats:
                    yield {"kind": "drift", "format": name, **both, "updates": updates, "steps": 100}, drift
    run = functools.partial(perplexity, args.work)
    for seed in args.seeds:  # seed by seed: what is cut short has compared all formats on the seeds it reached
        for bits in (16, *sorted(args.bits)):
            for name in formats if bits != 16 else ["bf16"]:
                same = {"bits": bits, "seed": seed, **{key: getattr(args, key) for key in ("model", "steps", "warmup")}}
                yield {"kind": "perplexity", "format": name, **same}, run


def run(args: argparse.Namespace, log: Path) -> None:
    """Measure what the log does not hold yet."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    machine = {"versions": versions(), "hardware": hardware(torch.device("cpu"))}
    for job, function in jobs(args):
        if job["kind"] not in args.only or any(job.items() <= _plain(row).items() for row in rows):
            continue
        row = {**machine, **function(**{key: value for key, value in job.items() if key != "kind"}), **job}
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        print(", ".join(map(str, job.values())), flush=True)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not isinstance(value, (dict, list))}


# --- the tables ---


def table(rows: list[dict[str, Any]]) -> str:
    sections = {"error": error_table, "drift": drift_table, "perplexity": perplexity_table}
    found = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    return "\n\n".join(sections[kind](of) for kind, of in found.items() if of)


def error_table(rows: list[dict[str, Any]]) -> str:
    distributions = list(dict.fromkeys(row["distribution"] for row in rows))
    lines = [
        "## Rounding to nearest: error relative to the entries (root mean squares)",
        "",
        "| bits | group | format | bytes a weight | " + " | ".join(distributions) + " |",
        "|---|---|---|---|" + "---|" * len(distributions),
    ]
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        key = (row["bits"], row["group_size"], row["format"].partition("-")[0], f"{row['bytes_per_weight']:.4f}")
        cells.setdefault(key, {})[row["distribution"]] = row["error"]
    for at, errors in cells.items():
        found = (f"{errors[d]:.3%}" if d in errors else "" for d in distributions)
        lines.append(f"| {' | '.join(map(str, at))} | {' | '.join(found)} |")
    return "\n".join(lines)


def drift_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "## Drift after 100 steps of 1e-3, relative to the entries (root mean squares)",
        "",
        "bias: mean signed deviation, and the standard error of such a mean; realised: <moved, intended> / <intended, "
        "intended>; scales changed: in how many groups at a step.",
        "",
        "| bits | group | updates | format | deviation | of untouched entries | bias | realised | scales changed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        untouched = row["deviation_untouched"]
        lines.append(
            f"| {row['bits']} | {row['group_size']} | {row['updates']} | {row['format']} | {row['deviation']:.2%} | "
            f"{'' if untouched is None else f'{untouched:.2%}'} | {row['bias']:+.3%} ({row['bias_error']:.3%}) | "
            f"{row['realised']:.3f} | {row['scales_changed']:.1%} |"
        )
    return "\n".join(lines)


def perplexity_table(rows: list[dict[str, Any]]) -> str:
    """A line for every format, each against the library's of as many bits, over the seeds that both have."""
    lines = ["## Perplexity of a short run"]
    for model, steps, warmup in dict.fromkeys((row["model"], row["steps"], row["warmup"]) for row in rows):
        here = [row for row in rows if (row["model"], row["steps"], row["warmup"]) == (model, steps, warmup)]
        of: dict[tuple[int, str], dict[int, float]] = {}
        for row in here:
            of.setdefault((row["bits"], row["format"]), {})[row["seed"]] = row["perplexity"]
        lines += [
            "",
            f"{model}, {steps} steps of 16 x 256 tokens of packages, {warmup:.0%} of warm-up, APOLLO-Mini, lr {LR:g} / "
            f"{REST_LR:g}.",
            "",
            "| bits | format | perplexity, each seed | mean | against symmetric-keep, paired | against bf16, paired |",
            "|---|---|---|---|---|---|",
        ]
        for (bits, name), by_seed in sorted(of.items(), reverse=True):
            cells = [
                ", ".join(f"{by_seed[seed]:.2f}" for seed in sorted(by_seed)),
                f"{statistics.mean(by_seed.values()):.2f}",
                _against(by_seed, of.get((bits, "symmetric-keep"), {})),
                _against(by_seed, of.get((16, "bf16"), {})),
            ]
            lines.append(f"| {bits} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _against(ours: dict[int, float], base: dict[int, float]) -> str:
    both = [ours[seed] / base[seed] - 1 for seed in sorted(ours.keys() & base.keys())]
    if not both or ours is base:
        return "-"
    return f"{statistics.mean(both):+.2%} ({min(both):+.2%} to {max(both):+.2%})"
