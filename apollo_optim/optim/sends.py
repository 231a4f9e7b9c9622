"""What an optimizer's step sends to other processes, known before there is one: by its own code, without memory.

Nothing here knows a rule. Each parameter's step is called on tensors of the meta device, where it asks for the sums
that it needs and sends what it sends; of those that are alike one is called for all. `core.lockstep` knows what is put
together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from apollo_optim.core.collectives import Collective, Counter
from apollo_optim.core.lockstep import Sum, put_together, rounds_of
from apollo_optim.core.placements import group_name
from apollo_optim.optim.apply import apply_update
from apollo_optim.optim.compiled import is_compiled
from apollo_optim.optim.knobs import Group
from apollo_optim.optim.parameter import Known, Shared, chosen_rule, init_state, static_of
from apollo_optim.optim.together import Given, alike, windows

Asked = tuple[list["Sum | None"], list[Collective]]


class Stepped(NamedTuple):
    """A parameter without memory, with its gradient and its state: it may stand for many."""

    parameter: Tensor
    known: Known


def stepped(p: Tensor, group: Group, known: dict[Any, Shared]) -> Stepped:
    """Of a parameter on the meta device that has a gradient. `known`: what it shares with others of its group."""
    rule = chosen_rule(p, group)
    static = static_of(p, group, rule)
    shared = known.setdefault((rule, static), Shared(group, rule, static))
    return Stepped(p, Known(p, group, [], init_state(p, group), shared))


def next_sends(
    every: Sequence[Stepped], compile: bool | None, device_type: str, *, one_by_one: bool = False
) -> list[Collective]:
    """The collectives of the next step of all of them, which counts as taken.

    Args:
        every: In the order of the optimizer's groups, some of them many times. Those that are no DTensors send nothing;
            the processes of a mesh are there, or seem to be.
        compile: As of the optimizer.
        device_type: Of the weights that they stand for, by which steps are compiled and put together.
        one_by_one: As `release` steps them: inside backward, each by itself.
    """
    known = {one.parameter: one.known for one in every}
    given = {p: of.next_step(p) for p, of in known.items()}
    steps = _in_order([(one.parameter, given[one.parameter]) for one in every], compile, device_type)
    asked: dict[Any, Asked] = {}
    sizes: dict[str, int] = {}
    found: list[Collective] = []
    for window in [[step] for step in steps] if one_by_one else windows(steps, cpu=device_type == "cpu"):
        rounds = []
        for step, compiled in window:
            mesh = step.static.place.mesh
            sizes |= {group_name(mesh, dim): mesh.size(dim) for dim in range(mesh.ndim)}
            key = compiled, *alike(step)
            if key not in asked:
                asked[key] = _asked(step, compiled)
            own, others = asked[key]
            rounds.append(own)
            found += others
        found += [Collective("all_reduce", own.nbytes, own.group) for own in put_together(rounds)]
    return [one._replace(processes=sizes[one.group]) for one in found]


def _asked(given: Given, compiled: bool) -> Asked:
    with Counter() as counter:
        rounds = rounds_of(partial(apply_update, *given), compiled=compiled)
    return rounds, counter.sent


def _in_order(steps: list[tuple[Tensor, Given]], compile: bool | None, device_type: str) -> list[tuple[Given, bool]]:
    """Those of sharded parameters in the order in which `RuleOptimizer` takes them, and whether each is compiled."""
    first: list[tuple[Given, bool]] = []
    eager: defaultdict[Any, list[tuple[Given, bool]]] = defaultdict(list)
    for p, given in steps:
        if given.static.place.mesh is None:
            continue
        if is_compiled(compile, p, device_type):
            first.append((given, not (given.static.own and given.static.full_state)))
        else:
            eager[alike(given)].append((given, False))
    return first + [step for some in eager.values() for step in some]
