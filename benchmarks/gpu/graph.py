"""A whole step as one CUDA graph, beside the same step as it is: what is left to win of the host's time.

A measurement, not a way to train: rates, bias corrections and keys of random numbers are numbers of the host, which a
graph repeats as they were. NEVER RUN YET: written without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from apollo_optim import build_optimizer
from benchmarks.cases import Running
from benchmarks.gpu.device import Taken, open_device, timed
from benchmarks.gpu.peers import LR
from benchmarks.gpu.steps import set_up
from benchmarks.kit import Line, one_line, spread

WARM = 3  # steps before a capture, on a stream of their own, as torch's documentation asks


def measure(case: Running) -> None:
    """Every optimizer, eager and compiled."""
    device = open_device(case.config["device"])
    if device.type != "cuda":
        case.skipped(f"a {device.type} has no CUDA graphs", what="graph")
        return
    module = set_up(case.config)[0]
    for name in case.config["optimizers"]:
        for mode in (False, True):
            with case.attempt(what="graph", optimizer=name, compile=mode) as line:
                step = build_optimizer(name, module, lr=LR, compile=mode).step
                line.update(beside(step, device, case.config["rounds"]))


def beside(step: Callable[[], object], device: torch.device, rounds: int) -> Line:
    """Seconds of the step and of its graph, round by round; what cannot be captured says why."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            step()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:  # a copy from the host, a wait: nothing is lost but this figure
        return {"captured": False, "note": f"cannot be captured: {one_line(error)}"}
    pairs = [(timed(step, device), timed(graph.replay, device)) for _ in range(rounds)]

    def seconds(of: str) -> tuple[Line, Line]:
        plain, replayed = ([getattr(taken, of) for taken in side] for side in zip(*pairs, strict=True))
        return spread(plain), spread(replayed)

    names = Taken.__dataclass_fields__
    return {"captured": True, **{name: dict(zip(("step", "graph"), seconds(name), strict=True)) for name in names}}
