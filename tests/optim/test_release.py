"""The step inside backward is the optimizer's own step, and one gradient lives at a time."""

import contextlib
import copy
import gc
import io
import math
import warnings
import weakref

import pytest
import torch
from low_bit import prepare
from registered import assert_same, both_dtypes, every_optimizer, flat_state, snapshot
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint
from train_tiny import figures, records, tiny

from apollo_optim import AdamW, Apollo, InputError, RuleOptimizer, build_optimizer, release
from apollo_optim.optim.recipes import find_optimizer
from apollo_optim.train import pretrain as story
from apollo_optim.train import step as steps_of
from apollo_optim.train.failures import TrainingFailed
from apollo_optim.train.pretrain import pretrain
from benchmarks import kill

WIDTH, WORDS = 12, 11


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tall, self.wide = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=False)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("bsc,eck->bsk", x, self.experts) / 3
        return x + self.wide(torch.tanh(self.tall(x))) + mixed


class Model(nn.Module):
    """A language model in miniature: tied or not, its layers recomputed or not."""

    def __init__(self, tied: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.mlp = nn.ModuleList([Layer() for _ in range(3)])
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for layer in self.mlp:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.lm_head(self.norm(x))


def make_model(dtype: torch.dtype = torch.float32, **kinds: bool) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(**kinds).to(dtype)


def make(name: str, model: nn.Module, **knobs) -> RuleOptimizer:
    prepare(name, model)
    own = {"rank": 1 if "mini" in name else 2, "update_proj_gap": 2}
    knobs = {key: own[key] for key in own.keys() & find_optimizer(name).cls.knobs().keys()} | knobs
    return build_optimizer(name, model, targets="mlp", **{"lr": 1e-2, "rest_lr": 3e-3, **knobs})


def loss_of(model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    words = torch.randint(WORDS, (8, 6), generator=torch.Generator().manual_seed(step))[part]
    return nn.functional.cross_entropy(model(words[:, :-1]).flatten(0, 1).float(), words[:, 1:].flatten())


def train(model: nn.Module, optimizer: RuleOptimizer, steps=range(5), **how) -> None:
    """A bare loop, the same with ``release`` and without. A schedule of its own for each group."""
    handle = release(model, optimizer, **how.pop("options", {})) if how.pop("released", False) else None
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda t: 0.9**t] * len(optimizer.param_groups))
    for step in steps:
        how.get("before", lambda step: None)(step)
        loss_of(model, step).backward()
        if handle is not None:
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    if handle is not None:
        handle.remove()


def both(name: str, dtype: torch.dtype = torch.float32, knobs=None, **kinds: bool):
    """Two equal models with their optimizers."""
    models = make_model(dtype, **kinds), make_model(dtype, **kinds)
    return models, tuple(make(name, model, **(knobs or {})) for model in models)


def assert_equal(models, optimizers) -> None:
    assert_same(*map(snapshot, models))
    assert_same(*map(flat_state, optimizers))


@every_optimizer
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "plain"), (torch.bfloat16, "plain"), (torch.float32, "tied"), (torch.bfloat16, "checkpointed")],
)
def test_release_is_step(name, dtype, kind):
    models, optimizers = both(name, dtype, **({} if kind == "plain" else {kind: True}))
    start = snapshot(models[0])
    train(models[0], optimizers[0])
    train(models[1], optimizers[1], released=True)
    assert_equal(models, optimizers)
    assert not any(torch.equal(w, start[key]) for key, w in snapshot(models[1]).items())
    assert {int(state["step"]) for state in optimizers[1].state.values()} == {5}, "one step a backward, tied ones too"


@every_optimizer
def test_accumulation(name):
    """Four micro-batches; in the first one a layer takes part that does not in the last."""
    models, optimizers = both(name)
    for model, optimizer in zip(models, optimizers, strict=True):
        handle = release(model, optimizer) if model is models[1] else None
        layers = list(model.mlp)
        for step in range(3):
            for part in range(4):
                model.mlp = nn.ModuleList(layers[: 3 if part < 3 else 2])
                loss = loss_of(model, step, slice(2 * part, 2 * part + 2)) / 4
                if handle is None or part == 3:
                    loss.backward()
                    continue
                before = snapshot(model)
                with handle.accumulate():
                    loss.backward()
                assert_same(before, snapshot(model))
            if handle is not None:
                assert all(p.grad is None for p in model.parameters())
                assert all(p.grad is not None for p in layers[2].parameters()), "no hook of theirs ran"
            optimizer.step()
            if handle is None:
                optimizer.zero_grad()
            model.mlp = nn.ModuleList(layers)
            assert handle is None or all(p.grad is None for p in model.parameters())
    assert_equal(models, optimizers)


