"""What embedding, head and other matrices follow where they follow no rank: every choice, under every optimizer."""

import math
import re
import warnings
from typing import Any

import pytest
import torch
from low_bit import prepare
from registered import assert_same, flat_state, reloaded, run, set_gradients, snapshot
from torch import Tensor, nn

from apollo_optim import (
    AdamW,
    Apollo,
    InputError,
    RuleOptimizer,
    build_optimizer,
    describe,
    list_optimizers,
    param_groups,
)
from apollo_optim.core import blocks as blocks_module
from apollo_optim.core import codecs
from apollo_optim.core.random import uniform
from apollo_optim.optim.describe import state_bytes
from apollo_optim.optim.recipes import find_optimizer
from apollo_optim.rules import RULES as REGISTRY
from apollo_optim.train.config import OptimConfig
from apollo_optim.train.config.check import check_optimizer
from benchmarks.race.methods import METHODS

RESTS = ("adamw", "adamw8bit", "adamw4bit", "adafactor", "scale", "scale8bit", "apollo")
CASES = [
    pytest.param(info.name, rest, id=f"{info.name}-{rest}")
    for info in list_optimizers()
    for rest in RESTS
    if rest != "adamw"
    and ("rank" in info.cls.knobs() if rest == "apollo" else info.name in ("apollo", "q-apollo", "adamw"))
]
every_case = pytest.mark.parametrize(("name", "rest"), CASES)
SCALE_ROWS = {"rule": "scale", "normalize": "rows", "momentum": 0.9}
SCALE_COLUMNS = {"rule": "scale", "normalize": "columns"}
RULES: dict[str, dict[str, Any]] = {
    "adamw8bit": {"state_dtype": "8bit"},
    "adamw4bit": {"state_dtype": "4bit"},
    "adafactor": {"rule": "adafactor"},
    "scale rows": SCALE_ROWS,
    "scale columns": SCALE_COLUMNS,
}


