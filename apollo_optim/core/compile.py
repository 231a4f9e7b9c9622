"""The one switch for compiled functions, and the one way back where there is no compiler."""

import contextlib
import functools
import importlib
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

COMPILED_FROM = 1 << 18  # entries of a parameter for which compiling (seconds a shape, then 2 ns an entry less) pays
COMPILED_ON = ("cpu", "cuda")  # by default: elsewhere a compiler is young or missing


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled as one whole graph for the shapes it is first called with.

    Every call gives a function of its own (torch counts recompilations per code object and gives up after a few: a
    model has more shapes than that), so call it once per shape and keep the result. Whatever changes from step to step
    must come in as a tensor.
    """
    return torch.compile(_own(function), fullgraph=True, dynamic=False)


OPTIONS: dict[str, Any] = {
    # what is read often or took many operations is kept by default: full-size copies in the middle of a write
    **dict.fromkeys(("realize_reads_threshold", "realize_acc_reads_threshold", "realize_opcount_threshold"), 1000),
    "size_asserts": False,  # it is the caller who looks
    # a sketch adds up k / r columns: from 8 on (torch's number) in a loop of its own, with the sketch in memory
    "unroll_reductions_threshold": 32,
}


def compiled_directly(function: Callable[..., Any], options: dict[str, Any] = OPTIONS) -> Callable[..., Any]:
    """As `compiled`, of a function of tensors that writes into them and returns nothing, or a tuple of new tensors.

    Calls after the first go past torch's check of whether the graph fits, which takes longer than a small matrix's
    step (and on a GPU, where Python is what a step waits for, a quarter of all its time). So it is the caller who must
    keep one for each look of the tensors: shapes, strides, dtypes, device, and the number of threads, for which the
    graph's loops are made. `options`: the compiler's.
    """
    direct: Callable[..., Any] | None = None
    given: tuple[Tensor, ...] = ()
    made: tuple[Callable[..., Any], Sequence[Any], Sequence[Any]] | None = None

    def backend(traced: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch import _inductor  # a second and hundreds of modules, for those who compile

        with _whole_vectors():
            inner: Callable[..., Any] = _inductor.compile(traced, inputs, options)

        def first(*taken: Tensor) -> Any:
            nonlocal made
            returned = inner(*taken)
            made = inner, taken, returned
            return returned

        return first

    checked = torch.compile(_own(function), fullgraph=True, dynamic=False, backend=backend)

    def call(*tensors: Tensor) -> Any:
        nonlocal given, made, direct
        if direct is not None:
            return direct(*tensors)
        given = tensors
        try:
            results = checked(*tensors)
            if made is not None and all(t.device.type in COMPILED_ON for t in given):
                direct = _past_checks(*made, given, results or ())
            return results
        finally:
            given, made = (), None

    return call


def _past_checks(
    graph: Callable[..., Any],
    taken: Sequence[Any],
    returned: Sequence[Any],
    given: Sequence[Any],
    results: Sequence[Any],
) -> Callable[..., Any] | None:
    """A function by its graph alone, from one call of both: what they were given, and what came back.

    None if something else is needed, which torch must fetch each time, or put together.
    """
    order, picks = _places(taken, given), _places(results, [*returned, *given])
    if -1 in order or -1 in picks:
        return None

    def direct(*tensors: Tensor) -> tuple[Any, ...]:
        back = graph(*[tensors[i] for i in order])
        if not picks:
            return ()
        every = *back, *tensors
        return tuple([every[i] for i in picks])

    return direct


def _places(some: Sequence[Any], among: Sequence[Any]) -> list[int]:
    """Where these objects are; -1 for one that is not there."""
    return [next((i for i, other in enumerate(among) if other is own), -1) for own in some]


@contextlib.contextmanager
def _whole_vectors() -> Iterator[None]:
    """Compiled for a CPU, loops over bf16 and fp32 go forward by whole vectors of bf16.

    torch 2.13 does so only where every statement has some bf16 in it, which moments on their way into memory have not.
    By vectors of fp32, bf16 is loaded and stored as masked halves: AVX-512 (Zen 4) takes 0.57 ns an entry instead of
    0.40 for AdamW. torch has no option for it; one that lacks these names decides by itself.
    """
    cpp: Any = importlib.import_module("torch._inductor.codegen.cpp")
    names = "TilingSelect", "get_loop_body_lowp_fp", "_get_loop_body", "cpu_vec_isa"
    if not all(hasattr(cpp, name) for name in names):
        yield
        return
    chosen = cpp.TilingSelect.select_tiling

    def select_tiling(self: Any, functions: Any, sizes: Any) -> Any:
        factors, indices, *others = chosen(self, functions, sizes)
        plain = len(factors) == 1 and not any(reduced for _, reduced in sizes)
        if plain and any(cpp.get_loop_body_lowp_fp(body)[0] for body in cpp._get_loop_body(functions)):
            whole = cpp.cpu_vec_isa.pick_vec_isa().nelements(dtype=torch.bfloat16)
            ranges = max((ranges for ranges, _ in sizes), key=len)
            factors = factors if ranges[indices[0]] % whole else [whole]
        return factors, indices, *others

    cpp.TilingSelect.select_tiling = select_tiling
    try:
        yield
    finally:
        cpp.TilingSelect.select_tiling = chosen


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    own = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


@overload
def in_memory(value: Tensor) -> Tensor: ...
@overload
def in_memory(value: float | Tensor) -> float | Tensor: ...
def in_memory(value: float | Tensor) -> float | Tensor:
    """`value`, which a compiler would otherwise compute again for every entry that it is combined with.

    (A single number of a GPU is computed again: a kernel more costs more than that.)
    """
    if isinstance(value, Tensor) and torch.compiler.is_compiling() and (value.ndim or value.is_cpu):
        return value.as_strided(value.shape, value.stride())
    return value


def number_on(device: torch.device, number: float | Tensor) -> float | Tensor:
    """A number of the host (0-D) as one of `device`, for a compiled function: what is computed of it alone is, too.

    Else that would be compiled for the CPU, in C++: a minute for the first step of all on a GPU, and an error where
    there is no compiler of C++. Nothing is copied: it is an argument of the kernels that need it.
    """
    if not isinstance(number, Tensor) or number.device == device:
        return number
    return number * torch.ones((), dtype=number.dtype, device=device)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Is there a working compiler for this device? Tried once, on a tiny function; warns once if not."""
    if device_type == "meta":  # where nothing is computed
        return False
    try:
        from apollo_optim.core.libraries import remember_loads, remove_cut_off  # for those who compile

        remember_loads()
        inductor: Any = importlib.import_module("torch._inductor.runtime.runtime_utils")
        for library in remove_cut_off(Path(inductor.cache_dir())):
            warnings.warn(f"{library}: a compile was killed there; removed, it is compiled again", stacklevel=2)
        probe = torch.ones(2, device=device_type)
        torch.compile(lambda t: t * 2 + 1, fullgraph=True, dynamic=False)(probe)
    except Exception as error:  # whatever a missing compiler raises: it differs by backend and release
        said = " ".join(str(error).strip().splitlines()[:2])  # torch's first line is often "backend raised:"
        warnings.warn(
            f"torch.compile does not work for {device_type!r} here, so steps run eagerly (several times slower, same "
            f"numbers but for their last bits; compile=False says that this is meant): {type(error).__name__}: {said}",
            stacklevel=2,
        )
        return False
    return True
