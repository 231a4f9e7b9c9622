"""The pictures of docs/how-it-works.md (docs/assets/*.svg), made of real gradients: python tools/pictures.py

A LLaMA of 0.4 M parameters learns the standard library's source, byte by byte, with AdamW. The gradients of one of its
matrices are handed to several optimizers of the library, each on a copy of the weight that it alone steps, and
what is drawn is measured on these steps: nothing is computed here that the library computes.
"""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from apollo_optim import RuleOptimizer, build_optimizer
from apollo_optim.plan import PARTS, Plan
from apollo_optim.plan.draw import COLOURS
from apollo_optim.train.config import ModelConfig, OptimConfig, QuantConfig, RunConfig
from apollo_optim.train.plan import planned

ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"
STEPS, ROWS, LENGTH = 150, 8, 128
MATRIX = "model.layers.1.mlp.gate_proj.weight"  # 352 channels, small side 128
RANKS = (1, 4, 8, 16, 32, 64)
GREY = "#808080"  # for text and axes: readable on light and on dark
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"

plt.rcParams.update({
    "svg.fonttype": "path", "svg.hashsalt": "apollo", "savefig.transparent": True, "font.size": 10,
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
})  # fmt: skip


class Watched:
    """A copy of the weight that one optimizer steps with the gradients of the run."""

    def __init__(self, weight: Tensor, rule: str, **knobs: object) -> None:
        self.p = torch.nn.Parameter(weight.detach().clone())
        self.optimizer = RuleOptimizer([self.p], rule, lr=1.0, compile=False, **knobs)

    def step(self, grad: Tensor) -> Tensor:
        """The step that it takes."""
        before, self.p.grad = self.p.detach().clone(), grad.clone()
        self.optimizer.step()
        step = before - self.p.detach()
        self.p.data.copy_(before)  # what is looked at are steps, not where they lead
        return step


def gradients() -> tuple[Tensor, list[Tensor]]:
    """The matrix before the first step, and its gradient at every one."""
    torch.manual_seed(0)
    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    optimizer = build_optimizer("adamw", model, lr=2e-3, rest_lr=1e-2, compile=False)
    start, found = model.get_parameter(MATRIX).detach().clone(), []
    for _ in range(STEPS):
        at = torch.randint(len(data) - LENGTH, (ROWS,)).tolist()
        batch = torch.stack([data[i : i + LENGTH].long() for i in at])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        found.append(model.get_parameter(MATRIX).grad.detach().clone())
        optimizer.step()
    return start, found


def channel_scales(start: Tensor, grads: list[Tensor]) -> None:
    """How much each optimizer stretches each channel of the gradient: AdamW's beside APOLLO's."""
    knobs = {"proj": "gaussian", "scale": "auto", "norm_growth": None, "eps": 1e-8}
    watched = {"AdamW": Watched(start, "adamw"), "APOLLO": Watched(start, "apollo", rank=32, **knobs)}
    by_rank = {rank: Watched(start, "apollo", rank=rank, **knobs) for rank in RANKS}
    scales: dict[str, Tensor] = {}
    ratios: dict[int, list[Tensor]] = {rank: [] for rank in RANKS}
    for number, grad in enumerate(grads):
        size = grad.norm(dim=1)
        scales = {name: one.step(grad).norm(dim=1) / size for name, one in watched.items()}
        for rank, one in by_rank.items():
            ratio = one.step(grad).norm(dim=1) / size / scales["AdamW"]
            if number >= STEPS // 2:
                ratios[rank].append(ratio)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2))
    order = scales["AdamW"].argsort()
    left.plot(scales["APOLLO"][order], ".", color=ORANGE, ms=3.5, label="APOLLO, rank 32 (d/4)")
    left.plot(scales["AdamW"][order], color=BLUE, lw=2, label="AdamW")
    left.set(yscale="log", xlabel="channels, in the order of AdamW's scale", ylabel="||step|| / ||gradient||")
    left.legend()
    drawn = [torch.cat(ratios[rank]).log2() for rank in RANKS]
    middle = [float(t.median()) for t in drawn]
    low, high = ([float(t.quantile(q)) for t in drawn] for q in (0.1, 0.9))
    right.fill_between(range(len(RANKS)), low, high, color=ORANGE, alpha=0.3, lw=0, label="8 of 10 channels")
    right.plot(middle, color=ORANGE, lw=2, marker="o", label="median")
    right.axhline(0, color=BLUE, lw=1.5)
    right.set_xticks(range(len(RANKS)), [str(rank) for rank in RANKS])
    ticks = (-2, -1, 0, 1, 2)
    right.set_yticks(ticks, [f"{2.0**tick:g}" for tick in ticks])
    right.set(xlabel="rank (small side 128)", ylabel="APOLLO's scale / AdamW's")
    right.legend()
    save(figure, "channel-scales")


