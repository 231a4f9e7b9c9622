"""A step of LLaMA-7B, whole: forward, backward and the step inside it, in bf16, 8 and 4 bits; and its plan.

With `release` a gradient is freed as soon as its weight has been stepped; that is what the peak is of. How long the
step takes is then not to be seen, as it happens inside backward: so one more iteration keeps all gradients (the first
of two micro-batches), and steps afterwards.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from apollo_optim import build_optimizer, release
from benchmarks.cases import Running
from benchmarks.gpu.device import Peak, open_device, timed, wait
from benchmarks.gpu.model import build, loss_of, plan_of, vocabulary
from benchmarks.kit import Line, spread

ITERATIONS = 5


def predict(case: Running) -> None:
    """What `apollo_optim.plan` says of the same steps."""
    torch.set_num_threads(1)
    for name, config in case.config["of"].items():
        for batch, seq in config["shapes"]:
            with case.attempt(of=name, batch=batch, seq=seq) as line:
                plan = plan_of(config, batch, seq)
                line |= {"planned": plan.total, "when": plan.peak.when, "rows": plan.rows}


def measure(case: Running) -> None:
    """The model once; if its first compiled step fails, what the eager one does is worth knowing, too."""
    config, device = case.config, open_device(case.config["device"])
    start = time.perf_counter()
    model = build(config["size"], config["dtype"], config["bits"], device)
    wait(device)
    parameters = sum(p.numel() for p in model.parameters())
    case.write(what="built", parameters=parameters, seconds=time.perf_counter() - start)
    for mode in dict.fromkeys([config["compile"], False]):
        if measured(case, model, device, mode):
            return


def measured(case: Running, model: Any, device: torch.device, mode: bool) -> bool:
    """Every shape of batch, with compiled steps or eager ones; whether the first step of all could be made."""
    config, fine = case.config, False
    optimizer = build_optimizer(config["optimizer"], model, lr=1e-3, rest=config["rest"], compile=mode)
    handle = release(model, optimizer)
    for batch, seq in config["shapes"]:
        ids = torch.randint(vocabulary(config["size"]), (batch, seq), device=device)
        about = {"batch": batch, "seq": seq, "compile": mode}
        with case.attempt(what="first", **about) as line:
            line.update(first(model, ids, device))
        optimizer.zero_grad()
        if "reason" in line:
            continue
        fine = True
        # a compiled step is a first one only once, an eager one takes as long every time
        if case.left() < max(2.0, 0.0 if mode else 1.5 * line["seconds"]):
            case.skipped(f"no time: a first step took {line['seconds']:.0f} s", what="released", **about)
            continue
        with case.attempt(what="released", **about) as line:
            line.update(released(model, ids, device, case.left() / 3))
        optimizer.zero_grad()
        with case.attempt(what="split", **about) as line:
            line.update(split(model, optimizer, handle, ids, device))
        optimizer.zero_grad()
    handle.remove()
    return fine


def first(model: Any, ids: torch.Tensor, device: torch.device) -> Line:
    """The first iteration of this shape: state is made, steps are compiled."""
    peak = Peak(device)
    taken = timed(lambda: loss_of(model, ids).backward(), device)  # type: ignore[no-untyped-call]
    return {"seconds": taken.device, **peak.read()}


def released(model: Any, ids: torch.Tensor, device: torch.device, seconds: float) -> Line:
    """Peak and pace of iterations with the step inside backward, so many as fit into the seconds."""
    forwards: list[float] = []
    wholes: list[float] = []
    peak = Peak(device)
    end, loss = time.perf_counter() + seconds, torch.zeros(())
    while not wholes or (len(wholes) < ITERATIONS and time.perf_counter() < end):
        kept: list[torch.Tensor] = []
        forwards.append(timed(lambda: kept.append(loss_of(model, ids)), device).device)  # noqa: B023
        backward = timed(kept[0].backward, device).device
        wholes.append(forwards[-1] + backward)
        loss = kept.pop().detach()
    line = {"seconds": spread(wholes), "forward": spread(forwards), **peak.read(), "loss": float(loss)}
    return line | {"tokens_per_s": ids.numel() / line["seconds"]["median"]}


def split(model: Any, optimizer: Any, handle: Any, ids: torch.Tensor, device: torch.device) -> Line:
    """Forward, backward and step of one iteration that keeps its gradients, in seconds."""
    kept: list[torch.Tensor] = []
    with handle.accumulate():
        forward = timed(lambda: kept.append(loss_of(model, ids)), device)
        backward = timed(lambda: kept.pop().backward(), device)  # type: ignore[no-untyped-call]
    step = timed(optimizer.step, device)
    seconds = {"forward": forward.device, "backward": backward.device, "step": step.device}
    return {"seconds": seconds, "step_host": step.host}
