"""`apollo-optim plan --choose`: the best optimizer that fits, why, and the sections of its run file."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..core.printing import say
from .words import show

if TYPE_CHECKING:
    from ..plan import Plan
    from ..train.config import RunConfig


def print_choice(
    cfg: "RunConfig",
    memory: float,
    plan_of: "Callable[[RunConfig], Plan]",
    title_of: "Callable[[RunConfig, int], str]",
) -> None:
    """What `train.choose` says. Raises InputError where nothing fits in so many bytes."""
    import yaml

    from ..train.choose import choose
    from ..train.config import to_dict
    from ..train.rates import with_known_rates

    found, choice = choose(cfg, memory, plan_of)
    show(title_of(found, choice.plan.batch), style="bold")
    for candidate, plan in choice.passed_over:
        show(f"{candidate.title}: {plan.total / 1e9:.2f} GB, too much")
    show(f"{choice.chosen.title}: {choice.plan.total / 1e9:.2f} GB. Why: {choice.chosen.why}")
    sections = to_dict(with_known_rates(found))
    names = ("optim", "quant") if found.quant.bits else ("optim",)
    said = {name: {key: value for key, value in sections[name].items() if value is not None} for name in names}
    say("\n# for a run file\n" + yaml.safe_dump(said, sort_keys=False))