class Model(nn.Module):
    """Rows of 300: two groups of 150 8-bit codes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 300)
        self.mlp = nn.Linear(300, 40)
        self.adapter = nn.Linear(300, 14, bias=False)
        self.conv = nn.Conv1d(8, 60, 9)
        self.norm = nn.LayerNorm(300)
        self.lm_head = nn.Linear(300, 17, bias=False)


def make(name: str, rest: str, **knobs) -> tuple[Model, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model().bfloat16()
    prepare(name, model)
    own = {"rank": 1 if "mini" in name else 4, "update_proj_gap": 3}
    knobs = {key: own[key] for key in own.keys() & find_optimizer(name).cls.knobs().keys()} | knobs
    return model, build_optimizer(name, model, targets="mlp", rest=rest, **{"lr": 1e-2, **knobs})


@every_case
def test_it_steps_what_it_is_for_with_all_its_state_planned(name, rest):
    model, optimizer = make(name, rest, weight_decay=0.0)
    before = snapshot(model)
    run(model, optimizer, [0])
    first = flat_state(optimizer)
    assert all(type(value) in (Tensor, int) for value in first.values())
    run(model, optimizer, range(1, 4))
    later = flat_state(optimizer)
    assert {k: getattr(v, "shape", None) for k, v in first.items()} == {
        k: getattr(v, "shape", None) for k, v in later.items()
    }
    for key, p in model.named_parameters():
        assert p.isfinite().all()
        assert p.dtype is torch.bfloat16
        assert not torch.equal(p, before[key]), key
        moved = (p.detach().float() - before[key].float()).square().mean().sqrt()
        assert moved > 1e-4, "as far as lr says"
    planned = sum(state_bytes(p, group) for group in optimizer.param_groups for p in group["params"])
    real = sum(t.numel() * t.element_size() for t in later.values() if isinstance(t, Tensor))
    assert planned == real
    table = describe(optimizer)
    assert f"{planned:,}" in table
    follows = {line.split()[0]: line for line in table.splitlines() if line}
    titles = {"adamw8bit": "AdamW *8bit", "adamw4bit": "AdamW *4bit", "adafactor": "Adafactor", "scale": "SCALE"}
    said = titles.get(rest, "SCALE" if "scale" in rest else find_optimizer(name).cls.title)
    assert all(re.search(said, follows[group]) for group in ("embedding", "head", "others", "others_conv"))
    assert "AdamW " in follows["norms"]
    assert "bit" not in follows["norms"]


@every_case
def test_it_resumes_bitwise_through_a_weights_only_file(name, rest):
    model, optimizer = make(name, rest)
    run(model, optimizer, range(3))
    again, resumed = make(name, rest)
    reloaded(model, optimizer, again, resumed)
    run(model, optimizer, range(3, 7))
    run(again, resumed, range(3, 7))
    assert_same(snapshot(model), snapshot(again))
    assert_same(flat_state(optimizer), flat_state(resumed))
    if rest in ("adamw8bit", "adafactor"):
        _, other = make(name, "adamw")
        foreign = optimizer.state_dict()
        foreign["param_groups"] = other.state_dict()["param_groups"]
        with pytest.raises(InputError, match="does not fit"):
            other.load_state_dict(foreign)


@every_case
@pytest.mark.parametrize("bad", [0, 2])
def test_zeros_are_harmless_and_a_non_finite_gradient_is_skipped(name, rest, bad):
    model, optimizer = make(name, rest, weight_decay=0.0)
    for step in range(4):
        set_gradients(model, step, 0.0 if step == 1 else 1.0)
        if step == bad:
            for p in model.parameters():
                p.grad.view(-1)[-1] = math.nan if bad else math.inf
        weights, states = snapshot(model), flat_state(optimizer)
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        if step == bad:
            assert_same(weights, snapshot(model))
            kept = ("exp_avg", "prev_norm")
            now = flat_state(optimizer)
            assert_same(*({k: v for k, v in s.items() if k in states and k[1].startswith(kept)} for s in (states, now)))
            assert all(state["skipped"].sum() == 1 for state in optimizer.state.values())
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # as a schedule would
    held = snapshot(model)
    run(model, optimizer, [5])
    assert_same(held, snapshot(model))


@pytest.mark.parametrize("rest", [rest for rest in RESTS if rest != "adamw"])
def test_it_reads_no_value_back(rest):
    """The meta device has none."""
    with torch.device("meta"):
        model = Model()
    optimizer = build_optimizer("apollo-mini", model, targets="mlp", rest=rest)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()


# --- the rules themselves, against fp64 written again ---


def taken(rule: dict, shape: tuple[int, ...], grads: list[Tensor], **knobs) -> list[Tensor]:
    """The fp32 steps of one parameter at lr 1, p before less p after."""
    p = nn.Parameter(torch.zeros(shape))
    optimizer = AdamW([{"params": [p], **rule}], **{"lr": 1.0, "weight_decay": 0.0, **knobs})
    steps = []
    for grad in grads:
        with torch.no_grad():
            p.zero_()
        p.grad = grad.clone()
        optimizer.step()
        steps.append(-p.detach().double())
    return steps


def gradients(shape: tuple[int, ...], count: int = 5, seed: int = 0) -> list[Tensor]:
    """Rows and columns of very different sizes, and a row that is zero now and then."""
    draw = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.randn(*shape[:-1], 1, generator=draw) * 10 ** torch.randn(shape[-1], generator=draw)
    grads = [torch.randn(shape, generator=draw) * sizes for _ in range(count)]
    grads[1].select(-2, 0).zero_()
    return grads


BLOCKS = pytest.mark.parametrize("size", [1 << 20, 64], ids=["whole", "in blocks"])


@BLOCKS
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (3, 12, 8), (1, 50)], ids=str)
def test_adafactor_is_the_papers(monkeypatch, shape, size):
    """Algorithm 4 (1804.04235) with absolute steps: beta2 = 1 - t^-0.8, eps1 = 1e-30, d = 1, no first moment."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = gradients(shape)
    ours = taken(RULES["adafactor"], shape, grads, lr=0.5)
    row = col = 0.0
    for t, (grad, our) in enumerate(zip(grads, ours, strict=True), 1):
        beta2, g = 1 - t**-0.8, grad.double()
        row = beta2 * row + (1 - beta2) * (g**2 + 1e-30).sum(-1)
        col = beta2 * col + (1 - beta2) * (g**2 + 1e-30).sum(-2)
        v = row[..., :, None] * col[..., None, :] / row.sum(-1)[..., None, None]
        u = g / v.sqrt()
        u = u / (u.square().mean((-2, -1), keepdim=True).sqrt() / 1.0).clamp(min=1.0)
        torch.testing.assert_close(our, 0.5 * u, rtol=2e-5, atol=1e-6)
        assert our.square().mean((-2, -1)).sqrt().max() <= 0.5 * (1 + 1e-5), "lr bounds the RMS of a step"