@every_optimizer
def test_gradients_are_kept_until_the_caller_says_that_they_are_complete(name):
    """As in loops of others, which know the last micro-batch themselves: their every call may be to `step()`, too."""
    models, optimizers = both(name)
    part = 0
    handle = release(models[1], optimizers[1], clip=0.05, track_norm=True, ready=lambda: part == 2)
    for step in range(3):
        for part in range(3):
            before = snapshot(models[1])
            for model in models:
                (loss_of(model, step, slice(2 * part, 2 * part + 2)) / 3).backward()
            if part < 2:
                assert_same(before, snapshot(models[1]))
                assert all(p.grad is not None for p in models[1].parameters())
        assert all(p.grad is None for p in models[1].parameters())
        assert torch.equal(handle.grad_norm(), get_total_norm([p.grad for p in models[0].parameters()]))
        for p in models[0].parameters():
            clip_grad_norm_([p], 0.05)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(models, optimizers)
    assert {int(state["step"]) for state in optimizers[1].state.values()} == {3}


def test_a_context_for_accumulation_goes_before_what_is_ready():
    model = make_model()
    optimizer = make("apollo", model)
    with release(model, optimizer, ready=lambda: True) as handle:
        with handle.accumulate():
            loss_of(model, 0).backward()
        assert not optimizer.state
        handle.ready = lambda: False
        loss_of(model, 0).backward()
        assert not optimizer.state
        handle.ready = None
        loss_of(model, 0).backward()
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_parameters_that_were_swapped_after_release_are_refused():
    """As accelerate does for FSDP2: the hooks stay behind on the old ones, and no gradient would be freed."""
    model = make_model()
    optimizer = make("apollo", model)
    with release(model, optimizer):
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                new = nn.Parameter(p.detach().clone())
                for group in optimizer.param_groups:
                    group["params"] = [new if q is p else q for q in group["params"]]
                setattr(module, name, new)
        loss_of(model, 0).backward()
        with pytest.raises(InputError, match=r"released parameters have left .* after fully_shard"):
            optimizer.step()
    assert not optimizer.state


def test_one_gradient_of_a_layer_lives_at_a_time():
    def most_alive(released: bool, accumulated: bool = False) -> int:
        model = make_model()
        optimizer = make("apollo", model)
        large, most = [p for p in model.parameters() if p.ndim > 1], [0]

        def count(_: Tensor) -> None:
            most[0] = max(most[0], sum(p.grad is not None for p in large))

        for p in large:
            p.register_post_accumulate_grad_hook(count)  # before release's own
        handle = release(model, optimizer) if released else None
        for step in range(2):
            if accumulated and handle is not None:
                with handle.accumulate():
                    loss_of(model, step).backward()
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return most[0]

    assert most_alive(released=True) == 1
    assert most_alive(released=False) == most_alive(released=True, accumulated=True) == 11


