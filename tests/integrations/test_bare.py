"""Optimizers by class path, with bare parameters: the groups are those of `build_optimizer`."""

import copy
import gc
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from apollo_optim import InputError, RuleOptimizer, build_optimizer
from apollo_optim.integrations import bare
from apollo_optim.rules import RULES


class Block(nn.Module):
    """Embedding, attention and MLP, norm, and a head that is tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.attn, self.mlp = nn.Embedding(32, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm, self.lm_head = nn.LayerNorm(16), nn.Linear(16, 32, bias=False)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.lm_head(self.norm(self.mlp(self.attn(self.wte(ids)))))


class Wrapper(nn.Module):
    """As DDP, Fabric and compiled modules are: it has the same parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def told(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Its groups, with names in the place of parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def parameters(optimizer: torch.optim.Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_a_class_whose_groups_are_build_optimizers(name):
    model = Wrapper(Block())
    cls = getattr(bare, RULES[name].__name__)
    made = cls(model.parameters(), lr=1e-2, weight_decay=0.1)
    expected = build_optimizer(name, model.module, lr=1e-2, weight_decay=0.1)
    assert isinstance(made, RuleOptimizer)
    assert told(made) == told(expected)
    assert parameters(made) == parameters(expected)
    assert cls is getattr(bare, RULES[name].__name__)
    assert "lr" in inspect.signature(cls).parameters, "litgpt looks for what it may hand over"


def test_it_steps_as_build_optimizer_does_and_is_saved():
    torch.manual_seed(0)
    one = Block()
    other = copy.deepcopy(one)
    knobs: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "rank": 4, "rest_lr": 1e-3}
    optimizers = [bare.Apollo(one.parameters(), **knobs), build_optimizer("apollo", other, **knobs)]
    for _ in range(3):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            model(torch.arange(32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    again = pickle.loads(pickle.dumps(optimizers[0]))
    assert type(again) is bare.Apollo
    optimizers[0].load_state_dict(again.state_dict())


def test_some_of_the_parameters_and_groups_with_words_of_their_own():
    """kohya and timm make groups; adapters and frozen layers leave parameters out."""
    model = Block()
    model.wte.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert set(parameters(bare.ApolloMini(trained))) == {id(p) for p in trained}
    vectors = [p for p in trained if p.ndim < 2]
    groups = [
        {"params": vectors, "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "lr": 3e-3, "weight_decay": 0.5, "lr_scale": 1.0},
    ]
    made = bare.ApolloMini(groups, lr=1e-2)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in made.param_groups] == [
        ("norms", 1e-2, 0.0), ("matrices", 3e-3, 0.5), ("head", 3e-3, 0.5)
    ]  # fmt: skip
    named = bare.Muon(model.named_parameters())
    assert told(named) == told(build_optimizer("muon", model))


def test_parameters_of_no_module_are_refused():
    model = Block()
    params = list(model.parameters())
    with pytest.raises(InputError, match=r"ApolloMini: no module holds all of these 9 parameters.*build_optimizer"):
        bare.ApolloMini([*params, nn.Parameter(torch.ones(4, 4))])
    del model
    gc.collect()
    with pytest.raises(InputError, match="nothing says what they are"):
        bare.ApolloMini(params)
    model = Block()
    with pytest.raises(InputError, match="matches nothing in this model"):
        bare.ApolloMini(model.parameters(), targets="atn")


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(AttributeError, match=r"'ApoloMini'\. Did you mean 'ApolloMini'"):
        bare.ApoloMini  # noqa: B018
