"""Which recipe for this memory: the best by the evidence of docs/choose.md whose plan fits."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from apollo_optim.core.errors import InputError
from apollo_optim.core.sizes import size_of
from apollo_optim.plan.budget import Plan, plan
from apollo_optim.plan.trace import Loss, Trace, trace_step
from apollo_optim.quant import quantize_weights


class Candidate(NamedTuple):
    """An optimizer that may be chosen.

    Attributes:
        name: For `build_optimizer`.
        bits: Of the weights of attention and MLP, for `quantize_weights`; None: they are as the model has them.
        why: It stands where it does.
        rest: What it is built with for embedding and head, if not its own.
    """

    name: str
    bits: Literal[4, 8] | None
    why: str
    rest: str | None = None

    @property
    def title(self) -> str:
        return self.name + (f", weights of {self.bits} bits" if self.bits else "")


RACE = "3 to 9 million parameters, docs/race.md"
RUN = "one run of 3 million parameters, docs/low-bit.md"
HALF = "if nothing else fits: 16 % above the perplexity of 16 bits, a third above AdamW's (docs/choose.md)"
CANDIDATES = (
    Candidate("full", None, f"a winner of the race, with a byte of state for a weight ({RACE})"),
    Candidate("lite", None, f"the race's lowest so far with half a byte of state for a weight ({RACE})"),
    Candidate("lite", 8, f"1 % below its perplexity with weights of 32 bits ({RUN})"),
    Candidate("nano", 8, f"next to no state, and 3 % above its weights of 32 bits ({RUN})"),
    Candidate("q-apollo-mini", 4, HALF, "adamw8bit"),
)
"""Of a large model each takes less than the one before, and ends no lower in our runs; `nano` with weights of 16 bits
would take more than `lite` with weights of 8, and ends above it. With weights of 4 bits it is no better than
APOLLO-Mini."""


class Choice(NamedTuple):
    """What fits.

    Attributes:
        chosen: What to build, and why.
        plan: Of its fullest moment.
        passed_over: What is better and does not fit, with its plan.
    """

    chosen: Candidate
    plan: Plan
    passed_over: tuple[tuple[Candidate, Plan], ...]


def choose(
    model: nn.Module,
    memory: float | str,
    *,
    batch: int = 1,
    seq: int = 1024,
    release: bool = False,
    loss: Loss | None = None,
    targets: str | Sequence[str] = ("attn", "mlp"),
    device: str = "cpu",
) -> Choice:
    """The best optimizer whose weights, gradients, activations and state together are within a memory.

    >>> with torch.device("meta"):
    ...     model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    >>> choice = choose(model, "12GB", batch=4, seq=512, release=True)
    >>> choice.chosen.name, choice.chosen.bits, choice.chosen.why, choice.plan.total

    Args:
        model: On the meta device; it is left as it is.
        memory: Bytes, or words such as "12GB".
        batch: Rows of a step, all in one forward pass.
        seq: Tokens of a row.
        release: The step is made inside the backward (`step_in_backward`), and every gradient freed at once.
        loss: (model, input_ids, labels) -> the loss; None: `model(input_ids=, labels=).loss`, as transformers' models
            have it.
        targets: The modules whose matrices use the rule, and may be of 8 or 4 bits, as in `param_groups`.
        device: "cpu" or "cuda", as in `plan`.

    Raises InputError for a size that is none, for a model that is not on the meta device, and where nothing fits,
    naming what would help.
    """

    if not isinstance(model, nn.Module):
        raise InputError(f"choose(model, memory): the model comes first, and {type(model).__name__} is none")
    for name, number in (("batch", batch), ("seq", seq)):
        if not isinstance(number, int) or number < 1:
            raise InputError(f"{name}={number!r}: a whole number, at least 1")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("no parameter of this model is trained (requires_grad): there is nothing to choose for")
    size = size_of("memory", memory)

    @functools.cache
    def stored(bits: Literal[4, 8] | None) -> tuple[nn.Module, Trace]:
        twin = model
        if bits is not None:
            twin = copy.deepcopy(model)
            quantize_weights(twin, bits, targets=targets)
        return twin, trace_step(twin, loss or own_loss, batch, seq, device)

    def plan_of(candidate: Candidate) -> Plan:
        twin, trace = stored(candidate.bits)
        knobs: dict[str, Any] = {} if candidate.rest is None else {"rest": candidate.rest}
        return plan(twin, candidate.name, trace, release=release, device=device, targets=targets, **knobs)

    ways = [] if release else ["release=True, with step_in_backward"]
    return first_that_fits(plan_of, size, [*ways, "a smaller batch or seq", "recomputation"])


def own_loss(model: Any, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Of a model that computes its loss itself. Raises InputError where its forward takes no labels."""
    takes = inspect.signature(model.forward).parameters
    if not takes.keys() >= {"input_ids", "labels"} and all(p.kind is not p.VAR_KEYWORD for p in takes.values()):
        raise InputError(
            f"{type(model).__name__}.forward takes ({', '.join(takes)}), not input_ids and labels: say "
            "loss=(model, input_ids, labels) -> the loss"
        )
    loss: Tensor = model(input_ids=input_ids, labels=labels).loss
    return loss


def first_that_fits(plan_of: Callable[[Candidate], Plan], memory: float, ways: Sequence[str]) -> Choice:
    """The first candidate within so many bytes. Raises InputError, with `ways` out of it, where nothing fits."""
    passed: list[tuple[Candidate, Plan]] = []
    for candidate in CANDIDATES:
        plan = plan_of(candidate)
        if plan.total <= memory:
            return Choice(candidate, plan, tuple(passed))
        passed.append((candidate, plan))
    smallest, least = min(passed, key=lambda one: one[1].total)
    raise InputError(
        f"nothing fits in {memory / 1e9:.3g} GB: {smallest.title}, takes {least.total / 1e9:.3g} GB. "
        f"What would help: {', '.join(ways)}"
    )