def limiter(start: Tensor, grads: list[Tensor]) -> None:
    """The norm of the step with the limiter and without."""
    free = Watched(start, "apollo", rank=32, proj="gaussian", norm_growth=None)
    held = Watched(start, "apollo", rank=32, proj="gaussian")
    spiked = [grad * (20.0 if number == 100 else 1.0) for number, grad in enumerate(grads)]
    norms = [(float(free.step(grad).norm()), float(held.step(grad).norm())) for grad in spiked]
    figure, axes = plt.subplots(figsize=(9, 3))
    axes.plot([a for a, _ in norms], color=GREY, lw=1.2, label="without a limiter")
    axes.plot([b for _, b in norms], color=GREEN, lw=2, label="with it: at most 1 % more than the step before")
    axes.axvline(100, color=GREY, lw=0.8, ls=":")
    axes.annotate("one gradient, 20 times too large", (100, max(a for a, _ in norms)), xytext=(6, -4),
                  textcoords="offset points", va="top")  # fmt: skip
    axes.set(xlabel="step", ylabel="norm of the step / lr", yscale="log")
    axes.legend(loc="upper center")
    save(figure, "limiter")


def memory() -> None:
    """From AdamW to Q-APOLLO-Mini at 7B, by the planner."""
    base = RunConfig(model=ModelConfig("llama-7b", dtype="bfloat16"))
    base = replace(base, train=replace(base.train, batch_size=1))
    inside = replace(base, train=replace(base.train, release=True))

    def plan_of(cfg: RunConfig, name: str, **knobs: object) -> Plan:
        return planned(replace(cfg, optim=OptimConfig(name).changed(**knobs)), vocab_size=32000)

    bars = {
        "AdamW": plan_of(base, "adamw"),
        "AdamW, step inside backward": plan_of(inside, "adamw"),
        "APOLLO, rank 256": plan_of(inside, "apollo", rank=256),
        "APOLLO-Mini": plan_of(inside, "apollo-mini"),
        "and embedding, head in 8-bit moments": plan_of(inside, "apollo-mini", rest="adamw8bit"),
        "Q-APOLLO-Mini, 8-bit weights": plan_of(
            replace(inside, quant=QuantConfig(bits=8)), "q-apollo-mini", rest="adamw8bit"
        ),
        "the same in 4 bits": plan_of(replace(inside, quant=QuantConfig(bits=4)), "q-apollo-mini", rest="adamw8bit"),
    }
    figure, axes = plt.subplots(figsize=(9, 3.6))
    left = dict.fromkeys(bars, 0.0)
    for part in PARTS:
        sizes = [plan.rows[part] / 1e9 for plan in bars.values()]
        if max(sizes) < 0.05:
            continue
        axes.barh(list(bars), sizes, left=list(left.values()), color=COLOURS[part], label=part, height=0.7)
        left = {name: at + size for (name, at), size in zip(left.items(), sizes, strict=True)}
    for name, plan in bars.items():
        axes.annotate(f"{plan.total / 1e9:.1f} GB", (plan.total / 1e9, name), xytext=(4, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    axes.invert_yaxis()
    axes.set(xlabel="GB, LLaMA-7B, 1 x 256 tokens, bfloat16")
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(loc="lower right", ncols=2)
    save(figure, "memory")


def save(figure: plt.Figure, name: str) -> None:
    """As SVG, without a date: the same picture is the same file."""
    figure.tight_layout()
    figure.savefig(ASSETS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """All of them."""
    torch.set_num_threads(1)
    start, grads = gradients()
    channel_scales(start, grads)
    limiter(start, grads)
    memory()


if __name__ == "__main__":
    main()
