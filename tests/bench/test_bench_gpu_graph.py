"""The part `graph` of benchmarks.gpu, with stubs of torch.cuda: no graph is captured here."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu import graph, report
from benchmarks.gpu.parts import PARTS, Setup


class Stream:
    """Notes who waited for whom."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other)


class Stub:
    """torch.cuda, as far as `beside` uses it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: str | None = None) -> None:
        self.here, self.aside, self.replays, self.capturing, self.fault = Stream(), Stream(), 0, False, fault
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.here)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.aside)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    def replay(self) -> None:
        self.replays += 1

    @contextlib.contextmanager
    def capture(self, _: object) -> Iterator[None]:
        self.capturing = True
        yield
        self.capturing = False
        if self.fault:
            raise RuntimeError(self.fault)


def test_a_graph_is_timed_beside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stub, steps = Stub(monkeypatch), []
    line = graph.beside(lambda: steps.append(stub.capturing), torch.device("cpu"), rounds=4)
    assert steps == [False] * graph.WARM + [True] + [False] * 4
    assert stub.replays == 4
    assert stub.aside.waited == [stub.here]
    assert stub.here.waited == [stub.aside]
    assert line["captured"]
    assert set(line["device"]) == set(line["host"]) == {"step", "graph"}
    assert line["host"]["graph"]["n"] == 4
    about = {"part": "graph", "what": "graph", "status": "ok", "optimizer": "adamw"}
    there = [{**about, **line, "compile": True}, {**about, "captured": False, "note": "why", "compile": False}]
    assert [row[0] for row in report.graph_table(there).rows] == ["adamw, compiled", "adamw, eager"]
    assert report.graph_table(there).rows[1][-1] == "why"


def test_what_cannot_be_captured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(monkeypatch, "operation not permitted when stream is capturing\nmore of it")
    line = graph.beside(lambda: None, torch.device("cpu"), rounds=4)
    assert line == {
        "captured": False,
        "note": "cannot be captured: operation not permitted when stream is capturing more of it",
    }
    assert not stub.replays


def test_a_cpu_is_told_so_in_one_line() -> None:
    part = next(part for part in PARTS if part.name == "graph")
    (case,) = part.cases(Setup("cpu", tiny=True))
    said: list[str] = []

    class Running:
        config = case.config

        def skipped(self, reason: str, **about: object) -> None:
            said.append(reason)

    graph.measure(Running())  # type: ignore[arg-type]
    assert said == ["a cpu has no CUDA graphs"]
    assert not part.by_default
