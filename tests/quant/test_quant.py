"""Low-bit weights: the format, the write, and everything a float weight is asked to do."""

import copy
import io
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apollo_optim import InputError, LowBitWeight, build_optimizer, quantize_weights
from apollo_optim.core.blocks import part
from apollo_optim.core.place import Place
from apollo_optim.core.random import Dither, dither, key_at
from apollo_optim.core.storage import is_finite, nbytes, parts
from apollo_optim.quant import format, rounding_stats
from apollo_optim.quant import products as products_module
from apollo_optim.quant import write as write_module

both_bits = pytest.mark.parametrize("bits", [8, 4])
SHAPES = [(16, 128), (10, 200), (3, 7), (2, 5, 130)]  # whole groups, a short last one, less than one, a stack


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def write(w: LowBitWeight, update: Tensor, *, factor: object = 1.0, lr: float = 1.0, decay: float = 0.0, t: int = 1):
    finite = torch.ones((1,) * update.ndim, dtype=torch.bool)
    w._write_rows_((), update, factor, finite, lr, decay, noise_of(update, 7, t))


def noise_of(update: Tensor, seed: int, t: int = 1) -> Dither:
    return Place.of(update).noise(key_at(seed, "weight", t), update.device)


# --- the format ---


@both_bits
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_to_the_nearest_code(bits, shape):
    value = matrix(*shape)
    w = LowBitWeight.from_float(value, bits, 64)
    n, top = shape[-1], format.TOP[bits]
    groups = -(-n // 64)
    assert w.codes.shape == (*shape[:-1], groups * 64 * bits // 8)
    assert w.scales.shape == (*shape[:-1], groups)
    codes = format.unpack(w.codes)
    assert codes.abs().max() == top  # the whole range is used ...
    spread = w.scales.float().repeat_interleave(64, -1)[..., :n]
    assert torch.equal(w.dequantize(), codes[..., :n] * spread)
    assert ((w.dequantize() - value).abs() <= spread / 2 * 1.0001).all()  # ... and no other code is nearer
    assert (codes.flatten(0, -2)[:, n:] == 0).all()  # padding
    # a scale is the smallest bf16 for which nothing overflows
    peak = F.pad(value.abs(), (0, groups * 64 - n)).view(*shape[:-1], groups, 64).amax(-1)
    assert (w.scales.float() * top >= peak * (1 - 1e-6)).all()
    assert (w.scales.float() * top <= peak * (1 + 2**-7)).all()


def test_four_bits_lie_low_nibble_first_in_twos_complement():
    codes = torch.tensor([[1, -1, -7, 7, 0, -2]], dtype=torch.int8)
    packed = format.pack(codes, 4)
    assert packed.tolist() == [[0xF1, 0x79, 0xE0]]
    assert torch.equal(format.unpack(packed), codes)


@both_bits
def test_bytes_are_those_of_codes_and_scales(bits):
    w = LowBitWeight.from_float(matrix(10, 200), bits, 128)
    assert nbytes(w) == 10 * 256 * bits // 8 + 10 * 2 * 2
    meta = LowBitWeight.from_float(matrix(10, 200).to("meta"), bits, 128)
    assert meta.is_meta
    assert nbytes(meta) == nbytes(w)
    assert nbytes(matrix(3, 4)) == 48


# --- the write ---


@pytest.mark.parametrize(
    ("bits", "n"),
    [
        (8, 128),
        (4, 200),
        (8, 7),
        (4, 7),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((4, 128), (8, 200))),
    ],
)
def test_a_step_is_on_average_what_it_should_be(bits, n):
    """The mean over many draws is (1 - lr wd) w - lr factor tensor, growth of scales included."""
    draws, rows, lr, decay = 2000, 8, 0.5, 0.1
    start, update = LowBitWeight.from_float(matrix(rows, n), bits, 32), matrix(rows, n, seed=1) * 0.3
    factor = torch.linspace(0.5, 1.5, rows).unsqueeze(-1)
    wanted = start.dequantize() * (1 - lr * decay) - lr * factor * update
    w = LowBitWeight.from_float(torch.zeros(draws * rows, n), bits, 32)  # one draw under the other
    w.codes.copy_(start.codes.repeat(draws, 1))
    w.scales.copy_(start.scales.repeat(draws, 1))
    write(w, update.repeat(draws, 1), factor=factor.repeat(draws, 1), lr=lr, decay=decay)
    ends = w.dequantize().view(draws, rows, n)
    spread = start.scales.float().repeat_interleave(32, -1)[:, :n]
    allowed = 5.5 * ends.std(0) / draws**0.5 + 8 * spread / draws  # and what a seldom event may do
    assert ((ends.mean(0) - wanted).abs() <= allowed).all()
    assert allowed.mean() < 0.1 * spread.mean()  # far less than a code
    assert (w.scales.view(draws, rows, -1) > start.scales).any()  # the case that could be biased did happen


@both_bits
def test_where_nothing_is_to_change_nothing_changes(bits):
    w = LowBitWeight.from_float(matrix(12, 200), bits, 64)
    before = w.clone()
    for t in range(20):
        write(w, torch.zeros(12, 200), t=t)
    assert torch.equal(w.codes, before.codes)
    assert torch.equal(w.scales, before.scales)
    update = torch.zeros(12, 200)
    update[3, 70] = 1e-4
    for t in range(200):
        write(w, update, t=t)
    changed = (format.unpack(w.codes) != format.unpack(before.codes)).nonzero().tolist()
    assert changed == [[3, 70]] or set(map(tuple, changed)) <= {(3, j) for j in range(64, 128)}  # its group at most
    assert [3, 70] in changed


def test_a_scale_grows_only_when_a_code_does_not_fit_and_halves_without_rounding():
    w = LowBitWeight.from_float(torch.full((1, 4), 0.5), 8, 4)
    scale = w.scales.clone()
    write(w, torch.full((1, 4), 0.2))
    assert torch.equal(w.scales, scale)  # 0.3 of 0.5 is more than half
    write(w, torch.full((1, 4), 0.2), t=2)
    assert torch.equal(w.scales, scale / 2)
    write(w, torch.full((1, 4), -0.4), t=3)
    assert w.scales.item() >= 0.5 / 127
    torch.testing.assert_close(w.dequantize(), torch.full((1, 4), 0.5), rtol=0, atol=2.5 * w.scales.item())


def test_zeros_can_leave_zero():
    w = LowBitWeight.from_float(torch.zeros(4, 32), 8, 16)
    assert not w.dequantize().any()
    update = matrix(4, 32)
    write(w, update)
    torch.testing.assert_close(w.dequantize(), -update, rtol=0, atol=0.02 * update.abs().max().item())


def test_unusable_matrices_stay_to_the_bit():
    w = LowBitWeight.from_float(matrix(2, 6, 40), 8, 16)
    before = w.clone()
    finite = torch.tensor([True, False]).view(2, 1, 1)
    update = torch.full((2, 6, 40), 0.01)
    update[1] = torch.nan
    w._write_rows_((), update, torch.ones(2, 1, 1), finite, 1.0, 0.5, noise_of(update, 1))
    assert torch.equal(w.codes[1], before.codes[1])
    assert torch.equal(w.scales[1], before.scales[1])
    assert not torch.equal(w.codes[0], before.codes[0])
    assert is_finite(w)


@both_bits
def test_blocks_do_not_change_the_result(bits, monkeypatch):
    ends = []
    for block in (1, 300, 1 << 20):
        monkeypatch.setattr(write_module, "CPU_BLOCK", block)
        w = LowBitWeight.from_float(matrix(2, 12, 70), bits, 16)
        write(w, matrix(2, 12, 70, seed=1), factor=torch.rand(2, 1, 70, generator=torch.Generator().manual_seed(1)))
        ends.append(w)
    for end in ends[1:]:
        assert torch.equal(end.codes, ends[0].codes)
        assert torch.equal(end.scales, ends[0].scales)


ROWS = {  # of a matrix and of stacks, cut unevenly: within matrices, and between them
    (12, 70): [(slice(0, 5),), (slice(5, 6),), (slice(6, 12),)],
    (3, 6, 70): [(slice(0, 2),), (slice(2, 3), slice(0, 4)), (slice(2, 3), slice(4, 6))],
    (2, 2, 4, 70): [(slice(0, 1),), (slice(1, 2), slice(0, 1)), (slice(1, 2), slice(1, 2), slice(0, 4))],
}


@both_bits
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_a_step_taken_in_blocks_of_rows_is_that_of_the_whole_weight(bits, shape):
    check_blocks_of_rows(bits, shape, factor=0.3)
    check_blocks_of_rows(bits, shape, factor=torch.rand(*shape[:-1], 1, generator=torch.Generator().manual_seed(1)))
    check_blocks_of_rows(bits, shape, factor=torch.rand(shape[-1], generator=torch.Generator().manual_seed(1)))


@pytest.mark.slow  # three graphs: test_compiled_is_eager has the whole weight
def test_a_compiled_step_taken_in_blocks_of_rows_is_that_of_the_whole_weight(monkeypatch):
    monkeypatch.setattr(write_module, "COMPILED_FROM", 0)
    check_blocks_of_rows(8, (12, 70), factor=0.3)


def check_blocks_of_rows(bits: int, shape: tuple[int, ...], factor: float | Tensor) -> None:
    start, update = LowBitWeight.from_float(matrix(*shape), bits, 16), matrix(*shape, seed=1)
    noise = noise_of(update, 7)
    finite = (torch.arange(prod(shape[:-2])) != 2).view(*shape[:-2], 1, 1)
    whole, in_blocks = start.clone(), start.clone()
    whole._write_rows_((), update, factor, finite, 0.5, 0.1, noise)
    for at in reversed(ROWS[shape]):
        own = part(factor, at) if isinstance(factor, Tensor) and factor.ndim == len(shape) else factor
        in_blocks._write_rows_(at, update[at], own, part(finite, at), 0.5, 0.1, noise.part(at))
        assert torch.equal(in_blocks.dequantize(rows=at), whole.dequantize()[at])
    assert torch.equal(in_blocks.codes, whole.codes)
    assert torch.equal(in_blocks.scales, whole.scales)
    assert not torch.equal(whole.codes, start.codes)


def test_random_bits_are_those_of_the_global_position():
    """A step to halfway between two codes goes up exactly where the dither says so: a format, not a stream."""
    w = LowBitWeight.from_float(torch.full((3, 8), 127.0), 8, 8)
    w.codes.zero_()
    w.codes[:, 0] = 100  # keeps the scale, which is 1
    update = torch.full((3, 8), -0.5)
    update[:, 0] = 0
    write(w, update)
    rows, columns = torch.arange(3, dtype=torch.int32), torch.arange(8, dtype=torch.int32)
    up = dither(rows, columns, key_at(7, "weight", 1)).uniform() < 0.5
    assert torch.equal(w.codes[:, 1:], up[:, 1:].to(torch.int8))


def test_compiled_is_eager(monkeypatch):
    """With a short last group, too: padding is what a compiler has got wrong elsewhere."""
    ends = []
    for compiled_from in (1 << 40, 0):
        monkeypatch.setattr(write_module, "COMPILED_FROM", compiled_from)
        w = LowBitWeight.from_float(matrix(8, 60, dtype=torch.bfloat16), 8, 16)
        for t in range(3):
            write(w, matrix(8, 60, seed=t, dtype=torch.bfloat16), lr=0.1, decay=0.1, t=t)
        ends.append(w)
    assert (ends[0].codes != ends[1].codes).float().mean() <= 1e-3
    torch.testing.assert_close(ends[0].scales, ends[1].scales, rtol=1e-2, atol=0)
    assert (ends[0].codes.int() - ends[1].codes.int()).abs().max() <= 1


def test_rounding_to_nearest_is_refused():
    model = nn.Sequential()
    model.mlp = nn.Linear(16, 8, bias=False)
    quantize_weights(model, targets="mlp")
    optimizer = build_optimizer("apollo", model, targets="mlp", rank=2, stochastic_rounding=False)
    model.mlp(torch.ones(1, 16)).sum().backward()
    with pytest.raises(InputError, match="stochastic_rounding=True"):
        optimizer.step()


@both_bits
def test_a_tally_tells_what_rounding_made_of_a_step(bits):
    model = nn.ModuleDict({"mlp": nn.Linear(300, 200, bias=False)})
    names = quantize_weights(model, bits, 64, targets="mlp")
    w = model["mlp"].weight
    update = matrix(200, 300, seed=1) * 0.1
    before = w.detach().clone()
    with rounding_stats(model) as tallies:
        write(w, update, lr=0.5, decay=0.1)
    assert list(tallies) == names
    (tally,) = tallies.values()
    differ = format.unpack(before.codes) != format.unpack(w.codes)
    assert tally.changed == differ[:, :300].sum().item() / (200 * 300)
    assert 0 < tally.changed < 1
    intended = -0.5 * (update + 0.1 * before.dequantize())
    moved = w.dequantize() - before.dequantize()
    assert tally.realised == pytest.approx(((moved * intended).sum() / intended.square().sum()).item(), rel=1e-4)
    assert tally.realised == pytest.approx(1.0, abs=0.1)
    write(w, update)  # outside of it nothing is counted
    assert w.stats is None


@both_bits
def test_a_tally_changes_nothing(bits):
    """1 - lr decay is the same number whether a step is counted or not: here, made of fp32 numbers it is another."""
    model = nn.ModuleDict({"mlp": nn.Linear(300, 800, bias=False)})
    quantize_weights(model, bits, 64, targets="mlp")
    counted, alone = model["mlp"].weight, model["mlp"].weight.detach().clone()
    update = matrix(800, 300, seed=1) * 0.1
    for t in range(3):  # after some more, decay has brought them together again
        with rounding_stats(model):
            write(counted, update, lr=0.7, decay=0.3, t=t)
        write(alone, update, lr=0.7, decay=0.3, t=t)
        assert torch.equal(counted.codes, alone.codes)
        assert torch.equal(counted.scales, alone.scales)


# --- as a tensor ---


@both_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_is_that_of_the_dequantised_weight(bits, dtype):
    layer = nn.Linear(70, 9, dtype=dtype)
    twin = copy.deepcopy(layer)
    quantize_weights(nn.ModuleDict({"mlp": layer}), bits, 32, targets="mlp")
    with torch.no_grad():
        twin.weight.copy_(layer.weight.dequantize())
    x = matrix(2, 3, 70, seed=2, dtype=dtype).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    y, y2 = layer(x), twin(x2)
    assert torch.equal(y, y2)
    grad = matrix(2, 3, 9, seed=3, dtype=dtype)
    y.backward(grad)
    y2.backward(grad)
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    for ours, theirs in ((x, x2), (layer.weight, twin.weight), (layer.bias, twin.bias)):
        assert type(ours.grad) is Tensor
        assert ours.grad.dtype is dtype
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance * theirs.grad.abs().max())