@BLOCKS
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("normalize", "dim"), [("rows", -1), ("columns", -2)])
@pytest.mark.parametrize("shape", [(30, 20), (3, 12, 8)], ids=str)
def test_scale_is_the_papers(monkeypatch, shape, normalize, dim, momentum, size):
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = gradients(shape)
    rule = {"rule": "scale", "normalize": normalize, "momentum": momentum}
    m = torch.zeros(shape, dtype=torch.float64)
    for grad, our in zip(grads, taken(rule, shape, grads), strict=True):
        m = momentum * m + (1 - momentum) * grad.double()
        expected = m / ((m**2).mean(dim, keepdim=True).sqrt() + 1e-8)
        torch.testing.assert_close(our, expected, rtol=2e-5, atol=1e-6)


@BLOCKS
@pytest.mark.parametrize("shape", [(20, 300), (3, 40, 64), (70, 70)], ids=str)
def test_adamw8bit_is_adamw_but_for_its_moments_rounding(monkeypatch, shape, size):
    """Its first step is AdamW's to the last bit: the moments of a step are rounded after it was taken."""
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", size)
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    ours, exact = (taken(rule, shape, grads) for rule in (RULES["adamw8bit"], {}))
    assert torch.equal(ours[0], exact[0])
    difference = (sum(ours) - sum(exact)).norm() / sum(exact).norm()
    assert 1e-4 < difference < 0.1
    again = taken(RULES["adamw8bit"], shape, grads)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "no generator has a part in it"


