"""Which memory a step takes, and from when to when: the real step, run on tensors without memory.

The model's own forward and backward run on *fake* tensors (shapes, dtypes and a device, nothing behind them), and every
storage that an operation makes is written down with its first and its last moment. Time is counted in operations.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from apollo_optim.core.blocks import few_blocks
from apollo_optim.core.errors import InputError
from apollo_optim.core.storage import parts, rebuilt
from apollo_optim.plan.cuda import kind_of

Loss = Callable[[Any, Tensor, Tensor], Tensor]
"""(model, input_ids, labels) -> the loss: what the training loop calls."""


class Block(NamedTuple):
    """A piece of memory, alive at the moments ``born <= moment < died``."""

    kind: str
    """activations (whatever the forward and the backward make), logits (what is as wide as the vocabulary), gradients
    (of parameters), float copies (of a low-bit weight, while a matmul reads it)."""
    name: str
    """The parameter that a gradient belongs to."""
    size: int
    """Bytes."""
    born: int
    died: int


@dataclass(frozen=True)
class Trace:
    """One forward and backward of ``batch`` rows."""

    batch: int
    blocks: list[Block]
    complete: dict[str, int]
    """The moment at which each parameter's gradient is complete: when a step inside backward would be made."""
    backward: int
    """The first moment of the backward pass."""
    end: int
    """The moment after the last operation: what is alive here stays until the optimizer steps."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every storage that operations make while it is active."""

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.blocks: list[list[Any]] = []  # [kind, name, size, born, died]; the last None while alive
        self._index: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._there: dict[int, bool] = {}  # storages that are there from the beginning: are they a low-bit weight's?
        self._vocabulary = vocabulary

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(is_traceable_wrapper_subclass(t) for t in inputs):
            return NotImplemented  # what it is made of comes by next
        self.now += 1
        output = func(*args, **kwargs)
        given = {id(t.untyped_storage()) for t in inputs}
        copies = bool(inputs) and all(self._is_weight(t) for t in inputs)
        for t in tree_leaves(output):
            if isinstance(t, Tensor) and id(t.untyped_storage()) not in given:
                self._add(t, "float copies" if copies else self._kind(t))
        return output

    def expect(self, t: Tensor, low_bit: bool) -> None:
        """``t`` is there from the beginning, a part of a low-bit weight or not: it is no block."""
        self._there[id(t.untyped_storage())] = low_bit

    def _is_weight(self, t: Tensor) -> bool:
        storage = t.untyped_storage()
        if storage in self._index:
            return bool(self.blocks[self._index[storage]][0] == "float copies")
        return self._there.get(id(storage), False)

    def _kind(self, t: Tensor) -> str:
        return "logits" if t.ndim > 1 and t.shape[-1] == self._vocabulary else "activations"

    def _add(self, t: Tensor, kind: str) -> None:
        storage = t.untyped_storage()
        if storage not in self._index and id(storage) not in self._there:
            self._index[storage] = number = len(self.blocks)
            self.blocks.append([kind, "", storage.nbytes(), self.now, None])
            weakref.finalize(storage, self._died, number)

    def _died(self, number: int) -> None:
        self.blocks[number][4] = self.now + 1

    def rename(self, t: Tensor, kind: str, name: str) -> None:
        self.blocks[self._index[t.untyped_storage()]][:2] = kind, name

    def finished(self) -> list[Block]:
        """All blocks; what is still alive dies after the last moment."""
        return [Block(kind, name, size, born, died or self.now + 2) for kind, name, size, born, died in self.blocks]


