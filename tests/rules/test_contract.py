"""What every registered optimizer must do. To register is to be tested here."""

import copy
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from registered import (
    NAMES,
    Model,
    assert_same,
    bare,
    both_dtypes,
    by_matrix,
    decomposes,
    every_optimizer,
    flat_state,
    has,
    limits,
    make,
    make_model,
    rank_of,
    reloaded,
    rule_named,
    run,
    set_gradients,
    snapshot,
)
from torch import Tensor, nn

import apollo_optim
from apollo_optim import AdamW, Apollo, InputError, RuleOptimizer, describe
from apollo_optim.optim.apply import Inputs
from apollo_optim.optim.compiled import as_tensors, is_compiled
from apollo_optim.optim.describe import state_bytes
from apollo_optim.optim.parameter import chosen_rule, static_of


@every_optimizer
@both_dtypes
def test_steps_every_parameter_and_keeps_its_dtype(name, dtype):
    model = make_model(dtype)
    before, optimizer = snapshot(model), make(name, model)
    run(model, optimizer, range(4))
    for key, p in model.named_parameters():
        assert p.dtype is dtype
        assert p.isfinite().all()
        assert not torch.equal(p, before[key]), key


@every_optimizer
def test_lowers_a_loss(name):
    """A least-squares problem: the loss falls, and rises with maximize."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 12), torch.randn(64, 16) @ torch.randn(16, 24) / 4
    for sign in (1, -1):
        model = nn.Sequential()
        model.mlp = nn.Linear(12, 24)
        # A momentum that moves into another random subspace gets noise each time: that has to be rare.
        gap = {"update_proj_gap": 20} if has(name, "rank") and has(name, "momentum") else {}
        optimizer = make(name, model, lr=5e-3 if "mini" in name else 2e-2, **gap)
        for group in optimizer.param_groups:
            group["maximize"] = sign < 0
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model.mlp(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sign * (losses[0] - losses[-1]) > 0.05 * losses[0], losses


@every_optimizer
def test_state_is_complete_at_the_first_step_and_plain(name):
    model = make_model()
    optimizer = make(name, model)
    assert not optimizer.state, "state is lazy"
    run(model, optimizer, [0])
    first = flat_state(optimizer)
    for value in first.values():
        assert type(value) in (Tensor, int)
    run(model, optimizer, range(1, 5))
    later = flat_state(optimizer)
    assert {k: getattr(v, "shape", None) for k, v in first.items()} == {
        k: getattr(v, "shape", None) for k, v in later.items()
    }
    slots = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            static = static_of(p, group, chosen_rule(p, group))
            slots |= set(dict(static.slots))
    keys = {key for _, key in first}
    assert keys == {"step", "seed", "skipped"} | slots
    assert ("basis" in keys) == decomposes(name), "a random projection is never state"


@every_optimizer
@pytest.mark.parametrize(("dtype", "state_dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_resumes_bitwise_through_a_weights_only_file(name, dtype, state_dtype):
    model = make_model(dtype)
    optimizer = make(name, model, state_dtype=state_dtype)
    run(model, optimizer, range(5))
    again = make_model(dtype)
    resumed = make(name, again, state_dtype=state_dtype)
    reloaded(model, optimizer, again, resumed)
    run(model, optimizer, range(5, 12))
    run(again, resumed, range(5, 12))
    assert_same(snapshot(model), snapshot(again))
    assert_same(flat_state(optimizer), flat_state(resumed))


@every_optimizer
@pytest.mark.parametrize("before", ["a load", "an empty load", "deepcopy", "pickle"])
def test_loads_again(name, before):
    """accelerate's ``prepare`` loads an optimizer's own, empty state before anybody loads the saved one."""
    model = make_model()
    optimizer = make(name, model)
    run(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    if before == "a load":
        optimizer.load_state_dict(saved)
    elif before == "an empty load":
        optimizer = make(name, model)
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer = copy.deepcopy(optimizer) if before == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    optimizer.load_state_dict(saved)
    again = optimizer.state_dict()
    assert_same(
        {(i, key): value for i, state in saved["state"].items() for key, value in state.items()}, flat_state(optimizer)
    )
    for ours, theirs in zip(again["param_groups"], saved["param_groups"], strict=True):
        assert {key: ours[key] for key in theirs} == theirs


@every_optimizer
@pytest.mark.parametrize(
    ("dtype", "default"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.float64)],
)
def test_the_default_dtype_changes_nothing(name, dtype, default):
    """A step counter of bfloat16 stood still at 256."""
    model, twin = make_model(dtype), make_model(dtype)
    knobs = {"keep_proj": True} if has(name, "keep_proj") else {}
    optimizer, other = make(name, model, **knobs), make(name, twin, **knobs)
    run(model, optimizer, range(4))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for step in range(4):
            draw = torch.Generator().manual_seed(step)
            for p in twin.parameters():
                p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float32).to(p.dtype)
            other.step()
    finally:
        torch.set_default_dtype(before)
    assert_same(snapshot(model), snapshot(twin))
    assert_same(flat_state(optimizer), flat_state(other))


@every_optimizer
def test_a_seed_survives_another_position(name):
    """A parameter's random numbers are its own: fixed at its first step and saved, not looked up again."""
    a, b = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4))
    optimizer = bare(name, [a, b])
    a.grad, b.grad = torch.randn(6, 4), torch.randn(6, 4)
    optimizer.step()
    seeds = [optimizer.state[p]["seed"] for p in (a, b)]
    assert seeds[0] != seeds[1]
    alone = bare(name, [b])
    saved = optimizer.state_dict()
    saved["state"] = {0: saved["state"][1]}
    saved["param_groups"][0]["params"] = [0]
    alone.load_state_dict(saved)
    alone.step()
    assert alone.state[b]["seed"] == seeds[1]