@every_optimizer
def test_resumes_in_the_middle_bitwise(name):
    models, optimizers = both(name, torch.bfloat16)
    train(models[0], optimizers[0], range(6))
    train(models[1], optimizers[1], range(3), released=True)
    file = io.BytesIO()
    torch.save({"model": models[1].state_dict(), "optimizer": optimizers[1].state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = make_model(torch.bfloat16)
    resumed = make(name, again, lr=0.3)
    with release(again, resumed):  # the groups are replaced while it is released
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(resumed, lambda t: 0.9**t, last_epoch=2)
        for step in range(3, 6):
            loss_of(again, step).backward()
            resumed.step()
            scheduler.step()
    assert_equal((models[0], again), (optimizers[0], resumed))


@every_optimizer
def test_the_learning_rate_of_the_moment_is_obeyed(name):
    model = make_model()
    optimizer = make(name, model, weight_decay=0.1)
    with release(model, optimizer):
        loss_of(model, 0).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        held = snapshot(model)
        loss_of(model, 1).backward()
        assert_same(held, snapshot(model))
        optimizer.param_groups[0]["lr"] = 1e-2  # the matrices alone
        loss_of(model, 2).backward()
    moved = {key for key, w in snapshot(model).items() if not torch.equal(w, held[key])}
    assert moved == {key for key in held if "mlp" in key and "bias" not in key}


def test_unfrozen_parameters_and_added_groups_are_stepped():
    models, optimizers = both("apollo")
    extras = [nn.Parameter(torch.ones(WIDTH)) for _ in models]
    for model, optimizer, extra in zip(models, optimizers, extras, strict=True):
        model.mlp.requires_grad_(False)
        released = model is models[1]
        if released:
            handle = release(model, optimizer)
            assert not any(p.requires_grad for p in model.mlp.parameters()), "still frozen"
        for step in range(4):
            if step == 1:
                model.mlp.requires_grad_(True)
            if step == 2:
                model.norm.register_parameter("extra", extra)
                optimizer.add_param_group({"params": [extra], "lr": 1e-1})
            loss = loss_of(model, step)
            if step >= 2:
                loss = loss + (extra * model.norm.weight).square().sum()
            loss.backward()
            if not released:
                optimizer.step()
                optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
    assert_equal(models, optimizers)
    assert not torch.equal(extras[1], torch.ones(WIDTH))
    handle.remove()
    optimizers[1].add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    loss_of(models[1], 9).backward()
    assert all(p.grad is not None for p in models[1].mlp.parameters()), "the hooks are gone"


def test_a_step_that_is_not_finite_is_skipped_alone():
    model = make_model()
    optimizer = make("apollo", model)
    with release(model, optimizer):
        loss_of(model, 0).backward()
        model.mlp[1].wide.weight.register_hook(lambda grad: grad * float("inf"))
        before = snapshot(model)
        loss_of(model, 1).backward()
    same = {key for key, w in snapshot(model).items() if torch.equal(w, before[key])}
    assert same == {"mlp.1.wide.weight"}
    assert optimizer.state[model.mlp[1].wide.weight]["skipped"] == 1


@both_dtypes
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_norm_is_that_of_the_real_gradients(dtype, clip):
    """To the bit what ``get_total_norm`` finds without release, accumulated and before clipping."""
    models, optimizers = both("apollo", dtype)
    handle = release(models[1], optimizers[1], clip=clip, track_norm=True)
    for step in range(4):
        for part in (slice(4), slice(4, 8)):
            loss_of(models[0], step, part).backward()
        expected = get_total_norm([p.grad for p in models[0].parameters()])
        with handle.accumulate():
            loss_of(models[1], step, slice(4)).backward()
        loss_of(models[1], step, slice(4, 8)).backward()
        found = handle.grad_norm()
        assert torch.equal(found, expected)
        assert found > 0.1
        if clip is not None:
            for p in models[0].parameters():
                clip_grad_norm_([p], clip)
                assert p.grad.norm() <= clip * 1.01
        optimizers[0].step()
        optimizers[0].zero_grad()
    assert_equal(models, optimizers)
    handle.track_norm = False
    loss_of(models[1], 4).backward()
    with pytest.raises(InputError, match="track_norm"):
        handle.grad_norm()


def test_clipping_changes_something():
    models, optimizers = both("apollo-mini")
    train(models[0], optimizers[0], released=True)
    train(models[1], optimizers[1], released=True, options={"clip": 1e-3})
    assert not torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)


def test_compiled():
    """A compiled model (all its gradients come at once, at the end) and compiled steps."""
    ends = []
    for released in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6, bias=False))
        model.compile(backend="aot_eager")  # without C++, which takes seconds
        optimizer = Apollo(model.parameters(), rank=2, compile=True)
        with warnings.catch_warnings(), release(model, optimizer) if released else contextlib.nullcontext():
            warnings.simplefilter("error", UserWarning)  # "torch.compile does not work": then this would test nothing
            for step in range(3):
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
                model(x).square().sum().backward()
                assert (model[0].weight.grad is None) == released
                optimizer.step()
                optimizer.zero_grad()
        assert len(optimizer.graphs) == 1
        ends.append(snapshot(model) | flat_state(optimizer))
    assert_same(*ends)


def test_closures_and_copies():
    models, optimizers = both("adamw")
    with release(models[1], optimizers[1]):
        for model, optimizer in zip(models, optimizers, strict=True):

            def closure(model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model, 0)
                loss.backward()
                return loss

            optimizer.step(closure)
        assert_equal(models, optimizers)
        model, optimizer = copy.deepcopy((models[1], optimizers[1]))
    loss_of(model, 1).backward()
    assert all(p.grad is not None for p in model.parameters()), "a copy is not released"
    release(model, optimizer).remove()