def trace_step(model: nn.Module, loss: Loss, batch: int, seq: int, device: str = "cpu") -> Trace:
    """One forward and backward of ``model`` (on the meta device), ``batch`` rows of ``seq`` tokens.

    Runs on fake CPU tensors, whose operations are chosen as on a real device (the meta device has no attention kernel
    of its own). Takes seconds for 7B, all layers. Gradients are freed when they are complete; ``Plan`` decides how long
    they would live. What is made in blocks is cut as on ``device``, "cpu" or "cuda".

    Raises InputError for a model whose shapes depend on values, which no plan can know.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    mode = FakeTensorMode()
    twin, recorder = fake_twin(model, mode), Recorder(vocabulary(model))
    for t in (*twin.parameters(), *twin.buffers()):
        for part in parts(t).values():
            recorder.expect(part, low_bit=len(parts(t)) > 1)
    complete: dict[str, int] = {}

    def hook(name: str) -> Callable[[Tensor], None]:
        def done(p: Tensor) -> None:
            assert p.grad is not None
            recorder.now += 1
            recorder.rename(p.grad, "gradients", name)
            complete[name] = recorder.now
            p.grad = None

        return done

    for name, p in twin.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(hook(name))  # type: ignore[no-untyped-call]
    twin.train()
    try:
        with ordinary_positions(), few_blocks(kind_of(device)), mode, recorder:
            rows = torch.zeros((batch, seq), dtype=torch.int64)
            total = loss(twin, rows, torch.zeros_like(rows))
            backward = recorder.now + 1
            total.backward()  # type: ignore[no-untyped-call]
            del total
            recorder.now += 1
            end = recorder.now
            blocks = recorder.finished()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise InputError(
            f"{type(model).__name__} cannot be planned: the shapes of {error.func} in it depend on the values"
        ) from error
    return Trace(batch, blocks, complete, backward, end)


def fake_twin(model: nn.Module, mode: Any) -> nn.Module:
    """A copy of ``model`` on fake CPU tensors."""
    from torch._subclasses.fake_tensor import FakeTensor

    twin = copy.deepcopy(model)
    fakes: dict[int, Tensor] = {}

    def fake(plain: Tensor) -> Tensor:
        return FakeTensor(mode, plain, torch.device("cpu"))

    for module in twin.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is None:
                    continue
                if t.device.type != "meta":
                    raise InputError(f"the model to plan must be on the meta device, this one is on {t.device}")
                if id(t) not in fakes:
                    made = rebuilt(t.detach(), fake)
                    fakes[id(t)] = nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
                tensors[name] = fakes[id(t)]  # type: ignore[assignment]
    return twin


@contextlib.contextmanager
def ordinary_positions() -> Iterator[None]:
    """Tell transformers that rows hold one sequence each.

    It looks at the positions to find that out, which a fake tensor does not have, and would make an attention mask for
    packed sequences that no real step makes (and that every layer then keeps).
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    found = getattr(masking, "find_packed_sequence_indices", None)
    if found is None:
        yield
        return
    masking.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = found


def vocabulary(model: nn.Module) -> int | None:
    """How many entries the output layer has."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return int(head.weight.shape[0]) if head is not None else None


def most_alive(blocks: list[Block]) -> int:
    """The most bytes of ``blocks`` that are alive at one moment."""
    changes: dict[int, int] = {}
    for block in blocks:
        changes[block.born] = changes.get(block.born, 0) + block.size
        changes[block.died] = changes.get(block.died, 0) - block.size
    alive = most = 0
    for moment in sorted(changes):
        alive += changes[moment]
        most = max(most, alive)
    return most


def alive(blocks: Iterable[Block], moment: int) -> list[Block]:
    """Those alive at a moment."""
    return [block for block in blocks if block.born <= moment < block.died]


def largest(blocks: Sequence[Block], start: int, end: int) -> list[Block]:
    """Those at the largest of the moments ``start <= moment < end``, the latest if there are several."""
    changes: dict[int, int] = {}
    for block in blocks:
        changes[block.born] = changes.get(block.born, 0) + block.size
        changes[block.died] = changes.get(block.died, 0) - block.size
    total, most, when = 0, -1, start
    for moment in range(end):
        total += changes.get(moment, 0)
        if moment >= start and total >= most:
            most, when = total, moment
    return alive(blocks, when)


@contextlib.contextmanager
def recorded() -> Iterator[Recorder]:
    """What is made within, on the meta device."""
    recorder = Recorder()
    with recorder:
        yield recorder


@dataclass
class Traces:
    """Traces by batch, each made once."""

    make: Callable[[int], Trace]
    made: dict[int, Trace] = field(default_factory=dict)

    def at(self, batch: int) -> Trace:
        """The trace of ``batch`` rows."""
        if batch not in self.made:
            self.made[batch] = self.make(batch)
        return self.made[batch]