@both_bits
@pytest.mark.parametrize("n", [256, 300], ids=["whole groups", "a short one"])
def test_products_in_blocks_are_those_of_the_whole_weight(bits, n, monkeypatch):
    layer = nn.Linear(n, 50)
    quantize_weights(nn.ModuleDict({"mlp": layer}), bits, 32, targets="mlp")
    x, grad_y = matrix(2, 3, n, seed=1), matrix(2, 3, 50, seed=2)
    read: list[int] = []
    dequantised = format.dequantised

    def watched(*args):
        found = dequantised(*args)
        read.append(found.numel())
        return found

    monkeypatch.setattr(format, "dequantised", watched)

    def products() -> tuple[Tensor | None, ...]:
        own_x = x.clone().requires_grad_()
        y = layer(own_x)
        y.backward(grad_y)
        found, layer.weight.grad, layer.bias.grad = (y.detach(), own_x.grad, layer.weight.grad), None, None
        return found

    whole, sizes = products(), read.copy()
    assert sizes == [50 * n] * 2
    read.clear()
    monkeypatch.setattr(products_module, "PRODUCT_BLOCK", 4000)
    in_blocks = products()
    assert sum(read) == sum(sizes)
    assert max(read) <= 4000
    for ours, theirs in zip(in_blocks, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))