def test_blocks_do_not_change_a_bit_of_8_bit_moments(monkeypatch):
    grads = [torch.randn(20, 300, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    whole = taken(RULES["adamw8bit"], (20, 300), grads)
    monkeypatch.setattr(blocks_module, "CPU_BLOCK", 700)
    assert all(torch.equal(a, b) for a, b in zip(whole, taken(RULES["adamw8bit"], (20, 300), grads), strict=True))


def test_a_convolution_is_a_matrix_to_every_rule():
    grads = gradients((60, 8, 9))
    for rule in RULES.values():
        conv = taken({**rule, "view": "conv"}, (60, 8, 9), grads)
        flat = taken(rule, (60, 72), [g.flatten(1) for g in grads])
        for a, b in zip(conv, flat, strict=True):
            assert torch.equal(a.flatten(1), b)


def spread_out(draw: torch.Generator) -> Tensor:
    value = torch.randn(40, 700, generator=draw) * 10 ** (torch.rand(40, 700, generator=draw) * -3 - 10)
    value[:, 5] = 0.0
    return value


def read_back(value: Tensor, encode, decode, draws: int = 200) -> Tensor:
    """(draws, .., n): ``value`` kept, in the dtypes of the state, and read, with other noise each time."""
    all_codings = [coding for codec in codecs.CODECS.values() for coding in codec.coding.values()]
    coding = next(coding for coding in all_codings if coding.encode is encode)
    dtypes = coding.codes, coding.scale

    def kept(noise: Tensor) -> Tensor:
        exact = encode(value, noise, 4)
        stored = [t.to(dtype) for t, dtype in zip(exact, dtypes, strict=True)]
        assert all(torch.equal(t.float(), whole) for t, whole in zip(stored, exact, strict=True))
        return decode(*stored)

    index = torch.arange(value.numel()).view(value.shape)
    return torch.stack([kept(uniform(index, (i, 7))) for i in range(draws)]).double()


def test_an_8_bit_mean_is_fine_where_it_is_small():
    value = spread_out(torch.Generator().manual_seed(0))
    read = read_back(value, codecs.encode_mean, codecs.decode_mean)
    largest = torch.stack([group.abs().amax(-1) for group in value.split(175, -1)], -1)
    largest = largest.repeat_interleave(175, -1)
    step = largest * (2 * (value.abs() / largest).sqrt() * 127 + 1) / 127**2  # from a code to the next
    assert ((read - value).abs() <= 1.01 * step).all()
    assert (read[..., 5] == 0).all()
    bias = (read.mean(0) - value) / step
    assert bias.abs().max() < 6 * 0.5 / math.sqrt(len(read))
    assert abs(bias.mean()) < 0.01


def test_a_4_bit_mean_is_read_by_the_scale_that_is_stored():
    """A scale of two bytes: rounded up, so that the largest entry has a code and no mean is moved."""
    value = spread_out(torch.Generator().manual_seed(0))[:, :600]
    _, scale = codecs.encode_mean4(value, torch.zeros(40, 600), 4)
    assert torch.equal(scale.bfloat16().float(), scale)
    read = read_back(value, codecs.encode_mean4, codecs.decode_mean4)
    step = scale.repeat_interleave(150, -1) / 7
    assert ((read - value).abs() <= 1.01 * step).all()
    assert (read[..., 5] == 0).all()
    largest = torch.stack([group.abs().amax(-1) for group in value.split(150, -1)], -1)
    assert (scale >= largest).all()
    assert (scale <= largest * (1 + 2**-7)).all()
    bias = (read.mean(0) - value) / step
    assert bias.abs().max() < 6 * 0.5 / math.sqrt(len(read))
    assert abs(bias.mean()) < 0.01
    empty = codecs.encode_mean4(torch.zeros(3, 64), torch.rand(3, 64), 1)
    assert not codecs.decode_mean4(empty[0].to(torch.uint8), empty[1].bfloat16()).any()


def test_an_8_bit_square_survives_beside_a_large_one():
    """Small ones are kept, the mean of the rounding is the number, and what is on the grid stays where it is."""
    value = spread_out(torch.Generator().manual_seed(0)).abs()
    _, unit = codecs.encode_square(value, torch.zeros(value.shape), 4)
    assert unit.shape == (40, 4)
    read = read_back(value, codecs.encode_square, codecs.decode_square)
    in_range = value > value.max() * 2.0**-15
    assert in_range.double().mean() > 0.8
    assert ((read - value).abs() <= value / 16)[:, in_range].all()
    assert (read[..., 5] == 0).all()
    assert (read > 0)[:, value > 0].all(), "a small square does not become 0"
    bias = (read.mean(0) - value)[in_range] / value[in_range]
    assert bias.abs().max() < 6 * 0.03 / math.sqrt(len(read))
    assert abs(bias.mean()) < 1e-3

    grid = read[0].float()
    grid[:, 0] = 4 * grid.max()  # another largest entry moves no other number
    again = read_back(grid, codecs.encode_square, codecs.decode_square, draws=3)
    stays = grid > grid.max() * 2.0**-14
    assert stays[:, 1:175].any()
    assert (again == grid)[:, stays].all()


def test_groups_divide_a_row():
    for columns, groups in [(4096, 16), (300, 2), (64, 1), (5461, 43), (700, 4), (31, 0), (257, 0)]:
        assert codecs.EIGHT_BITS.groups(columns) == groups


def test_8_bit_second_moments_decay():
    """By 0.1 % a step, a fortieth of a code's width: rounding to nearest would hold them for ever."""
    p = nn.Parameter(torch.zeros(64, 256))
    optimizer = AdamW([{"params": [p], "state_dtype": "8bit"}], lr=0.0, stochastic_rounding=False)
    for step in range(301):
        p.grad = torch.full_like(p, 0.0 if step else 1.0)
        optimizer.step()
    state = optimizer.state[p]
    v = codecs.decode_square(state["exp_avg_sq"], state["exp_avg_sq_scale"])
    assert v.mean().item() == pytest.approx(1e-3 * 0.999**300, rel=0.02)


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        pytest.param(  # the other rules are compiled by the contract suite, too
            rule, dtype, id=f"{name}-{str(dtype)[6:]}", marks=[pytest.mark.slow] * ((i + j) % 2 or i > 1)
        )
        for i, (name, rule) in enumerate(RULES.items())
        for j, dtype in enumerate((torch.bfloat16, torch.float32))
    ],
)
def test_compiled_is_eager(rule, dtype):
    """As in the contract suite: numbers within 1e-6, bf16 at most one ulp apart, 8-bit codes at most one step."""
    torch.manual_seed(0)
    start = torch.randn(40, 300).to(dtype)
    ours, twin = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    eager, fast = (AdamW([{"params": [p], **rule}], lr=1e-2, compile=c) for p, c in ((ours, False), (twin, True)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Skipping serialization")  # torch 2.6 of its own cache
        for _ in range(2):
            ours.grad = torch.randn(start.shape).to(dtype)
            twin.grad = ours.grad.clone()
            twin.data.copy_(ours.data)
            for key, value in eager.state[ours].items() if eager.state[ours] and fast.state[twin] else ():
                if isinstance(value, Tensor):
                    fast.state[twin][key].copy_(value)
            eager.step()
            fast.step()
    assert len(fast.graphs) == 1
    for key, value in eager.state[ours].items():
        if isinstance(value, Tensor):
            other = fast.state[twin][key]
            if value.is_floating_point():
                torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7)
            else:
                differ = value.int() != other.int()
                assert differ.float().mean() <= 1e-3
                assert (value.int() - other.int()).abs().max() <= 1
    if dtype is torch.bfloat16:
        assert (ours != twin).float().mean() <= 1e-3
        assert (ours.view(torch.int16).int() - twin.view(torch.int16).int()).abs().max() <= 1
    else:
        torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-6)


