"""The bench of low-bit weights: its formats do what they say, its pieces run, its log is resumed and tabled."""

import json
import shutil

import pytest
import torch
from kept import RESULTS, needs_results
from torch import Tensor, nn

from apollo_optim.core.errors import InputError
from apollo_optim.core.place import Place
from apollo_optim.core.random import key_at
from apollo_optim.quant import LowBitWeight, format, quantize_weights
from apollo_optim.train.models import SIZES
from benchmarks.low_bit import __main__ as low_bit
from benchmarks.low_bit import compare
from benchmarks.low_bit import cost as low_bit_cost
from benchmarks.low_bit.cost import matrices
from benchmarks.low_bit.formats import FORMATS, anew, grouped, installed, reach, stepped, stored

both_bits = pytest.mark.parametrize("bits", [8, 4])
every_format = pytest.mark.parametrize("it", FORMATS.values(), ids=list(FORMATS))


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def step(function, codes, scales, update, bits, t=1, decay=0.0):
    one, finite = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    return function(codes, scales, update, one, finite, 1.0, decay, noise(update, t), bits)


def noise(update, t=1):
    return Place.of(update).noise(key_at(7, "weight", t), update.device)


# --- formats ---


@both_bits
def test_symmetric_anew_rounded_to_nearest_is_the_library_s_quantised(bits):
    value = matrix(10, 200)
    codes, scales = stored(*anew(grouped(value, 64), torch.ones(10, 4, 1), 0.5, bits, False), bits, False)
    wanted = format.quantised(value, bits, 64)
    assert torch.equal(codes, wanted[0])
    assert torch.equal(scales, wanted[1])


@both_bits
def test_the_bench_s_keep_is_the_library_s_stepped(bits):
    """So what is written for affine codes differs from the library in being affine, and in nothing else."""
    ours = theirs = format.quantised(matrix(8, 100), bits, 16)
    grown = 0.0
    for t in range(30):
        update = matrix(8, 100, seed=t + 1) * (1.0 if t < 15 else 0.01)
        before = ours[1]
        ours = step(lambda *a: stepped(*a, affine=False, keep=True), *ours, update, bits, t, 0.1)
        theirs = step(format.stepped, *theirs, update, bits, t, 0.1)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        grown += (ours[1] != before).float().mean().item()
    assert grown > 1  # scales did change


