"""The step compiled: what `apply.apply_update` defines, one graph for each signature of a parameter.

A compiled step passes over the gradient twice, once to see it and once to write the weight, and makes nothing of its
size in between. Nothing that changes from step to step is compiled in, so a schedule, a seed or a resumed run compiles
nothing anew.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apollo_optim.core.compile import COMPILED_FROM, COMPILED_ON, compiled_directly, number_on
from apollo_optim.core.matrix import Number
from apollo_optim.core.random import Dither, Key
from apollo_optim.optim.apply import Inputs, Static, Tensors, apply_update, compute_update

Graphs = dict[Any, Callable[..., Any]]
Memo = dict[int, tuple[dict[str, Number], list[Tensor]]]


def is_compiled(choice: bool | None, p: Tensor, device_type: str) -> bool:
    """What `compile=` means for this parameter; None: with a CPU or CUDA, what is large enough for it to pay soon."""
    return device_type in COMPILED_ON and p.numel() >= COMPILED_FROM if choice is None else choice


def prepare_compiled(
    graphs: Graphs,
    known: Graphs,
    memo: Memo,
    static: Static,
    weight: Tensor,
    grad: Tensor,
    tensors: Tensors,
    inputs: Inputs,
) -> Callable[[], None]:
    """`apply_update` by a graph of `graphs`, which is made if there is none for this signature yet.

    A weight that writes itself has a compiled way of doing so; of its step only the rest is compiled here, and nothing
    of a rule whose state is as large as the weight: its step goes from block to block.

    Args:
        known: The graphs of parameters that differ in nothing else, so that of `static` only the phase has to be
            looked at.
        memo: See `as_tensors`.
    """
    if static.own and static.full_state:
        return partial(apply_update, static, weight, grad, tensors, inputs)
    given = [grad, *tensors.values(), *as_tensors(inputs, grad.device, memo)]
    if not static.own:
        given.insert(0, weight)
    seen = [static.phase, torch.get_num_threads(), grad.device]
    for t in given:
        seen += t.shape, t.stride(), t.dtype
    key = tuple(seen)
    if key not in known:
        everything = static, key
        if everything not in graphs:
            make = _computing if static.own else _applying
            graphs[everything] = make(static, list(tensors), list(inputs.numbers), list(inputs.keys))
        known[key] = graphs[everything]
    graph = known[key]
    return partial(_write_itself, graph, weight, given, inputs) if static.own else partial(graph, *given)


def _write_itself(graph: Callable[..., Any], weight: Any, given: list[Tensor], inputs: Inputs) -> None:
    tensor, factor, finite, *noise = graph(*given)
    lr, weight_decay = inputs.numbers["lr"], inputs.numbers["weight_decay"]
    weight._write_rows_((), tensor, factor, finite, lr, weight_decay, Dither(*noise) if noise else None)


def _applying(static: Static, names: list[str], numbers: list[str], keys: list[str]) -> Callable[..., None]:
    def step(weight: Tensor, grad: Tensor, *others: Tensor) -> None:
        apply_update(static, weight, grad, *_state_and_inputs(others, names, numbers, keys, grad.device))

    return compiled_directly(step)


def _computing(static: Static, names: list[str], numbers: list[str], keys: list[str]) -> Callable[..., Any]:
    def step(grad: Tensor, *others: Tensor) -> Any:
        tensors, inputs = _state_and_inputs(others, names, numbers, keys, grad.device)
        key = inputs.keys.get("weight")
        noise = () if key is None else static.place.noise(key, grad.device)
        return (*compute_update(static, grad, tensors, inputs), *noise)

    return compiled_directly(step)


def _state_and_inputs(
    others: Sequence[Tensor], names: list[str], numbers: list[str], keys: list[str], device: torch.device
) -> tuple[dict[str, Tensor], Inputs]:
    n = len(names)
    return dict(zip(names, others[:n], strict=True)), from_tensors(others[n:], numbers, keys, device)


def as_tensors(inputs: Inputs, device: torch.device, memo: Memo) -> list[Tensor]:
    """All of them as tensors, so that no value is compiled in: `from_tensors` goes back.

    For a CPU two tensors, fp32 and int32. The kernels of a GPU take numbers of the host one by one, so that nothing has
    to be copied there.

    Args:
        memo: `numbers` objects by id, and the fp32 tensors that were made of them. (It holds the objects, or another
            might get the id of one that is gone.)
    """
    words = [word for key in inputs.keys.values() for word in key]
    on_cpu, number = device.type == "cpu", id(inputs.numbers)
    if number not in memo:
        values = [list(inputs.numbers.values())] if on_cpu else inputs.numbers.values()
        memo[number] = inputs.numbers, [torch.as_tensor(value, dtype=torch.float32) for value in values]
    if on_cpu:
        return [*memo[number][1], *([torch.tensor(words, dtype=torch.int32)] if words else [])]
    return [*memo[number][1], *(torch.tensor(word, dtype=torch.int32) for word in words)]


def from_tensors(given: Sequence[Tensor], numbers: list[str], keys: list[str], device: torch.device) -> Inputs:
    """The inverse of `as_tensors`, on the device that they are needed on."""
    one_by_one = given[0].ndim == 0
    plain: Any = given[: len(numbers)] if one_by_one else given[0]
    words: Any = given[len(numbers) :] if one_by_one else given[1] if keys else []
    if one_by_one:
        plain, words = ([number_on(device, number) for number in some] for some in (plain, words))
    named: dict[str, Key] = {name: (words[2 * i], words[2 * i + 1]) for i, name in enumerate(keys)}
    return Inputs({name: plain[i] for i, name in enumerate(numbers)}, named)