# --- what is said and what is refused ---


def test_groups_say_what_they_follow():
    model = Model()
    groups = {g["name"]: g for g in param_groups(model, rank=4, targets="mlp", rest="scale", rest_lr=3e-3)}
    assert (groups["embedding"]["normalize"], groups["embedding"].get("momentum")) == ("columns", None)
    assert (groups["head"]["normalize"], groups["head"]["momentum"]) == ("rows", 0.9)
    assert "rule" not in groups["matrices"], "the optimizer's own"
    assert all(g["rule"] == "adamw" for name, g in groups.items() if name.startswith("norms"))
    assert groups["embedding"]["lr"] == groups["norms"]["lr"] == 3e-3
    groups = {g["name"]: g for g in param_groups(model, rank=4, targets="mlp", rest="apollo", scale=2.0)}
    assert groups["head"]["rank"] == 4
    assert groups["head"]["scale"] == 2.0
    groups = {g["name"]: g for g in param_groups(model, rank=4, targets="mlp", rest="apollo", rest_rank=1)}
    assert (groups["head"]["rank"], groups["matrices"]["rank"]) == (1, 4)
    assert {g.get("rule") for g in param_groups(model, rank=4, targets="mlp")} == {None, "adamw"}
    optimizer = Apollo(param_groups(model, rank=4, targets="mlp", rest="apollo", rest_rank=1))
    run(model, optimizer, [0])
    assert optimizer.state[model.lm_head.weight]["exp_avg"].shape == (300, 1)


