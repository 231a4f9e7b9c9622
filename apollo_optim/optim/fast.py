"""The step compiled: what ``step.advance`` and ``rest.advance_rest`` define, one graph for each look of a parameter.

A compiled step passes over the gradient twice, once to see it and once to write the weight, and makes nothing of its
size in between. Nothing that changes from step to step is compiled in, so a schedule, a seed or a resumed run compiles
nothing anew.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.compile import COMPILED_FROM, compiled, compiled_in_place
from apollo_optim.core.storage import writes_itself
from apollo_optim.core.write import write
from apollo_optim.optim.rest import advance_rest
from apollo_optim.optim.step import Numbers, Spec, State, advance, as_matrix, settle

Graphs = dict[Any, Callable[..., Any]]


def is_compiled(choice: bool | None, p: Tensor, device_type: str) -> bool:
    """What ``compile=`` means for this parameter; None: on a CPU, what is large enough for it to pay soon."""
    return device_type == "cpu" and p.numel() >= COMPILED_FROM if choice is None else choice


def prepare_compiled(
    graphs: Graphs, rule: Any, p: Tensor, grad: Tensor, state: State, n: Numbers, spec: Spec
) -> Callable[[], None]:
    """``advance`` or ``advance_rest`` by a graph of ``graphs``, which is made if there is none for this look yet.

    A weight that writes itself has a compiled way of doing so; of its step only the rest is compiled here.
    """
    own = writes_itself(p)
    if own and not spec.rule:
        return partial(advance_rest, rule, p, grad, state, n, spec)
    inputs = [*([] if own else [p]), grad, *state.values(), *n.as_inputs(p.device)]
    key = (p.device, torch.get_num_threads(), spec, *((t.shape, t.stride(), t.dtype) for t in inputs))
    if key not in graphs:
        graphs[key] = _settling(rule, list(state), spec) if own else _advancing(rule, list(state), spec)
    graph = graphs[key]
    return partial(_write_itself, graph, p, inputs, n, spec) if own else partial(graph, *inputs)


def _write_itself(graph: Callable[..., Any], p: Tensor, inputs: list[Tensor], n: Numbers, spec: Spec) -> None:
    step, factor, usable = graph(*inputs)
    write(p, step, factor, usable, n.lr, n.weight_decay, n.rounding["weight"] if spec.stochastic else None)


def _advancing(rule: Any, names: list[str], spec: Spec) -> Callable[..., None]:
    def step(p: Tensor, grad: Tensor, *others: Tensor) -> None:
        (advance if spec.rule else advance_rest)(rule, p, grad, *_state_and_numbers(names, others), spec)

    return compiled_in_place(step)


def _settling(rule: Any, names: list[str], spec: Spec) -> Callable[..., Any]:
    def step(grad: Tensor, *others: Tensor) -> Any:
        return settle(rule, as_matrix(grad, spec.conv), *_state_and_numbers(names, others), spec)

    return compiled(step)


def _state_and_numbers(names: list[str], inputs: tuple[Tensor, ...]) -> tuple[State, Numbers]:
    n = len(names)
    return dict(zip(names, inputs[:n], strict=True)), Numbers.from_inputs(inputs[n:])