@every_optimizer
def test_foreign_and_misfitting_states_are_refused_and_change_nothing(name):
    model = make_model()
    optimizer = make(name, model)
    run(model, optimizer, range(2))
    before = flat_state(optimizer)
    other = make_model()
    torchs = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9)
    set_gradients(other, 9, 0.0)
    torchs.step()
    foreign = torchs.state_dict()
    ours = optimizer.state_dict()
    foreign["param_groups"] = copy.deepcopy(ours["param_groups"])
    with pytest.raises(InputError, match="does not fit"):
        optimizer.load_state_dict(foreign)
    with pytest.raises(ValueError, match="param_groups"):
        optimizer.load_state_dict({**ours, "param_groups": torchs.state_dict()["param_groups"]})
    assert_same(before, flat_state(optimizer))


@every_optimizer
@pytest.mark.parametrize(
    ("dtype", "zeros"),
    [(torch.float32, [0]), (torch.bfloat16, [0, 1, 2, 3, 4]), (torch.bfloat16, [6]), (torch.float32, [6, 7])],
)
def test_a_zero_gradient_is_harmless(name, dtype, zeros):
    """At the start, for the first five steps, in mid-run: nothing freezes, and the limit still holds after it."""
    model = make_model(dtype)
    optimizer = make(name, model, weight_decay=0.0)
    growth = []
    for step in range(12):
        before = snapshot(model)
        norms = {i: s["prev_norm"].clone() for i, s in enumerate(optimizer.state.values()) if "prev_norm" in s}
        set_gradients(model, step, 0.0 if step in zeros else 1.0)
        optimizer.step()
        moved = [not torch.equal(p, before[key]) for key, p in model.named_parameters() if p.ndim > 1]
        assert all(p.isfinite().all() for p in model.parameters())
        if step not in zeros:
            assert all(moved), f"frozen at step {step}"
        for i, state in enumerate(optimizer.state.values()):
            if "prev_norm" in state and i in norms:
                had, has = norms[i], state["prev_norm"]
                if step in zeros:
                    assert torch.equal(had, has), "a step of norm zero is not remembered"
                growth.append((has[had > 0] / had[had > 0]).flatten())
    assert bool(growth) == limits(name)
    if growth:
        assert torch.cat(growth).max() <= 1.01 + 1e-5
        if max(zeros) < 5:  # the limit was never lost: it is there at every later step
            assert all((s["prev_norm"] > 0).all() for s in optimizer.state.values() if "prev_norm" in s)


