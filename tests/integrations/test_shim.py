"""`apollo-optim shim`: apollo_torch's names, for callers written for that package. tests/clients has real ones."""

import importlib
import io
import subprocess
import sys
import warnings
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from apollo_optim import Apollo, InputError, quantize_weights, rule_of
from apollo_optim.cli import shim
from apollo_optim.integrations import apollo_torch as names

# As transformers (its `optim_args` left as they are) and LLaMA-Factory write their groups.
TRANSFORMERS: dict[str, Any] = {
    "rank": 4, "proj": "random", "scale_type": "channel", "update_proj_gap": 200, "scale": 1.0, "proj_type": "std",
    "betas": (0.9, 0.999), "eps": 1e-8,
}  # fmt: skip
FACTORY: dict[str, Any] = {
    "rank": 4, "update_proj_gap": 200, "scale": 32.0, "proj": "random", "proj_type": "std", "scale_type": "channel",
    "scale_front": False, "weight_decay": 0.1,
}  # fmt: skip


@pytest.fixture
def apollo_torch(drop_in: None) -> ModuleType:
    """The package that the folder holds, before whatever is installed."""
    return importlib.import_module("apollo_torch")


@pytest.fixture(autouse=True)
def unsaid() -> None:
    names._warn_once.cache_clear()


def make_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16), "head": nn.Linear(16, 8)})


