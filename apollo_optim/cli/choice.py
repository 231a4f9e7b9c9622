"""`apollo-optim plan --choose`: the best optimizer that fits, why, and the sections of its run file."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.printing import say
from .words import show

if TYPE_CHECKING:
    from ..plan import Plan
    from ..train.config import RunConfig

PLANNED = {
    "model": ("name", "config", "dtype", "gradient_checkpointing"),
    "quant": ("bits",),
    "data": ("seq_len",),
    "train": ("batch_size", "micro_batch", "release"),
}
"""Keys of a run file that the plan stands on, the optimizer's apart."""


def print_choice(
    cfg: "RunConfig",
    memory: float,
    plan_of: "Callable[[RunConfig], Plan]",
    title_of: "Callable[[RunConfig, int], str]",
    device: str,
) -> None:
    """What `train.choose` says. Raises InputError where nothing fits in so many bytes."""
    import yaml

    from ..train.choose import choose
    from ..train.config import RunConfig, to_dict
    from ..train.rates import known

    found, choice = choose(cfg, memory, plan_of)
    show(title_of(found, choice.plan.batch), style="bold")
    for candidate, plan in choice.passed_over:
        show(f"{candidate.title}: {plan.total / 1e9:.2f} GB, too much")
    show(f"{choice.chosen.title}: {choice.plan.total / 1e9:.2f} GB. Why: {choice.chosen.why}")
    if device == "cpu":
        show("(On a CPU. What a GPU's allocator and context take besides: --device cuda)")

    sections, default = to_dict(found), to_dict(RunConfig())
    said = {name: {key: sections[name][key] for key in keys} for name, keys in PLANNED.items()}
    said = {name: {k: v for k, v in keys.items() if v != default[name][k]} for name, keys in said.items()}
    said["optim"] = {key: value for key, value in sections["optim"].items() if value is not None}
    say("\n# for a run file\n" + yaml.safe_dump({k: v for k, v in said.items() if v}, sort_keys=False).rstrip())
    if row := known(found):
        rates = {"lr": row.lr, "rest_lr": row.rest_lr, **row.more}
        say(
            f"# pretrain takes the rates known nearest to its tokens a step (docs/rates.md). At {row.tokens:,}:"
            f"\n# {', '.join(f'{key} {value}' for key, value in rates.items())}"
            "\n# They are known of small models: search around them for a large one."
        )