@every_optimizer
@pytest.mark.parametrize(
    ("dtype", "bad", "value"),
    [
        (torch.float32, 0, math.inf),
        (torch.bfloat16, 0, math.nan),
        (torch.bfloat16, 3, math.inf),
        (torch.float32, 3, math.nan),
    ],
)
def test_a_non_finite_gradient_changes_nothing_but_the_count(name, dtype, bad, value):
    model, twin = make_model(dtype), make_model(dtype)
    optimizer, other = make(name, model), make(name, twin)
    for step in range(6):
        set_gradients(model, step)
        set_gradients(twin, step)
        if step == bad:
            for p in model.parameters():
                p.grad.view(-1)[0] = value  # one bad entry: in a stack, of the first expert only
            weights = snapshot(model)
            states = flat_state(optimizer)
        optimizer.step()
        if step != bad:
            other.step()
            continue
        for key, p in model.named_parameters():
            if "experts" in key and by_matrix(name):
                assert torch.equal(p[0], weights[key][0])
                assert not torch.equal(p[1], weights[key][1]), "the healthy experts go on"
                continue
            assert torch.equal(p, weights[key]), key
            state = optimizer.state[p]
            assert state["skipped"].sum() == 1
            assert state["step"] == step + 1
        in_order = [p for group in optimizer.param_groups for p in group["params"]]
        for (i, key), had in states.items():
            if key not in ("step", "seed", "skipped"):
                stack = in_order[i].shape == model.mlp.experts.shape and by_matrix(name)
                has = optimizer.state_dict()["state"][i][key]
                assert torch.equal(has[0], had[0]) if stack else torch.equal(has, had), key
    assert all(p.isfinite().all() for p in model.parameters())


@every_optimizer
def test_no_value_is_read_back_by_the_host(name, monkeypatch):
    """No ``.item()``, ``bool()`` or ``float()`` on anything but the CPU step counter: the meta device has no values."""
    with torch.device("meta"):
        model = Model()
    optimizer = make(name, model)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    if decomposes(name):
        pytest.skip("a singular value decomposition waits for its device by nature, once a refresh")
    optimizer.step()


@every_optimizer
def test_missing_gradients_closures_hooks_and_schedules(name):
    model = make_model()
    optimizer = make(name, model)
    before, calls = snapshot(model), []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        set_gradients(model, 0)
        model.mlp.wide.weight.grad = None
        return torch.tensor(4.0)

    assert optimizer.step(closure) == 4.0
    assert calls == ["pre", "post"]
    assert torch.equal(model.mlp.wide.weight, before["mlp.wide.weight"]), "no gradient, no step"
    scheduler.step()  # to lr 0: obeyed, so nothing moves
    held = snapshot(model)
    run(model, optimizer, [1])
    assert_same(held, snapshot(model))


@every_optimizer
def test_groups_added_and_parameters_unfrozen_in_mid_run(name):
    model = make_model()
    for p in model.mlp.parameters():
        p.requires_grad_(False)
    optimizer = make(name, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    extra = nn.Parameter(torch.ones(6, 4))
    optimizer.add_param_group({"params": [extra], "lr": 1e-2, **rank_of(name, 1)})
    for p in model.parameters():
        p.requires_grad_(True)
    run(model, optimizer, range(2))
    extra.grad = torch.randn(6, 4)
    before = extra.detach().clone()
    optimizer.step()
    assert not torch.equal(extra, before)
    assert len({state["seed"] for state in optimizer.state.values()}) == len(optimizer.state), "each has its own seed"
    with pytest.raises(InputError, match="rnak"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "rnak": 4})


@every_optimizer
def test_parameters_swapped_before_the_first_step(name):
    """accelerate builds the optimizer, then swaps the parameters in its groups."""
    model = make_model()
    optimizer = make(name, model)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)


@every_optimizer
def test_planned_bytes_are_the_real_bytes(name):
    model = make_model()
    optimizer = make(name, model)
    planned = sum(state_bytes(p, group) for group in optimizer.param_groups for p in group["params"])
    run(model, optimizer, [0])
    real = sum(
        t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)
    )
    assert planned == real
    assert f"{planned:,}" in describe(optimizer)


