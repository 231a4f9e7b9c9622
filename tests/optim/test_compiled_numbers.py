"""What a compiled step of a device computes, the device computes: nothing is left for a compiler of C++.

Traced on the meta device, as it would be on a GPU: each number of the host is an argument of its own there.
"""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from apollo_optim import build_optimizer, list_optimizers, quantize_weights
from apollo_optim.optim import compiled
from apollo_optim.quant import format, write
from apollo_optim.quant.stats import measured

NAMES = [info.name for info in list_optimizers()]


def on_the_host(function: Any, *given: torch.Tensor) -> list[str]:
    """The operations of a traced function whose results are on the CPU."""
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        graph = make_fx(function, tracing_mode="fake")(*given).graph
    values = ((node, node.meta.get("val")) for node in graph.nodes if node.op == "call_function")
    return [str(node) for node, value in values if isinstance(value, torch.Tensor) and value.device.type == "cpu"]


@pytest.mark.parametrize("name", NAMES)
def test_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(24, 16, bias=False)}).to(torch.bfloat16)
    bits = next(info.bits for info in list_optimizers() if info.name == name)
    if bits is not None:
        quantize_weights(model, bits, targets="mlp", group_size=8)
    model = model.to("meta")
    traced: list[list[str]] = []

    def look(function: Any) -> Any:
        return lambda *given: traced.append(on_the_host(function, *given)) or look.results  # type: ignore[attr-defined]

    look.results = [torch.zeros(16, 24, device="meta"), 1.0, torch.ones((), dtype=torch.bool, device="meta")]  # type: ignore[attr-defined]
    monkeypatch.setattr(compiled, "compiled_directly", look)
    monkeypatch.setattr("apollo_optim.optim.optimizer.can_compile", lambda device_type: True)
    if bits is not None:
        monkeypatch.setattr(type(model["mlp"].weight), "_write_rows_", lambda *args: None)
    optimizer = build_optimizer(name, model, targets="mlp", compile=True)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros(p.shape, dtype=p.dtype, device="meta")
        optimizer.step()
    assert traced
    assert traced == [[]] * len(traced)


@pytest.mark.parametrize("bits", [8, 4])
def test_writes_of_low_bit_weights(bits: int) -> None:
    """And the count of what rounding made of them."""
    codes, scales = format.quantised(torch.zeros(16, 24), bits, 8)
    rates = [torch.tensor(0.1), torch.tensor(0.01)]
    step = [torch.zeros(16, 24), torch.ones(()), torch.ones(1, 1, dtype=torch.bool)]
    noise = [torch.zeros(24, dtype=torch.int32), *[torch.zeros(16, 1, dtype=torch.int32)] * 2]
    codes, scales, *others = (t.to("meta") for t in (codes, scales, *step, *noise))
    assert on_the_host(write._writer(bits), codes, scales, *others[:3], *rates, *others[3:]) == []
    assert on_the_host(measured, codes, scales, codes, scales, *others[:3], *rates) == []
