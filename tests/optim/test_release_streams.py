"""The step inside backward and CUDA's streams: what is freed there may still be read on another stream."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apollo_optim import AdamW, ApolloMini, release

release_module: Any = importlib.import_module("apollo_optim.optim.release")  # its name is the function's, too
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class OnCuda(Tensor):
    """A tensor of the CPU that says it is on a GPU, and notes the streams that read it."""

    noted: list[tuple[Tensor, Any]]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def record_stream(self, stream: Any) -> None:
        self.noted.append((self.as_subclass(Tensor), stream))


def test_a_gradient_is_noted_for_the_stream_of_the_step_before_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[Tensor, Any]] = []
    monkeypatch.setattr(OnCuda, "noted", noted, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    asked, ours = [], release_module.read_here

    def read_here(t: Tensor) -> None:
        asked.append(t)
        ours(t.as_subclass(OnCuda))

    monkeypatch.setattr(release_module, "read_here", read_here)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    handle = release(model, AdamW(model.parameters()), track_norm=True)
    model(torch.ones(2, 8)).sum().backward()
    shapes = [tuple(p.shape) for p in model.parameters()]
    assert sorted(tuple(t.shape) for t in asked) == sorted(shapes)
    assert all(p.grad is None for p in model.parameters())
    handle.grad_norm()
    assert [tuple(t.shape) for t in asked[len(shapes) :]] == [()] * len(shapes), "norms, read on the caller's stream"
    assert [stream for _, stream in noted] == ["stream of cuda:0"] * 2 * len(shapes)


def test_nothing_is_noted_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: pytest.fail("a CPU has no streams"))
    release_module.read_here(torch.ones(2))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("make", [AdamW, ApolloMini])
def test_layers_on_several_streams_step_as_on_one(make: Any) -> None:
    """Gradients are freed while others are made: memory that was given back too soon would change the numbers."""

    def ends(streams: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(8)]).cuda()
        knobs = {} if make is AdamW else {"rank": 1}
        release(model, make(model.parameters(), compile=False, **knobs))
        own = [torch.cuda.Stream() for _ in range(streams)]
        for step in range(20):
            x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(step)).cuda()
            total = torch.zeros((), device="cuda")
            for number, layer in enumerate(model):
                here = torch.cuda.current_stream()
                stream = own[number % streams] if streams else here
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    x = torch.tanh(layer(x))
                here.wait_stream(stream)
                x.record_stream(here)
            total = total + x.square().sum()
            total.backward()
        return [p.detach().cpu() for p in model.parameters()]

    for one, other in zip(ends(0), ends(3), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@needs_cuda
def test_a_step_inside_backward_waits_for_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).cuda()
    release(model, AdamW(model.parameters(), compile=False))
    x = torch.ones(4, 64, device="cuda")
    model(x).sum().backward()  # its state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