def test_no_float_copy_is_kept_for_the_backward_pass():
    layer = nn.Linear(64, 48, bias=False)
    quantize_weights(nn.ModuleDict({"mlp": layer}), targets="mlp")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True))
    assert sorted(type(t).__name__ for t in kept) == ["LowBitWeight", "Tensor"]
    assert all(t.shape == (2, 64) for t in kept if type(t) is Tensor)


@both_bits
def test_embedding_is_that_of_the_dequantised_weight(bits):
    layer = nn.Embedding(20, 48, padding_idx=3)
    names = quantize_weights(nn.ModuleDict({"embed": layer}), bits, 16, targets="embed")
    assert names == ["embed.weight"]
    table = layer.weight.dequantize().requires_grad_()
    ids = torch.tensor([[1, 3, 19], [1, 0, 3]])
    y, y2 = layer(ids), F.embedding(ids, table, padding_idx=3)
    assert torch.equal(y, y2)
    y.square().sum().backward()
    y2.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, table.grad)
    with pytest.raises(InputError, match="max_norm"):
        F.embedding(ids, layer.weight, max_norm=1.0)


def test_any_other_operation_reads_the_float_value():
    w = nn.Parameter(LowBitWeight.from_float(matrix(4, 6, 16), 8, 8))
    float_w = w.dequantize().requires_grad_()
    x = torch.randn(6, 16)
    (w[1] * x).sum().backward()
    (float_w[1] * x).sum().backward()
    assert torch.equal(w.grad, float_w.grad)
    assert torch.equal(torch.zeros_like(w), torch.zeros(4, 6, 16))
    assert type(torch.zeros_like(w)) is Tensor