def take(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(number))
        model["head"](model["down"](model["up"](x))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def grouped(model: nn.ModuleDict, **group: Any) -> list[dict[str, Any]]:
    targets = [model["up"].weight, model["down"].weight]
    return [
        {"params": [p for p in model.parameters() if not any(p is t for t in targets)]},
        {"params": targets, **group},
    ]


def test_the_folder_is_found_as_that_package(apollo_torch):
    printed = subprocess.run(
        [sys.executable, "-m", "apollo_optim", "shim"], check=True, capture_output=True, text=True
    ).stdout
    assert printed == f"{shim.FOLDER}\n"
    assert apollo_torch.__file__.startswith(str(shim.FOLDER))
    assert metadata.version("apollo_torch") == apollo_torch.__version__ == "1.0.3"
    assert "apollo-optim" in metadata.metadata("apollo-torch")["Summary"], "not an installed apollo-torch's"


@pytest.mark.parametrize("group", [TRANSFORMERS, FACTORY, {"rank": 4}], ids=["transformers", "LLaMA-Factory", "rank"])
def test_groups_of_other_tools_train_by_the_rule(apollo_torch, group):
    model = make_model()
    optimizer = apollo_torch.APOLLOAdamW(grouped(model, **group), lr=1e-2)
    assert isinstance(optimizer, Apollo)
    take(model, optimizer, range(3))
    rest, ruled = optimizer.param_groups
    assert [rule_of(p, rest) for p in rest["params"]] == ["adamw"] * len(rest["params"])
    assert [rule_of(p, ruled) for p in ruled["params"]] == ["apollo"] * 2
    assert optimizer.state[model["up"].weight]["exp_avg"].shape == (24, 4)
    assert (ruled["proj"], ruled["scale_type"], ruled["update_proj_gap"]) == ("gaussian", "channel", 200)
    assert (ruled["scale"], ruled["eps"]) == (group.get("scale", 1.0), group.get("eps", 1e-6))


def test_it_steps_as_apollo_does_and_decays(apollo_torch):
    one, other, still = make_model(), make_model(), make_model()
    theirs = apollo_torch.APOLLOAdamW(grouped(one, **FACTORY), lr=1e-2, betas=[0.8, 0.9])
    own = {key: FACTORY[key] for key in ("rank", "scale", "weight_decay")}
    ours = Apollo(grouped(other, **own, proj="gaussian"), lr=1e-2, betas=(0.8, 0.9))
    undecayed = apollo_torch.APOLLOAdamW(grouped(still, **{**FACTORY, "weight_decay": 0.0}), lr=1e-2, betas=(0.8, 0.9))
    for model, optimizer in ((one, theirs), (other, ours), (still, undecayed)):
        take(model, optimizer, range(3))
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert not torch.equal(one["up"].weight, still["up"].weight)


def test_an_optimizer_of_one_parameter_has_a_seed_of_its_own(apollo_torch):
    a, b, c = (nn.Parameter(torch.ones(8, 6)) for _ in range(3))
    made = [apollo_torch.APOLLOAdamW([{"params": [p], "rank": 2}], lr=1e-2) for p in (a, b)]
    made += [apollo_torch.APOLLOAdamW([{"params": c}])]  # no target: AdamW, and no word about it
    for p, optimizer in zip((a, b, c), made, strict=True):
        p.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
        optimizer.step()
    assert made[0].state[a]["seed"] != made[1].state[b]["seed"]
    assert not torch.equal(a, b), "the same gradient, by another projection"
    assert rule_of(c, made[2].param_groups[0]) == "adamw"


def test_resumed_is_not_interrupted_and_loads_without_pickled_objects(apollo_torch):
    whole, again = make_model(), make_model()
    optimizer = apollo_torch.APOLLOAdamW(grouped(whole, **TRANSFORMERS), lr=1e-2)
    take(whole, optimizer, range(2))
    file = io.BytesIO()
    torch.save((whole.state_dict(), optimizer.state_dict()), file)
    take(whole, optimizer, range(2, 5))

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    resumed = apollo_torch.APOLLOAdamW(grouped(again, **TRANSFORMERS), lr=1e-2)
    resumed.load_state_dict(state)
    take(again, resumed, range(2, 5))
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


@pytest.mark.parametrize(
    ("group", "own", "said"),
    [
        ({"rank": 4, "proj_type": "left"}, {}, 'proj_type="left" cannot be honoured'),
        ({"rank": 4, "quant": True}, {}, "the key 'quant' of a group"),
        ({"rank": 4}, {"correct_bias": False}, "correct_bias=False"),
        ({}, {}, "no group names a rank"),
    ],
)
def test_what_cannot_be_honoured_is_said_once(apollo_torch, group, own, said):
    model = make_model()
    with pytest.warns(UserWarning, match=said):
        optimizer = apollo_torch.APOLLOAdamW(grouped(model, **group), **own)
    take(model, optimizer, range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apollo_torch.APOLLOAdamW(grouped(model, **group), **own)
        apollo_torch.APOLLOAdamW(grouped(model, **TRANSFORMERS), no_deprecation_warning=True)


def test_no_limiter_parameters_and_groups_added_later(apollo_torch):
    model = make_model()
    free = apollo_torch.APOLLOAdamW(grouped(model, rank=4), disable_nl=True, scale_front=True)
    assert [free.param_groups[1][key] for key in ("norm_growth", "scale_front")] == [None, True]
    free.add_param_group({"params": [nn.Parameter(torch.ones(8, 6))], "rank": 2, "scale": 32, "proj": "svd"})
    assert [free.param_groups[2][key] for key in ("rule", "proj", "scale")] == ["apollo", "svd", 32]
    with pytest.warns(UserWarning, match="every parameter uses AdamW"):
        plain = apollo_torch.APOLLOAdamW(model.parameters())
    assert [group["rule"] for group in plain.param_groups] == ["adamw"]
    with pytest.raises(InputError, match="rank=0, but it must be"):
        apollo_torch.APOLLOAdamW(grouped(model, rank=0))


def test_low_bit_weights_follow_the_other_name_and_floats_are_refused(apollo_torch):
    model = make_model()
    with pytest.raises(InputError, match=r"\(24, 16\) is torch.float32: call apollo_optim.quantize_weights"):
        apollo_torch.QAPOLLOAdamW(grouped(model, **TRANSFORMERS))
    quantize_weights(model, targets=("up", "down"))
    optimizer = apollo_torch.QAPOLLOAdamW(grouped(model, **TRANSFORMERS), lr=1e-1)
    before = model["up"].weight.dequantize()
    take(model, optimizer, range(2))
    assert rule_of(model["up"].weight, optimizer.param_groups[1]) == "apollo"
    assert not torch.equal(before, model["up"].weight.dequantize())