@both_bits
@pytest.mark.parametrize("n", [128, 100])
def test_affine_is_off_by_half_a_level_at_most(bits, n):
    it, value = FORMATS["affine-keep"], matrix(6, n) + 0.01
    value[0] = value[0].abs()  # all of one sign
    value[1] = 0.5
    value[2] = 0.0
    codes, scales = it.quantised(value, bits, 32)
    groups = -(-n // 32)
    step_of = scales[:, :groups].repeat_interleave(32, -1)[:, :n]
    back = it.dequantised(codes, scales, n, torch.float32)
    assert ((back - value).abs() <= step_of / 2 * 1.0001).all()
    assert not back[2].any()
    # the levels are as fine as they may be: 2^b - 1 of them for the reach of the entries, bf16 rounding apart
    finest = reach(grouped(value, 32), True)[3:, :, 0] / (2**bits - 1)
    torch.testing.assert_close(scales[3:, :groups], finest, rtol=2**-7, atol=0)


@both_bits
@every_format
def test_steps_arrive_on_average_in_every_format(it, bits):
    draws, rows, n = 1000, 4, 64
    start, update = it.quantised(matrix(rows, n), bits, 32), matrix(rows, n, seed=1) * 0.3
    wanted = it.dequantised(*start, n, torch.float32) - update
    repeated = (t.repeat(draws, 1) for t in start)  # one draw under the other
    ends = it.dequantised(*step(it.stepped, *repeated, update.repeat(draws, 1), bits), n, torch.float32)
    ends = ends.view(draws, rows, n)
    level = start[1][:, :2].float().repeat_interleave(32, -1)
    allowed = 5.5 * ends.std(0) / draws**0.5 + 8 * level / draws
    assert ((ends.mean(0) - wanted).abs() <= allowed).all()
    assert allowed.mean() < 0.15 * level.mean()


@both_bits
@pytest.mark.parametrize("name", ["symmetric-keep", "affine-keep"])
def test_kept_scales_leave_untouched_entries_alone(name, bits):
    it = FORMATS[name]
    codes, scales = it.quantised(matrix(8, 64), bits, 64)
    before = it.dequantised(codes, scales, 64, torch.float32)
    update = torch.zeros(8, 64)
    update[:, 5] = before[:, 5]  # to zero, where no scale has to grow
    for t in range(5):
        codes, scales = step(it.stepped, codes, scales, update if t == 0 else update * 0, bits, t)
    after = it.dequantised(codes, scales, 64, torch.float32)
    same = (after == before)[:, torch.arange(64) != 5].all(-1)
    assert same[(before[:, 5].abs() < before.abs().amax(-1))].all()


def test_anew_is_noise_for_untouched_entries_and_keep_is_not():
    moved = {name: compare.drift(name, 4, 64, "sparse", 10)["deviation_untouched"] for name in FORMATS}
    assert moved["symmetric-keep"] < moved["symmetric-anew"] / 2
    assert moved["affine-keep"] < moved["affine-anew"] / 2


@every_format
def test_a_weight_is_stored_and_stepped_in_the_installed_format(it):
    value, update = matrix(8, 40), matrix(8, 40, seed=1)
    with installed(it):
        model = nn.ModuleDict({"mlp": nn.Linear(40, 8, bias=False)})
        model["mlp"].weight.data.copy_(value)
        quantize_weights(model, 4, 16, targets="mlp")
        w = model["mlp"].weight
        assert isinstance(w, LowBitWeight)
        start = it.quantised(value, 4, 16)
        assert torch.equal(w.codes, start[0])
        w._write_rows_((), update, 1.0, torch.ones(1, 1, dtype=torch.bool), 1.0, 0.0, noise(update))
        codes, scales = step(it.stepped, *start, update, 4)
        assert torch.equal(w.codes, codes)
        assert torch.equal(w.scales, scales)
        assert torch.equal(w.dequantize(), it.dequantised(codes, scales, 40, torch.float32))
    assert format.stepped is FORMATS["symmetric-keep"].stepped


def test_a_format_that_was_never_used_is_not_measured():
    with pytest.raises(RuntimeError, match="never called"), installed(FORMATS["affine-anew"]):
        pass


# --- the command ---


def test_the_matrices_of_7b():
    shapes = matrices(SIZES["llama-7b"])
    assert set(shapes) == {(4096, 4096), (11008, 4096), (4096, 11008)}
    assert sum(m * n * count for (m, n), count in shapes.items()) == 6_476_005_376


def test_cost_measures_every_piece_and_adds_them_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(low_bit_cost, "give_back_memory", lambda: True)  # this process has other tests to run
    threads = torch.get_num_threads()
    try:
        low_bit.main(["cost", "--model", "llama-1m", "--rounds", "3", "--threads", "1", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    setting, *rows = map(json.loads, (tmp_path / "cost.jsonl").read_text().splitlines())
    assert setting["versions"]["torch"]
    assert setting["hardware"]["threads"] == 1
    assert len(rows) == 3 * (1 + 3 * 4)  # shapes x (W's gradient, and per bits: two products, write, step)
    assert all(len(row["ns_per_weight"]) == 3 and min(row["ns_per_weight"]) > 0 for row in rows)
    text = (tmp_path / "table.md").read_text()
    assert text == capsys.readouterr().out
    # what a log of known figures adds up to: 1 ns each, 2 + 1 + 1 + 1 times
    for row in rows:
        row["ns_per_weight"] = [1.0] * 3
    (tmp_path / "cost.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [setting, *rows]))
    low_bit.main(["cost", "--table", "--out", str(tmp_path)])
    weights = sum(m * n * count for (m, n), count in matrices(SIZES["llama-1m"]).items())
    assert f"| **sum** |  | {5 * weights * 1e-9:.4g} |  | {5 * weights * 1e-9:.4g} |  |" in capsys.readouterr().out


def test_what_the_log_of_formats_holds_is_not_measured_again(tmp_path, monkeypatch, capsys):
    done: list[tuple[str, int, int]] = []

    def run(work, format, bits, model, steps, warmup, seed):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append((format, bits, seed))
        return {"warmup": warmup, "perplexity": 100.0 + 10 * format.endswith("anew") + seed}

    monkeypatch.setattr(compare, "perplexity", run)
    words = ["formats", "--only", "perplexity", "--seeds", "0", "1", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        low_bit.main(words)
    assert done[0] == ("bf16", 16, 0)
    first = done.copy()
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        low_bit.main(words)
    assert len(set(first + done)) == 12
    done.clear()
    assert low_bit.main(["formats", "--table", "--out", str(tmp_path)]) == 0
    assert "| 4 | symmetric-anew | 110.00, 111.00 | 110.50 | +9.95% (+9.90% to +10.00%) |" in capsys.readouterr().out


def test_without_a_log_there_is_no_table(tmp_path):
    with pytest.raises(InputError, match="holds no log yet"):
        low_bit.main(["formats", "--table", "--out", str(tmp_path)])


@needs_results
def test_the_kept_logs_make_the_kept_table(tmp_path, capsys):
    """Of earlier commits: what was measured stays readable."""
    kept = RESULTS / "low-bit"
    for log in kept.glob("*.jsonl"):
        shutil.copy(log, tmp_path)
    assert low_bit.main(["cost", "--table", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == (kept / "table.md").read_text()
