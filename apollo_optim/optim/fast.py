"""The step compiled: what ``step.advance`` and ``rest.advance_rest`` define, one graph for each look of a parameter.

A compiled step passes over the gradient twice, once to see it and once to write the weight, and makes nothing of its
size in between. Nothing that changes from step to step is compiled in, so a schedule, a seed or a resumed run compiles
nothing anew.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from apollo_optim.core.compile import compiled
from apollo_optim.core.storage import writes_itself
from apollo_optim.core.write import write
from apollo_optim.optim.rest import advance_rest
from apollo_optim.optim.step import Numbers, Spec, State, advance, as_matrix, settle

Graphs = dict[Any, Callable[..., Any]]


def advance_compiled(graphs: Graphs, rule: Any, p: Tensor, grad: Tensor, state: State, n: Numbers, spec: Spec) -> None:
    """``advance`` or ``advance_rest`` by a graph of ``graphs``, which is made if there is none for this look yet.

    A weight that writes itself has a compiled way of doing so; of its step only the rest is compiled here.
    """
    own = writes_itself(p)
    if own and not spec.rule:
        advance_rest(rule, p, grad, state, n, spec)
        return
    look = [(t.shape, t.stride(), t.dtype) for t in ((grad,) if own else (p, grad))]
    key = (*look, p.device, spec, *(t.dtype for t in state.values()))
    if key not in graphs:
        graphs[key] = compiled(_settle if own else _advance)
    numbers = n.as_inputs(p.device)
    if not own:
        graphs[key](rule, p, grad, state, *numbers, spec)
        return
    step, factor, usable = graphs[key](rule, grad, state, *numbers, spec)
    write(p, step, factor, usable, n.lr, n.weight_decay, n.rounding["weight"] if spec.stochastic else None)


def _advance(rule: Any, p: Tensor, grad: Tensor, state: State, plain: Any, words: Any, spec: Spec) -> None:
    (advance if spec.rule else advance_rest)(rule, p, grad, state, Numbers.from_inputs(plain, words), spec)


def _settle(rule: Any, grad: Tensor, state: State, plain: Any, words: Any, spec: Spec) -> Any:
    return settle(rule, as_matrix(grad, spec.conv), state, Numbers.from_inputs(plain, words), spec)