def test_knobs_of_the_rules_that_are_asked_for_may_be_said():
    """In code and in a run file; they go to the groups of these rules alone."""
    asked = {"embedding": "slimadam", "head": "adam-mini8bit", "averaged": False, "state_dtype": "4bit"}
    optimizer = build_optimizer("muon", Model(), targets="mlp", **asked)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["rule"] for name, group in groups.items()} == {
        "matrices": "muon", "embedding": "slimadam", "head": "adam-mini", "norms": "adamw",
        "others": "adamw",
    }  # fmt: skip
    assert [name for name, group in groups.items() if "averaged" in group] == ["embedding"]
    assert groups["head"]["state_dtype"] == "8bit"
    check_optimizer(OptimConfig.of(name="muon", **asked))
    with pytest.raises(InputError, match="It is a key of slimadam"):
        check_optimizer(OptimConfig.of(name="muon", averaged=False))


@pytest.mark.parametrize(
    ("name", "method", "stored"),
    [
        ("full", "muon-8bit", ["8bit", "8bit", "8bit"]),
        ("lite", "muon-4bit-slim", ["4bit", "4bit", "8bit"]),
        ("nano", "muon-stateless-slim", ["float32", "float32", "8bit"]),
    ],
)
def test_a_recipe_is_what_was_raced(name, method, stored):
    """Group by group: the race's methods say it in keys of the run file."""
    keys = {key.removeprefix("optim."): value for key, value in METHODS[method].keys.items()}
    recipe, raced = (build_optimizer(*of, targets="mlp", **knobs) for *of, knobs in (
        (name, Model(), {"lr": 1e-3}), (keys.pop("name"), Model(), {"lr": 1e-3, **keys}),
    ))  # fmt: skip
    ours, theirs = ([{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in (recipe, raced))
    assert ours == theirs
    assert [g["state_dtype"] for g in ours if g["name"] in ("matrices", "embedding", "head")] == stored


@pytest.mark.parametrize("name", ["full", "lite", "nano"])
def test_a_recipe_is_for_a_model_whose_head_is_tied(name):
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(17, 300), "mlp": nn.Linear(300, 40), "lm_head": nn.Linear(300, 17)}
    )
    model.lm_head.weight = model.embedding.weight
    groups = {group["name"]: group["rule"] for group in build_optimizer(name, model, targets="mlp").param_groups}
    assert groups == {"matrices": "muon", "embedding": "adamw" if name == "full" else "slimadam", "norms": "adamw"}


def test_a_recipes_embedding_may_be_another_and_its_rest_is_said_already():
    """Its own knob `averaged` goes with the rule that it was of."""

    def rules(name, **asked):
        return {g["name"]: g["rule"] for g in build_optimizer(name, Model(), targets="mlp", **asked).param_groups}

    assert rules("nano", embedding="adamw")["embedding"] == rules("lite", embedding="adamw8bit")["embedding"] == "adamw"
    assert rules("lite", head="scale")["head"] == "scale"
    assert rules("nano+adafactor") == rules("muon+adafactor")
    with pytest.raises(InputError, match="'nano' says what embedding and head use: leave rest='adamw' out"):
        build_optimizer("nano", Model(), targets="mlp", rest="adamw")


def test_what_would_change_nothing_is_refused():
    for knobs in ({"momentum": 0.9}, {"nesterov": False}):
        with pytest.raises(InputError, match=r"'nano' is stateless: .* would change nothing. Leave it out, or ask"):
            build_optimizer("nano", Model(), targets="mlp", **knobs)
    with pytest.raises(InputError, match=r"stateless: momentum=0.9"):
        build_optimizer("muon", Model(), targets="mlp", stateless=True, momentum=0.9)
    group = build_optimizer("nano", Model(), targets="mlp", stateless=False, momentum=0.9).param_groups[0]
    assert group["momentum"] == 0.9