@every_optimizer
def test_deepcopy_and_lr_tensor(name):
    model = make_model()
    optimizer = make(name, model)
    run(model, optimizer, range(2))
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    for group in optimizer2.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    for i in range(2, 4):
        run(model, optimizer, [i])
        run(model2, optimizer2, [i])
    for a, b in zip(model.parameters(), model2.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def compiled_cases() -> list:
    """The first rule of each kind wide in bf16, AdamW tall in fp32, a stack; others are slow: 10 s a graph.

    Of a kind: what they see, whether they draw, whether they multiply in a precision.
    """
    tall, wide, stack, vector = (96, 40), (40, 96), (3, 24, 40), (50,)
    cases = [pytest.param("apollo-mini", torch.bfloat16, [stack], id="bf16-stack-apollo-mini")]
    kinds = set()
    for name in sorted({rule_named(name): name for name in reversed(NAMES)}.values(), key=NAMES.index):
        rule = rule_named(name)(**rank_of(name, 8))
        kind = rule.view, bool(rule.draws(1)), has(name, "precision")
        seldom = rule.phase(1) != rule.phase(2) or kind in kinds
        kinds.add(kind)
        for dtype, one, other in ((torch.float32, tall, wide), (torch.bfloat16, wide, tall)):
            of, late = f"{'fp32' if dtype is torch.float32 else 'bf16'}-{name}", [pytest.mark.slow]
            first = late if seldom or (dtype is torch.float32 and name != "adamw") else []
            cases += [
                pytest.param(name, dtype, [one], id=of, marks=first),
                pytest.param(name, dtype, [other, stack, vector], id=f"{of}-others", marks=late),
            ]
    return cases


@pytest.mark.parametrize(("name", "dtype", "shapes"), compiled_cases())
def test_compiled_is_eager(name, dtype, shapes):
    """One step: state within 1e-6 relative; bf16 weights at most one ulp apart, in at most 0.1 % of the entries.

    5e-6 of state that comes out of Newton-Schulz products, which magnify a last bit of what goes in.

    And a schedule over twenty steps recompiles nothing. (Once for each rule: low-bit weights compile in test_quant.py.)
    """
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
    twins = [nn.Parameter(p.detach().clone()) for p in ours]
    eager, fast = bare(name, ours, 8, compile=False), bare(name, twins, 8, compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "torch.compile does not work": then this test would test nothing
        apollo_optim.core.compile.can_compile("cpu")
    for step in range(3):
        for p, q in zip(ours, twins, strict=True):
            p.grad = torch.randn(p.shape).to(dtype)
            q.grad = p.grad.clone()
            q.data.copy_(p.data)
            for key, value in eager.state[p].items() if step else ():
                if isinstance(value, Tensor):
                    fast.state[q][key].copy_(value)
        eager.step()
        fast.step()
        for p, q in zip(ours, twins, strict=True):
            for key, a in eager.state[p].items():
                if isinstance(a, Tensor) and a.is_floating_point():
                    apart = 5e-6 if has(name, "precision") and key != "exp_avg" else 1e-6
                    assert (a - fast.state[q][key]).norm() <= apart * a.norm(), (key, step)
            if dtype is torch.bfloat16:
                differ = p != q
                assert differ.float().mean() <= 1e-3
                ulps = (p.view(torch.int16).int() - q.view(torch.int16).int()).abs()
                assert ulps.max() <= 1
            else:
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    graphs = len(fast.graphs)
    counters = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(3, 20):
        fast.param_groups[0]["lr"] = 1e-2 * math.cos(step) ** 2
        for q in twins:
            q.grad = torch.randn(q.shape).to(dtype)
        fast.step()
    phases = {chosen_rule(q, fast.param_groups[0]).phase(step) for q in twins for step in range(1, 4)}
    assert len(fast.graphs) <= graphs + (len(phases) - 1) * len(shapes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counters


def test_no_compiler_gives_one_warning_and_the_eager_path(monkeypatch):
    from apollo_optim.core import compile as compile_module

    compile_module.can_compile.cache_clear()

    def broken(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = Apollo([p], rank=2, compile=True)
    p.grad = torch.randn(6, 4)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    compile_module.can_compile.cache_clear()


def test_what_is_large_is_compiled_by_default(monkeypatch):
    monkeypatch.setattr("apollo_optim.optim.compiled.COMPILED_FROM", 24)
    small, large = nn.Parameter(torch.ones(6, 3)), nn.Parameter(torch.ones(6, 4))
    small.grad, large.grad = torch.randn(6, 3), torch.randn(6, 4)
    graphs = {}
    for compile in (None, False, True):
        optimizer = Apollo([small, large], rank=2, compile=compile)
        optimizer.step()
        graphs[compile] = len(optimizer.graphs)
        assert is_compiled(compile, large, "cuda") is (compile is not False)
        assert is_compiled(compile, large, "mps") is bool(compile)
    assert graphs == {None: 1, False: 0, True: 2}


def test_numbers_that_are_gone_leave_nothing_to_those_that_get_their_id():
    """Parameters of a group at different steps (experts without a gradient): their numbers come and go one by one."""
    memo = {}
    for lr in range(20):
        made = as_tensors(Inputs({"lr": float(lr)}, {}), torch.device("cpu"), memo)
        assert made[0].tolist() == [lr]


def test_stochastic_rounding_of_state_can_be_switched_off_in_mid_run():
    """Of an fp32 weight with bf16 state, too: what is rounded is looked up anew when a group changes."""
    p = nn.Parameter(torch.ones(8, 4))
    optimizer = AdamW([p], state_dtype="bfloat16", betas=(0.9, 0.9), compile=False)
    for rounding in (True, False):
        optimizer.param_groups[0]["stochastic_rounding"] = rounding
        p.grad = torch.full_like(p, 0.3)
        optimizer.step()
        assert (optimizer.state[p]["exp_avg"].unique().numel() > 1) or not rounding
        if rounding:
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][name].zero_()
    assert optimizer.state[p]["exp_avg"].unique().numel() == 1


def test_refusals_name_the_key_and_the_nearest():
    w = nn.Parameter(torch.ones(6, 4))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"rank": 2, "rnak": 4}, "unknown key 'rnak'. Did you mean 'rank'"),
        ({"rank": 0}, "rank=0, but it must be a whole number >= 1"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"rank": 2, "scale": -1}, "scale=-1"),
        ({"rank": 2, "scale_type": "row"}, "scale_type='row'"),
        ({"rank": 2, "proj": "gausian"}, "proj='gausian'"),
        ({"rank": 2, "proj_type": "left"}, "always the smaller one"),
        ({"rank": 2, "norm_growth": 0.5}, "norm_growth=0.5"),
        ({"rank": 2, "betas": (0.9, 1.0)}, "betas="),
        ({"rank": 2, "update_proj_gap": 0}, "update_proj_gap=0"),
        ({"rank": 2, "lr": -1.0}, "lr=-1.0"),
        ({"rank": 2, "state_dtype": torch.float16}, "state_dtype="),
        ({"rank": 2, "stochastic_rounding": "yes"}, "stochastic_rounding='yes'"),
        ({"rank": 2, "view": "row"}, "view='row'"),
        ({"rank": 2, "seed": "x"}, "seed='x'"),
    ]
    for bad, message in refused:
        with pytest.raises(InputError) as error:
            Apollo([{"params": [w], **bad}])
        assert message in str(error.value)
        with pytest.raises(InputError, match=next(reversed(bad))):
            Apollo([w], **bad)
    with pytest.raises(InputError, match="param_groups"):
        Apollo([w])
    with pytest.raises(TypeError, match="ordered"):
        Apollo([{"params": {w}, "rank": 2}])
    mini = apollo_optim.ApolloMini
    projections = [(Apollo, "random", "gaussian"), (Apollo, None, "sketch"), (mini, None, "gaussian")]
    for cls, asked, expected in projections:
        (group,) = cls([w], rank=1, **({"proj": asked} if asked else {})).param_groups
        assert group["proj"] == expected
    with pytest.raises(InputError, match="unknown key 'rank'"):
        AdamW([{"params": [w], "rank": 4}])
    flat = nn.Parameter(torch.ones(24))
    flat._fsdp_flattened = True
    for cls in (Apollo, AdamW):
        with pytest.raises(InputError, match="fully_shard"):
            cls([{"params": [flat]} | ({"rank": 2} if cls is Apollo else {})])
    with pytest.raises(InputError, match="float64; steps compute in float32"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(InputError, match="complex"):
        AdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize("again", [lambda x: x, copy.deepcopy])
def test_flat_partitions_of_another_engine_are_refused(again):
    """DeepSpeed and FSDP1 put flat tensors in the place of a group's matrices: no rule for matrices sees any."""
    matrices = [nn.Parameter(torch.ones(8, 4)) for _ in range(2)]

    def flattened(rule: str, params: list[nn.Parameter]) -> RuleOptimizer:
        optimizer = again(RuleOptimizer([{"params": params}], rule, **({"rank": 2} if rule == "apollo" else {})))
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
        flat.grad = torch.ones_like(flat)
        optimizer.param_groups[0]["params"] = [flat]
        return optimizer

    for rule in ("apollo", "muon"):
        optimizer = flattened(rule, matrices)
        with pytest.raises(InputError, match=r"flat parameters .* took the place of the matrices .*fully_shard"):
            optimizer.step()
        assert not any(optimizer.state.values())
    flattened("adamw", matrices).step()  # entry by entry: a partition is as good as a matrix
    flattened("muon", [nn.Parameter(torch.ones(4))]).step()  # a vector it was from the beginning


def test_keys_of_others_pass():
    """Groups of one optimizer can be given to another after a scheduler has written to them."""
    model = nn.Linear(8, 16)
    optimizer = Apollo(model.parameters(), rank=1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
    again = Apollo([dict(group) for group in optimizer.param_groups])
    assert again.param_groups[0]["max_lr"] == 0.02
    Apollo([{"params": [nn.Parameter(torch.ones(6, 4))], "rank": np.int64(2), "scale": np.float32(2), "lr_scale": 0.5}])


@pytest.mark.parametrize("cls", [AdamW, Apollo])
def test_a_step_compiled_by_the_user_steps(cls):
    """Eagerly, after a break of the graph: the numbers of the step itself."""
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        p = nn.Parameter(torch.ones(16, 8))
        optimizer = cls([p], **({"rank": 2} if cls is Apollo else {}))
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for seed in range(3):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_groups_written_for_apollo_torch_work_unchanged():
    w, rest = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(8, 4))
    group = {"rank": 2, "proj": "random", "scale_type": "channel", "scale": 1, "update_proj_gap": 200}
    optimizer = Apollo([{"params": [rest]}, {"params": [w], **group, "proj_type": "std"}], lr=1e-2)
    w.grad, rest.grad = torch.randn(8, 4), torch.randn(8, 4)
    optimizer.step()
    assert optimizer.state[w]["exp_avg"].shape == (8, 2)
    assert optimizer.state[rest]["exp_avg"].shape == (8, 4), "a group without a rank uses AdamW"


def test_a_rank_in_the_constructor_applies_only_if_no_group_names_one():
    a, b = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(8, 4))
    for groups, ranks in [
        ([a, b], [2, 2]),
        ([{"params": [a]}, {"params": [b]}], [2, 2]),
        ([{"params": [a], "rank": 3}, {"params": [b]}], [3, None]),
    ]:
        optimizer = Apollo(groups, rank=2)
        got = [group.get("rank") for group in optimizer.param_groups for _ in group["params"]]
        assert got == ranks


def test_a_sparse_gradient_is_refused_before_anything_is_stepped():
    dense, embedding = nn.Parameter(torch.ones(4)), nn.Embedding(6, 4, sparse=True)
    optimizer = AdamW([dense, *embedding.parameters()])
    (embedding(torch.tensor([1, 2])) * dense).sum().backward()
    with pytest.raises(InputError, match=r"sparse=False.*"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(dense, torch.ones(4))