def test_a_step_with_a_closure_adds_it_to_the_micro_batches_before():
    """As Lightning accumulates: the rest is what the closure's backward pass has left, not what lay there before."""
    models, optimizers = both("apollo")
    last = [False]
    with release(models[1], optimizers[1], ready=lambda: last[0]):
        for model, optimizer in zip(models, optimizers, strict=True):

            def closure(model=model):
                last[0] = True
                loss_of(model, 1).backward()

            for _ in range(2):
                last[0] = False
                model.mlp[0].wide.requires_grad_(True)
                loss_of(model, 0).backward()
                model.mlp[0].wide.requires_grad_(False)  # no gradient in the last micro-batch
                optimizer.step(closure)
                left = [p for p in model.parameters() if p.grad is not None]
                assert bool(left) == (model is models[0])
                optimizer.zero_grad()
        assert_equal(models, optimizers)


def test_model_and_optimizer_can_be_forgotten():
    model = make_model()
    optimizer = make("apollo", model)
    release(model, optimizer)  # the optimizer keeps the handle
    gc.collect()
    loss_of(model, 0).backward()
    assert optimizer.state
    left = [weakref.ref(model.mlp[0].tall.weight), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in left] == [None, None]
    model = make_model()
    release(model, make("apollo", model))
    gc.collect()
    with pytest.raises(InputError, match="is gone: keep it"):
        loss_of(model, 0).backward()


def test_refusals():
    model = make_model()
    optimizer = make("apollo", model)
    with pytest.raises(InputError, match=r"SGD has no step .* build_optimizer"):
        release(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(InputError, match="greater than 0"):
        release(model, optimizer, clip=0.0)
    handle = release(model, optimizer)
    with pytest.raises(InputError, match="already"):
        release(model, optimizer)
    handle.remove()
    handle.remove()
    with release(model, optimizer):
        gone = optimizer.param_groups[0]["params"].pop(0)
        with pytest.raises(InputError, match="has left"):
            loss_of(model, 0).backward()
        optimizer.param_groups[0]["params"].insert(0, gone)
    w = nn.Parameter(torch.ones(6, 4))
    with release(nn.ParameterList([w]), Apollo([w], rank=2)):
        w.sum().backward()
    embedding = nn.Embedding(6, 4, sparse=True)
    with release(embedding, AdamW(embedding.parameters())), pytest.raises(InputError, match="sparse=False"):
        embedding(torch.tensor([1, 2])).sum().backward()


# --- the loop ---


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("micro", "clip"), [(None, None), (3, 0.1)])
def test_a_released_run_is_the_run_without(tmp_path, micro, clip):
    """Losses, rates, gradient norms, evaluations, weights and state, to the bit."""

    def cfg(name, release):
        train = {"micro_batch": micro, "clip_tensor": clip, "release": release}
        return tiny(tmp_path, name, model={"dtype": "bfloat16"}, train=train)

    for name in ("step", "release"):
        pretrain(cfg(name, name == "release"))
    assert figures(tmp_path / "release") == figures(tmp_path / "step")
    assert kill.final_files(tmp_path / "release") == kill.final_files(tmp_path / "step")
    (plain,), (freed,) = (records(tmp_path / name, "end") for name in ("step", "release"))
    weights = plain["memory"]["weights"]
    assert plain["memory"]["gradients"] == weights
    assert freed["memory"]["gradients"] == (300 * 32 * 2 if micro is None else weights), "the embedding's, or all"
    assert records(tmp_path / "release", "memory")[0]["gradients"] == freed["memory"]["gradients"]


@pytest.mark.usefixtures("one_thread")
def test_a_nan_in_any_micro_batch_stops_before_a_weight_is_touched(tmp_path, monkeypatch, capsys):
    real, built, calls = steps_of.summed_loss, [], []

    def build(*args, build=story.build, **how):
        built.append(build(*args))
        return built[0]

    def poisoned(model, *args):
        calls.append(snapshot(model))
        return real(model, *args) * (math.nan if len(calls) == 3 else 1.0)  # the first of step 2

    monkeypatch.setattr(story, "build", build)
    monkeypatch.setattr(steps_of, "summed_loss", poisoned)
    with pytest.raises(TrainingFailed, match="loss is nan at step 2: stopped before its update"):
        pretrain(tiny(tmp_path, train={"micro_batch": 2, "release": True}, log={"display": "plain"}))
    assert not torch.equal(calls[0]["lm_head.weight"], calls[2]["lm_head.weight"])
    assert_same(calls[2], snapshot(built[0].model))
    assert "all gradients at a time" in capsys.readouterr().err