def test_other_optimizers_and_in_place_arithmetic_are_refused():
    w = nn.Parameter(LowBitWeight.from_float(matrix(4, 16)))
    w.grad = torch.ones(4, 16)
    before = w.detach().clone()
    with pytest.raises(InputError, match="optimizers are those of apollo_optim"):
        torch.optim.SGD([w], lr=0.1).step()
    with torch.no_grad(), pytest.raises(InputError, match="cannot write"):
        w.mul_(2)
    assert torch.equal(w.codes, before.codes)


def test_copy_clone_move_save_and_initialise():
    w = nn.Parameter(LowBitWeight.from_float(matrix(6, 40), 4, 16))
    for twin in (w.detach().clone(), copy.deepcopy(w), w.to(torch.bfloat16), w.data):
        assert type(twin) is LowBitWeight
        assert torch.equal(twin.codes, w.codes)
    assert w.to(torch.bfloat16).dtype is torch.bfloat16
    assert isinstance(copy.deepcopy(w), nn.Parameter)
    with torch.no_grad():
        other = LowBitWeight.from_float(torch.zeros(6, 40), 4, 16)
        other.copy_(w)
        assert torch.equal(other.codes, w.codes)
        other.copy_(matrix(6, 40, seed=5))
        assert torch.equal(other.dequantize(), LowBitWeight.from_float(matrix(6, 40, seed=5), 4, 16).dequantize())
        with pytest.raises(InputError, match="cannot copy"):
            other.copy_(LowBitWeight.from_float(matrix(6, 40), 8, 16))
    nn.init.normal_(w, std=0.5)
    assert 0.3 < w.dequantize().std() < 0.7
    nn.init.zeros_(w)
    assert not w.dequantize().any()
    file = io.BytesIO()
    torch.save({"w": other}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["w"]
    assert type(loaded) is LowBitWeight
    assert (loaded.bits, loaded.group_size, loaded.shape) == (4, 16, (6, 40))
    assert torch.equal(loaded.codes, other.codes)


def test_parts():
    w = LowBitWeight.from_float(matrix(6, 40))
    assert list(parts(w)) == ["codes", "scales"]
    plain = matrix(2, 2)
    assert parts(plain) == {"": plain}
    w.scales[0, 0] = torch.inf
    assert not is_finite(w)


def test_gradient_checkpointing_and_a_compiled_model():
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    quantize_weights(nn.ModuleDict({"mlp": model}), group_size=16, targets="mlp")
    x = matrix(4, 16, seed=1)
    wanted = _gradients(model, model, x)
    for run in (lambda x: checkpoint(model, x, use_reentrant=False), torch.compile(model)):
        for got, want in zip(_gradients(model, run, x), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


def _gradients(model: nn.Module, run, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    run(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


# --- which weights ---


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.Conv1d(12, 12, 3), nn.LayerNorm(12))
        self.experts = nn.Module()
        self.experts.mlp_stack = nn.Parameter(torch.randn(3, 4, 8))
        self.head = nn.Linear(8, 11, bias=False)


def test_targets_choose_the_matrices_of_modules():
    assert quantize_weights(Tiny(), targets="mlp") == ["mlp.0.weight"]
    assert quantize_weights(Tiny(), targets=["re:^experts$", "mlp"]) == ["mlp.0.weight", "experts.mlp_stack"]
    assert quantize_weights(Tiny(), targets="*", exclude="embed") == [
        "mlp.0.weight",
        "experts.mlp_stack",
        "head.weight",
    ]
    with pytest.raises(InputError, match=r"'attn' matches nothing.*embed, experts, head"):
        quantize_weights(Tiny())
    with pytest.raises(InputError, match="8 or 4"):
        quantize_weights(Tiny(), bits=3, targets="mlp")
    with pytest.raises(InputError, match="even"):
        quantize_weights(Tiny(), group_size=7, targets="mlp")


def test_shared_and_spoilt_weights_are_refused():
    model = Tiny()
    model.head.weight = model.embed.weight
    with pytest.raises(InputError, match=r"head.weight and embed.weight are one weight"):
        quantize_weights(model, targets=["head", "mlp"])
    model = Tiny()
    model.mlp[0].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"mlp.0.weight is not finite"):
        quantize_weights(model, targets="mlp")


@pytest.mark.parametrize("name", ["q-apollo", "q-apollo-mini"])
def test_the_registry_entries_want_low_bit_weights(name):
    with pytest.raises(InputError, match="quantize_weights"):
        build_optimizer(name, Tiny(), targets="mlp", rank=1)
