"""Formats for low-bit weights, against each other: symmetric or affine, scales kept or chosen anew at every step.

1. error. A 512 x 1024 matrix, normal and Student's t with 4 degrees of freedom, to the nearest code: the root mean
   square error relative to that of the entries. Groups of 64, 128, 256.
2. drift. From a normal 256 x 1024 matrix that was quantised, 100 steps whose root mean square is 1e-3 of the entries'
   (half of its square a fixed direction, half fresh noise), rounded at every step, against the exact fp32 sum. dense:
   every entry is stepped; sparse: a tenth of them, always the same, and the others should stay.
3. perplexity. A short run of the race's former protocol (`benchmarks/race/former.py`): APOLLO-Mini with the best rates
   of llama-4m, corpus packages, 140 steps of 16 x 256 tokens, groups of 128, bf16 arithmetic; seeds paired. The format
   is put in the place of the library's while the run lasts. bf16 is the run without quantisation.

A line of the log for everything that ends; what is there is not done again.
"""

import argparse
import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from apollo_optim.core.place import Place
from apollo_optim.core.random import key_at
from benchmarks import kit
from benchmarks.kit import Line
from benchmarks.low_bit.formats import FORMATS, installed
from benchmarks.low_bit.tables import LR, REST_LR
from benchmarks.race import former

GROUP_SIZES = (64, 128, 256)
METHODS = {16: "apollo-mini-bf16", 8: "apollo-mini-int8", 4: "apollo-mini-int4"}  # the race's names


def matrix(*shape: int, distribution: str = "normal", seed: int = 0) -> Tensor:
    """Entries of a standard deviation of 0.02."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator)
    if distribution == "student-t 4":
        squares = torch.randn((4, *shape), generator=generator).square()
        value = value / squares.mean(0).sqrt() / 2**0.5  # its variance is 4 / (4 - 2)
    return value * 0.02


def error(format: str, bits: int, group_size: int, distribution: str) -> Line:
    """To nearest, relative to the root mean square of the entries; and what a weight takes."""
    it, value = FORMATS[format], matrix(512, 1024, distribution=distribution)
    back = it.dequantised(*it.quantised(value, bits, group_size), value.shape[-1], torch.float32)
    return {"error": rms(back - value) / rms(value), "bytes_per_weight": it.bytes_per_weight(bits, group_size)}


def drift(format: str, bits: int, group_size: int, updates: str, steps: int) -> Line:
    """Everything relative to the root mean square of the entries, but `realised`: 1 if the steps arrive."""
    it, shape = FORMATS[format], (256, 1024)
    codes, scales = it.quantised(matrix(*shape), bits, group_size)
    begin = it.dequantised(codes, scales, shape[-1], torch.float32)
    unit = rms(begin)
    touched = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < (0.1 if updates == "sparse" else 1.0)
    direction = matrix(*shape, seed=2)
    exact = begin.double()
    one, finite = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    moved_scales = 0.0
    for t in range(steps):
        update = (direction + matrix(*shape, seed=3 + t)) * (touched * (1e-3 * unit / 0.02 / 2**0.5))
        exact -= update.double()
        before = scales
        noise = Place.of(update).noise(key_at(0, "weight", t), update.device)
        codes, scales = it.stepped(codes, scales, update, one, finite, 1.0, 0.0, noise, bits)
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
    """Root mean square."""
    return t.double().square().mean().sqrt().item()


def perplexity(work: Path, format: str, bits: int, model: str, steps: int, warmup: float, seed: int) -> Line:
    """Of a short run in this format, and the rest of its line."""
    trial = former.Trial(model, METHODS[bits], LR, REST_LR, seed, steps, warmup)
    shutil.rmtree(work, ignore_errors=True)  # of a run that was cut off: a short one starts again
    with contextlib.nullcontext() if format == "bf16" else installed(FORMATS[format]):
        row = former.run(trial, work / trial.name)
    shutil.rmtree(work)
    return row


def jobs(args: argparse.Namespace) -> Iterator[tuple[Line, Callable[..., Line]]]:
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
    done = [plain(row) for row in kit.read(log)]
    machine = {"versions": kit.versions(), "hardware": kit.hardware("cpu"), "commit": kit.commit()}
    for job, function in jobs(args):
        if job["kind"] not in args.only or any(job.items() <= row.items() for row in done):
            continue
        kit.append(log, {**machine, **function(**{key: value for key, value in job.items() if key != "kind"}), **job})
        print(", ".join(map(str, job.values())), flush=True)


def plain(row: Line) -> Line:
    """What of a line can be compared with a job."""
    return {key: value for key, value in row.items() if not isinstance(value, (dict, list))}
