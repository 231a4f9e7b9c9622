"""ms-swift and torchtitan call their optimizers in ways of their own. Held to these shapes; the tools are not run here.

The stand-ins have what these files use of ms-swift 4.6.0 and torchtitan 0.3.0, called as those call it.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import Optimizer

from apollo_optim import InputError, RuleOptimizer


class Tiny(nn.Module):
    """Embedding, two matrices, norm, head. torchtitan's layers are not called `attn` and `mlp`."""

    def __init__(self, up: str = "attn", down: str = "mlp") -> None:
        super().__init__()
        self.embed, self.norm, self.lm_head = nn.Embedding(32, 16), nn.LayerNorm(16), nn.Linear(16, 32, bias=False)
        self.layers = nn.ModuleDict({up: nn.Linear(16, 24), down: nn.Linear(24, 16)})

    def forward(self, ids: torch.Tensor) -> Any:
        hidden = self.embed(ids)
        for layer in self.layers.values():
            hidden = layer(hidden)
        return self.lm_head(self.norm(hidden))


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of ours over stand-ins, and forgets it afterwards."""
    names: list[str] = []

    def take(name: str, stand_ins: dict[str, dict[str, Any]]) -> Any:
        for path, content in stand_ins.items():
            module = ModuleType(path)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, path, module)
        names.append(name)
        return importlib.import_module(name)

    yield take
    for name in names:
        sys.modules.pop(name, None)


class SwiftCallback:
    """`swift.optimizers.OptimizerCallback`: made by `optimizers_map[args.optimizer](args, trainer)`."""

    def __init__(self, args: Any, trainer: Any) -> None:
        self.args, self.trainer = args, trainer


@dataclass
class SwiftArguments:
    """Of transformers' arguments, and ms-swift's, what the plugin reads."""

    optim_args: str | None
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8


@dataclass
class SwiftTrainer:
    model: nn.Module


@pytest.fixture
def swift(imported: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"default": SwiftCallback}
    content = {"OptimizerCallback": SwiftCallback, "optimizers_map": known}
    imported("apollo_optim.integrations.ms_swift", {"swift": {}, "swift.optimizers": content})
    return known


@pytest.mark.parametrize("given", [True, False])  # transformers 5 gives the model, 4 does not
@pytest.mark.parametrize(
    ("words", "rule", "rank"),
    [
        ("name=apollo,rank=4, rest=adamw8bit", "apollo", 4),
        ("targets=all-linear", "apollo-mini", 1),
        (None, "apollo-mini", 1),
    ],
)
def test_ms_swift(swift: dict[str, Any], given: bool, words: str | None, rule: str, rank: int) -> None:
    model = Tiny()
    callback = swift["apollo_optim"](SwiftArguments(words), SwiftTrainer(model))
    optimizer = callback.create_optimizer(model=model if given else None)
    assert isinstance(optimizer, RuleOptimizer)
    group = next(group for group in optimizer.param_groups if group["name"] == "matrices")
    assert (group["rule"], group["rank"], group["lr"], group["weight_decay"]) == (rule, rank, 1e-3, 0.1)
    assert {id(p) for p in group["params"]} == {id(layer.weight) for layer in model.layers.values()}
    embedding = next(group for group in optimizer.param_groups if group["name"] == "embedding")
    assert embedding["state_dtype"] == ("8bit" if rank == 4 else "float32")


@pytest.mark.parametrize("words", ["rank", "rank=", "=4"])
def test_ms_swift_names_a_word_that_is_no_knob(swift: dict[str, Any], words: str) -> None:
    model = Tiny()
    with pytest.raises(InputError, match=f"'{words}' is not knob=value"):
        swift["apollo_optim"](SwiftArguments(words), SwiftTrainer(model)).create_optimizer()


class TitanContainer(Optimizer):
    """`OptimizersContainer`: made by `config.build(model_parts=[...])`, then asked for `.optimizers`."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        owner: ClassVar[Any] = None
        param_groups: list[Any] = field(default_factory=list)

    optimizers: list[Any]
    model_parts: list[nn.Module]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()


@pytest.fixture
def titan(imported: Any) -> Any:
    content = {"OptimizersContainer": TitanContainer}
    names = "torchtitan", "torchtitan.components"
    stand_ins: dict[str, dict[str, Any]] = {**{name: {} for name in names}, "torchtitan.components.optimizer": content}
    return imported("apollo_optim.integrations.torchtitan", stand_ins).ApolloContainer


def test_torchtitan(titan: Any) -> None:
    parts = [Tiny("attention", "feed_forward") for _ in range(2)]
    matrix = parts[1].get_parameter("layers.attention.weight")
    config = titan.Config(name="apollo", knobs={"rank": 4, "lr": 1e-3, "rest_lr": 1e-2})
    container = titan(config, model_parts=parts)
    assert all(isinstance(optimizer, RuleOptimizer) for optimizer in container.optimizers)
    assert len(container.param_groups[0]["params"]) == sum(1 for part in parts for _ in part.parameters())
    hooked: list[int] = []
    container.register_step_pre_hook(lambda *_: hooked.append(1))
    before = matrix.detach().clone()
    for part in parts:
        part(torch.arange(8)).square().mean().backward()
    container.step()
    assert hooked == [1]
    assert not torch.equal(matrix, before)
    assert container.optimizers[1].state[matrix]["exp_avg"].shape == (24, 4)


def test_torchtitan_saves_under_names_without_wrappers(titan: Any) -> None:
    """Activation checkpointing wraps layers: a checkpoint has to be readable by a run without it."""
    part = Tiny("attention", "feed_forward")
    plain = [name for name, _ in part.named_parameters()]
    part.layers["attention"] = checkpoint_wrapper(part.layers["attention"])
    assert [name for name, _ in part.named_parameters()] != plain
    [optimizer] = titan(titan.Config(), model_parts=[part]).optimizers
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == set(plain)


def test_torchtitan_refuses_groups_that_it_would_not_read(titan: Any) -> None:
    with pytest.raises(InputError, match=r"param_groups: .*targets"):
        titan(titan.Config(param_groups=[object()]), model_parts=[Tiny()])