def test_a_rule_for_a_group_that_the_model_lacks_is_refused():
    model = Model()
    model.lm_head.weight = model.embedding.weight
    with pytest.raises(InputError, match=r"head='adamw': this model has no such group. A head tied to"):
        build_optimizer("nano", model, targets="mlp", head="adamw")
    bare = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InputError, match=r"embedding='adamw': this model has no such group. No nn.Embedding"):
        build_optimizer("muon", bare, targets="0", embedding="adamw")


@pytest.mark.parametrize("name", ["muon", "full", "nano"])
def test_a_scheduler_that_cycles_the_momentum_of_one_rule_can_be_resumed(name):
    """torch's OneCycleLR writes `momentum` into every group, of a rule that has none, too."""
    model = Model()
    optimizer, other = (build_optimizer(name, model, targets="mlp") for _ in range(2))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=4)
    set_gradients(model, 1)
    optimizer.step()
    schedule.step()
    other.load_state_dict(optimizer.state_dict())
    groups = {group["name"]: group for group in other.param_groups}
    assert groups["matrices"]["momentum"] == optimizer.param_groups[0]["momentum"] != 0.95
    assert "momentum" not in groups["norms"]


def test_what_is_kept_does_not_change_in_the_middle():
    model = Model()
    optimizer = build_optimizer("nano", model, targets="mlp")
    run(model, optimizer, [1, 2])
    optimizer.param_groups[0]["stateless"] = False
    with pytest.raises(InputError, match="of group 'matrices' has no exp_avg: a key of the group that decides"):
        optimizer.step()


def test_small_matrices_keep_fp32_moments():
    model = nn.ModuleDict({"small": nn.Linear(64, 8), "prime": nn.Linear(257, 64), "embedding": nn.Embedding(100, 64)})
    optimizer = build_optimizer("adamw", model, targets="embedding", exclude="small.weight", rest="adamw8bit")
    table = describe(optimizer)
    assert table.count("float32 (does not fit 8bit)") == 2, table
    assert re.search("embedding +AdamW +8bit", table)


def test_refusals():
    model, w = Model(), nn.Parameter(torch.ones(20, 10))
    owners = ", ".join(rule.name for rule in REGISTRY.values() if "momentum" in rule.knobs())
    for call, message in [
        (lambda: build_optimizer("apollo", model, targets="mlp", rest="adam"), "no rule is called 'adam'"),
        (lambda: build_optimizer("adamw", model, targets="mlp", rest="apollo"), "has no rank"),
        (lambda: build_optimizer("apollo", model, targets="mlp", rest_rank=2), "which has no rank"),
        (lambda: build_optimizer("apollo", model, targets="mlp", rest="apollo", rest_rank=0), "rank=0"),
        (lambda: build_optimizer("apollo", model, targets="mlp", momentum=0.5), "this optimizer uses 'apollo'"),
        (lambda: param_groups(model, rank=None, targets="mlp", rest="apollo"), "name a rank"),
        (lambda: AdamW([{"params": [w], "rule": "apollo"}]), "needs rank"),
        (lambda: AdamW([{"params": [w], "rule": "adamv"}]), "no rule is called 'adamv'. Did you mean 'adamw'?"),
        (lambda: AdamW([{"params": [w], "rule": "scale", "normalize": "row"}]), "normalize='row'"),
        (lambda: AdamW([{"params": [w], "rule": "scale", "momentum": 1.0}]), "momentum=1.0"),
        (
            lambda: AdamW([{"params": [w], "momentum": 0.5}]),
            f"It is a key of {owners}; this group uses 'adamw'",
        ),
        (lambda: AdamW([w], momentum=0.5), "It is a key of scale"),
        (lambda: Apollo([{"params": [w], "rank": 2, "rest": "scale"}]), "unknown key 'rest'"),
        (lambda: RuleOptimizer([{"params": [w]}]), "names no rule"),
    ]:
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value)
