"""What a compiled step is on CUDA, looked at without a GPU: the kernels that inductor writes, and their launches.

    python tools/cuda_code.py apollo-mini [--shape 5461 2048] [--all]

Needs a torch that was built for CUDA, of the release that this was written for (2.11: it reaches into inductor), and no
GPU: the step is traced on the meta device, its tensors are then said to be on CUDA, and whatever asks for the device
is told of an H200. Nothing is run, and numbers that depend on the device (splits of a reduction) are that one's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from apollo_optim import build_optimizer, list_optimizers
from apollo_optim.core.compile import OPTIONS

CUDA = torch.device("cuda", 0)
GPU = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 150 << 30,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
    "gcnArchName": "",
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
}


def step_of(name: str, shape: tuple[int, int]) -> tuple[Callable[..., Any], list[Tensor]]:
    """The function that a first step of a bf16 matrix would compile, and its arguments, on the meta device."""
    found: list[tuple[Callable[..., Any], list[Tensor]]] = []

    def look(function: Callable[..., Any]) -> Callable[..., None]:
        return lambda *given: found.append((function, [t.detach() for t in given]))

    model = nn.Module()
    model.mlp = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=torch.bfloat16)
    model.mlp.weight.grad = torch.empty_like(model.mlp.weight)
    with (
        mock.patch("apollo_optim.optim.optimizer.can_compile", return_value=True),
        mock.patch("apollo_optim.optim.compiled.compiled_directly", look),
    ):
        build_optimizer(name, model, targets="mlp", compile=True).step()
    return found[0]


@contextlib.contextmanager
def as_if_there_were_a_gpu() -> Iterator[None]:
    """Within it, who asks is told of one, and nothing is asked of CUDA itself."""
    import torch._dynamo.device_interface as interface
    import torch._inductor.fx_passes.joint_graph as joint
    from torch._inductor.runtime.hints import DeviceProperties

    triton: Any = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    gpu = types.SimpleNamespace(**GPU)
    keys = "multi_processor_count", "major", "regs_per_multiprocessor", "max_threads_per_multi_processor", "warp_size"
    short = DeviceProperties(type="cuda", index=0, cc=90, **{key: GPU[key] for key in keys})  # type: ignore[arg-type]
    driver = types.SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    folder: Any = joint.UniformValueConstantFolder
    deduce = folder._deduce_value

    def on_the_cpu(self: Any, node: Any) -> Any:
        """Constants are tried out: one entry of them, here on the CPU."""
        if node.target is torch.ops.aten.full.default:
            return torch.full([1], node.args[1], dtype=node.kwargs.get("dtype"))
        if node.target is torch.ops.aten.scalar_tensor.default:
            return torch.scalar_tensor(node.args[0], dtype=node.kwargs.get("dtype"))
        return self.unknown_value if "device" in node.kwargs else deduce(self, node)

    patches: list[Any] = [
        mock.patch("torch._subclasses.fake_tensor.init_gpu_context"),
        mock.patch("torch._inductor.fx_passes.joint_graph.lazy_init"),  # patterns of attention
        mock.patch("torch._inductor.fx_passes.post_grad.lazy_init"),
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.get_device_properties", return_value=gpu),
        mock.patch.object(DeviceProperties, "create", return_value=short),
        mock.patch.dict(interface.caching_worker_device_properties, {"cuda": [gpu]}),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(folder, "_deduce_value", on_the_cpu),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def written(function: Callable[..., Any], given: list[Tensor]) -> str:
    """What inductor writes for it on CUDA."""
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    tables: Any = select_decomp_table()
    traced = torch.func.functionalize(function)
    with torch.no_grad(), mock.patch("torch.compiler.is_compiling", return_value=True):
        graph: Any = make_fx(traced, decomposition_table=tables, tracing_mode="fake")(*given)
    for node in graph.graph.nodes:
        if getattr(node.kwargs.get("device"), "type", None) == "meta":
            node.kwargs = {**node.kwargs, "device": CUDA}
    graph.recompile()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        there = [CUDA if t.is_meta else t.device for t in given]
        inputs: Any = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=where)
            for t, where in zip(given, there, strict=True)
        ]
    virtual: Any = V
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    with config.patch(OPTIONS), virtual.set_fake_mode(mode):
        joint_graph_passes(graph)
        post_grad_passes(graph, True)
        lowering: Any = GraphLowering(graph, example_inputs=inputs, shape_env=None)
        handlers = virtual.set_graph_handler(lowering), virtual.set_debug_handler(DebugContext())
        with handlers[0], handlers[1], virtual.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            code = lowering.codegen()[0]
    return str(getattr(code, "value", code))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("optimizer", choices=[info.name for info in list_optimizers() if info.bits is None])
    words.add_argument("--shape", type=int, nargs=2, default=(5461, 2048), metavar=("ROWS", "COLUMNS"))
    words.add_argument("--all", action="store_true", help="everything that is written, the kernels, too")
    args = words.parse_args()
    if torch.version.cuda is None:
        raise SystemExit(f"error: torch {torch.__version__} is not built for CUDA")
    with as_if_there_were_a_gpu():
        code = written(*step_of(args.optimizer, tuple(args.shape)))
    if args.all:
        print(code)
    for line in code.splitlines():
        if not args.all and re.search(r"= empty_strided_c\w+\(|\.run\(|extern_kernels\.\w+\(|^\s*cpp_\w+\(", line):
            print(line.strip())


if __name__ == "__main__":
    main()
