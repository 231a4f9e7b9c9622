"""benchmarks.gpu without a GPU: what a person with one relies on while the clock runs.

The whole of it on a CPU is `python -m benchmarks.gpu --device cpu`; here are its quick parts, and what goes wrong.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import kit
from benchmarks.cases import Case, Child, Running
from benchmarks.gpu import contract, device, report, steps
from benchmarks.gpu.__main__ import main, seconds_of
from benchmarks.gpu.parts import PARTS, Setup
from benchmarks.table import plain

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Setup("cpu", tiny=True)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs cases of gpu_cases.py in a process and returns the log."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def run(*functions, seconds=30.0):
        cases = [Case("part", name, f"gpu_cases:{name}", {"device": "cpu"}) for name in functions]
        child = Child(cases, tmp_path / "log.jsonl", seconds, env={})
        child.wait()
        return kit.read(tmp_path / "log.jsonl")

    return run


def of_part(name: str) -> list[Case]:
    return next(part for part in PARTS if part.name == name).cases(TINY)


def in_process(case: Case, folder: Path) -> list[kit.Line]:
    log = folder / "log.jsonl"
    module, _, function = case.run.partition(":")
    getattr(importlib.import_module(module), function)(Running(case, log, time.time() + 60))
    return kit.read(log)


# --- processes ---


def test_a_case_that_is_stopped_leaves_what_it_has_measured_and_the_next_is_said(start):
    began = time.monotonic()
    lines = start("slow", "fine", seconds=6.0)  # a busy machine takes some to start a process
    assert time.monotonic() - began < 16
    assert [(line["case"], line["kind"], line["status"]) for line in lines] == [
        ("slow", "figures", "ok"),
        ("slow", "end", "timed out"),
        ("fine", "end", "skipped"),
    ]
    assert "stopped after" in lines[1]["reason"]


def test_a_process_that_dies_is_a_line(start):
    lines = start("crash")
    assert [line["status"] for line in lines] == ["ok", "killed"]
    assert "signal 9" in lines[1]["reason"]


def test_whatever_goes_wrong_is_a_line_and_the_next_goes_on(start):
    lines = start("measurements", "fine")
    found = {line["what"]: line for line in lines if line["kind"] == "figures"}
    assert {what: line["status"] for what, line in found.items()} == {
        "memory": "out of memory",
        "device memory": "out of memory",
        "too large": "does not fit",
        "broken": "failed",
        "fine": "ok",
    }
    assert "wants 54.00 GB" in found["too large"]["reason"]
    assert found["broken"]["reason"] == "ValueError: no such thing at all"
    assert [line["status"] for line in lines if line["kind"] == "end"] == ["ok", "ok"]
    for key in ("part", "case", "config", "versions", "hardware", "commit", "time"):
        assert all(key in line for line in lines), key
    assert report.faults(lines) == ["part measurements what=broken: failed: ValueError: no such thing at all"]


def test_a_module_that_cannot_be_loaded_is_a_line(start):
    (line,) = start("nothing")
    assert (line["kind"], line["status"]) == ("end", "failed")


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    kit.append(log, {"a": 1})
    with log.open("a") as file:
        file.write('{"b": ')
    kit.append(log, {"c": float("inf")})
    assert kit.read(log) == [{"a": 1}, {"c": None}]
    assert "log.jsonl:2" in capsys.readouterr().err


def test_the_kit_and_the_parent_need_no_torch():
    code = "import sys, benchmarks.gpu.__main__, benchmarks.cases; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=kit.ROOT)
    assert done.stdout.strip() == "False"


# --- the plan of it ---


def test_the_default_parts_end_within_eight_minutes():
    default = [part for part in PARTS if part.by_default]
    assert sum(part.seconds for part in default if not part.background) <= seconds_of(default) <= 475
    assert seconds_of(default[:1]) == 60  # torch may come from a cold disk
    assert PARTS[0].name == "env"


@pytest.mark.parametrize("setup", [TINY, Setup("cuda", tiny=False), Setup("cuda", tiny=True)], ids=str)
def test_every_case_can_be_run_and_its_config_is_json(setup):
    for part in PARTS:
        for case in part.cases(setup):
            module, _, function = case.run.partition(":")
            assert callable(getattr(importlib.import_module(module), function))
            assert json.loads(json.dumps(case.config)) == case.config
            assert case.part == part.name


# --- the command ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_it_would_do(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("stays")
    assert main(["--out", str(tmp_path), "--parts", "step"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no device 'cuda' here (")
    assert "env, step" in line
    assert "--device cpu" in line
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--parts", "nope"], "there are env, step"),
        (["--table", "nowhere"], "there is no log"),
    ],
)
def test_a_word_that_is_wrong_is_one_line(words, says, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_log_is_not_written_over(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("{}\n")
    assert main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_part_runs_on_a_cpu_and_the_table_comes_from_the_log(tmp_path, capsys, monkeypatch):
    assert main(["--device", "cpu", "--parts", "env", "--out", str(tmp_path)]) == 0
    assert "bf16 matmul" in capsys.readouterr().out
    assert {"log.jsonl", "table.txt"} <= set(os.listdir(tmp_path)) <= {"log.jsonl", "table.txt", "output"}
    some = [pair for pair in contract.kinds() if pair[0].name in ("adamw", "q-apollo-mini")]
    monkeypatch.setattr(contract, "kinds", lambda: some)
    for case in of_part("contract"):
        lines = in_process(case, tmp_path)
    assert {line["status"] for line in lines} == {"ok"}
    assert sum(line.get("what") == "numbers" for line in lines) == 3
    assert main(["--table", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith((tmp_path / "table.txt").read_text())
    for row in ("bf16 matmul", "golden hash", "q-apollo-mini  low-bit"):
        assert row in text


def test_something_that_differs_is_the_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contract, "GOLDEN", [1, 2, 3, 4])
    in_process(of_part("contract")[0], tmp_path)
    assert main(["--table", str(tmp_path / "log.jsonl")]) == 1
    assert "error: contract golden what=golden hash: differs" in capsys.readouterr().err


# --- the measurements ---


@pytest.mark.slow
def test_a_step_of_a_large_model_is_split_and_held_against_its_plan(tmp_path):
    case = next(case for case in of_part("7b") if case.name == "8-bit")
    lines = in_process(case, tmp_path)
    found = {line["what"]: line for line in lines}
    assert {line["status"] for line in lines} == {"ok"}
    assert set(found["split"]["seconds"]) == {"forward", "backward", "step"}
    assert found["released"]["tokens_per_s"] > 0
    plan = {"part": "plan", "status": "ok", "of": "8-bit", "batch": 2, "seq": 32, "planned": 9_000_000_000}
    found["released"] |= {"allocated": 9_900_000_000, "reserved": 10_000_000_000}
    (row,) = report.large_table([*lines, plan]).rows
    assert row[:2] == ("8-bit, eager", "2 x 32")
    assert row[-4:] == ("9.90", "10.00", "9.00", "+10.0%")


def model_of(case: Case):
    from benchmarks.gpu.model import build

    return build(case.config["size"], case.config["dtype"], case.config["bits"], torch.device("cpu"))


def test_no_float_copy_of_a_low_bit_model_is_made(tmp_path):
    model = model_of(next(case for case in of_part("7b") if case.name == "4-bit"))
    low = [name for name, p in model.named_parameters() if hasattr(p, "codes")]
    assert len(low) == 2 * 7
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.model.rotary_emb.inv_freq[0] == 1.0


@pytest.mark.slow
def test_a_step_is_timed_beside_fused_adamw(tmp_path, monkeypatch):
    def greedy(matrices, rest, rank):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 54.00 GiB")

    monkeypatch.setattr(steps, "installed", lambda: ({"greedy": greedy}, ["hakuli"]))
    monkeypatch.setattr(steps, "list_optimizers", list)
    (case,) = of_part("step")
    lines = in_process(case, tmp_path)
    figures = {line["contender"]: line for line in lines if "contender" in line}
    assert set(figures) == {"torch AdamW (fused)", "apollo-mini", "apollo r=8", "adamw", "greedy"}
    fused, ours = figures["torch AdamW (fused)"], figures["apollo-mini"]
    assert ours["moved"]
    assert ours["ratio"]["n"] == 3
    parameters = next(line["parameters"] for line in lines if "parameters" in line)
    moved = fused["floor_seconds"] * next(line["bandwidth"] for line in lines if "bandwidth" in line)
    assert moved == pytest.approx(14 * parameters, rel=0.01)  # 7 numbers of 2 bytes
    assert ours["operations"] > fused["operations"] > 0
    assert figures["greedy"]["status"] == "out of memory"
    assert "54.00 GiB" in figures["greedy"]["reason"]
    assert lines[-1]["what"] == "end"  # it went on
    assert not report.faults(lines)
    assert "not installed: hakuli" in plain(report.tables(lines))


def test_two_runs_that_part_are_seen():
    start = {"w": torch.zeros(100, 100), "b": torch.zeros(100)}
    here = {"w": torch.ones(100, 100), "b": torch.ones(100)}
    there = {name: t.clone() for name, t in here.items()}
    assert contract.judged(contract.parted(here, there, start), 0.0)["status"] == "ok"
    there["w"][0] += 0.1
    line = contract.parted(here, there, start)
    assert line["worst"] == "w"
    assert line["difference"] == pytest.approx(0.01, rel=1e-3)
    assert contract.judged(line, 1e-3)["status"] == "differs"
    there["b"][0] = float("nan")
    assert contract.judged(contract.parted(here, there, start), 1e9)["status"] == "differs"
    assert contract.judged(contract.parted(start, start, start), 1.0)["not_moved"] == ["w", "small ones"]


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)  # torch's refuses one without a number
    assert device.open_device("cuda") == torch.device("cuda", 1)
    assert not chosen
    assert device.open_device("cuda:1") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda:1")]
    assert device.open_device("cpu") == torch.device("cpu")


def test_what_a_profiler_lists_is_told_apart():
    kernels = ["void at::native::vectorized_elementwise_kernel<4>(int)", "triton_poi_fused_add_0"]
    others = ["Memcpy HtoD (Pageable -> Device)", "Memset (Device)", "Optimizer.step#AdamW.step", "Stream Sync"]
    assert not any(device.NOT_KERNELS.match(name) for name in kernels)
    assert all(device.NOT_KERNELS.match(name) for name in others)
    calls = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaGraphLaunch", "hipModuleLaunchKernel"]
    assert all(device.LAUNCH.match(name) for name in calls)
    assert not any(device.LAUNCH.match(name) for name in ("cudaMemcpyAsync", "cudaStreamSynchronize", *kernels))


def test_what_tools_said():
    base = {"part": "tools", "kind": "figures", "status": "ok", "optimizer": "muon", "weights": "bfloat16"}
    lines = [
        {**base, "what": "FSDP2", "difference": 2e-7},
        {**base, "what": "Trainer", "again": 0.0, "resumed": 1e-3, "status": "differs"},
        {**base, "what": "pretrain", "unlike": ["resumed: figures of steps [5]"], "status": "differs"},
        {**base, "what": "pretrain", "status": "failed", "reason": "no room"},
    ]
    cells = [row[3:] for row in report.tools_table(lines).rows]
    assert cells == [("-", "2e-07"), ("bitwise", "0.001"), ("bitwise", "DIFFERS"), ("failed", "failed")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tmp_path):
    assert main(["--tiny", "--parts", "step,7b,contract", "--out", str(tmp_path)]) == 0
    lines = kit.read(tmp_path / "log.jsonl")
    assert any(line.get("launches") for line in lines)
    assert any(line.get("allocated") for line in lines)
