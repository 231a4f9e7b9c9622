"""The life of the process of a case: it trains some steps, and says what was resident when."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from apollo_optim.core.compile import can_compile
from apollo_optim.train import measure
from apollo_optim.train.build import choose_device, compiled_beforehand
from apollo_optim.train.config import RunConfig, from_dict
from apollo_optim.train.loss import summed_loss, targets
from apollo_optim.train.models import build_model, low_bit
from apollo_optim.train.optimizer import make_optimizer
from benchmarks.cases import Running
from benchmarks.kit import Line, one_line
from benchmarks.memory.cases import CASES, Case

TRIMMED = 1 << 17
"""Bytes: with `--malloc trimmed` blocks of so many and more are given back at once."""


def life(running: Running) -> None:
    """Measure one case. A peer may be broken in any way; that is what its line says."""
    case, cfg = CASES[running.case.name], from_dict(running.config["run"])
    trimmed = running.config["malloc"] == "trimmed"
    if trimmed or cfg.train.release:
        measure.give_back_memory(*[TRIMMED] * trimmed)
    try:
        importlib.import_module(case.package or "apollo_optim")
    except Exception as error:
        running.write(status="missing", reason=f"{type(error).__name__}: {one_line(error)}")
    else:
        running.write(**measured(case, cfg))


def measured(case: Case, cfg: RunConfig) -> Line:
    """Train, and say what was resident when."""
    for module in ("transformers.modeling_utils", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)  # else they would come with the model
    device = choose_device(cfg)
    baseline, before = measure.resident_memory(), kept()
    graphs = {} if case.peer else compiled_beforehand(cfg, device)
    if low_bit(cfg).bits is not None:
        can_compile("cpu")  # the compiler's modules and its first product, which the weights' step brings anyway
    compiler = measure.resident_memory() - baseline - sum(kept().values()) + sum(before.values())
    torch.manual_seed(cfg.train.seed)
    model = build_model(cfg.model, seq_len=cfg.data.seq_len, quant=low_bit(cfg))
    model.train()
    most = count_gradients(model)
    optimizer = case.peer(model) if case.peer else make_optimizer(cfg.optim, model, graphs)
    if cfg.train.release:
        from apollo_optim import release

        handle = release(model, optimizer)
    vocabulary = int(model.config.vocab_size)
    for _ in range(cfg.train.steps):
        rows = torch.randint(vocabulary, (cfg.train.batch_size, cfg.data.seq_len))
        loss = summed_loss(model, rows, rows, cfg.train.loss) / targets(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = float(loss.detach())
        del loss
    sizes = {**measure.memory(model, optimizer), "gradients": most[0], "optimizer": state_bytes(optimizer)}
    if cfg.train.release:
        handle.remove()
    return {
        "status": "ok",
        "loss": last,
        **sizes,
        "buffers": measure.tensor_bytes(model.buffers()),
        "baseline": baseline,
        "rest": measure.resident_memory(),
        "kept": {key: size - before[key] for key, size in kept().items()} | {"compiler": compiler},
        "peak": measure.peak_memory(),
    }


def count_gradients(model: nn.Module) -> list[int]:
    """[the most bytes of gradients that were there together]; to be called before `release`, which frees them."""
    parameters, most = [p for p in model.parameters() if p.requires_grad], [0]

    def look(_: torch.Tensor) -> None:
        most[0] = max(most[0], measure.tensor_bytes(p.grad for p in parameters if p.grad is not None))

    for p in parameters:
        p.register_post_accumulate_grad_hook(look)  # type: ignore[no-untyped-call]
    return most


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of its state, that of torchao's wrapped tensors as they are stored."""
    return measure.tensor_bytes(measure.inner_tensors(list(optimizer.state.values())))


def kept() -> dict[str, int]:
    """Bytes resident that no tensor has, where the system tells."""
    sizes = {"pages": measure.process_status("RssFile"), "heap": measure.free_heap()}
    return {key: size for key, size in sizes.items() if size is not None}
