"""Steps compiled before there are weights are those that the weights then take."""

import warnings

import pytest
import torch
from train_tiny import MODEL, tiny

from apollo_optim import Apollo
from apollo_optim.train import build
from apollo_optim.train.pretrain import pretrain

FEW_SHAPES = {
    "attention_dropout": 0.0,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}  # a graph is 10 s of compiling


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("optim", "quant"),
    [
        ({"name": "apollo", "rank": 4}, {}),
        ({"name": "q-apollo-mini", "rank": None}, {"group_size": 16, "targets": ["mlp", "lm_head"]}),
    ],
    ids=["apollo", "low-bit"],
)
def test_a_run_compiles_nothing_once_it_has_weights(tmp_path, monkeypatch, optim, quant) -> None:
    after: list[int] = []
    real = build.build_model

    def building(*how, **more):
        after.append(graphs())
        return real(*how, **more)

    monkeypatch.setattr(build, "build_model", building)
    cfg = tiny(
        tmp_path,
        optim={**optim, "compile": True, "update_proj_gap": 200},
        quant=quant,
        model={"dtype": "bfloat16", "config": {**MODEL, **FEW_SHAPES}},
        train={"steps": 3, "release": True},
        schedule={"warmup": 2},
    )
    before = graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "torch.compile does not work": then this would test nothing
        loss = pretrain(cfg).loss
    assert after[0] > before
    assert graphs() == after[0]
    monkeypatch.setattr(build, "compiled_beforehand", lambda *_, **__: {})
    cfg.out = str(tmp_path / "again")
    assert pretrain(cfg).loss == loss
    assert graphs() > after[0], "without it they would be compiled while the run is on"


def test_stand_ins_are_forgotten(monkeypatch) -> None:
    from apollo_optim.optim.precompile import precompile

    stepped: list[tuple[tuple[int, ...], str]] = []
    monkeypatch.setattr(Apollo, "step_one", lambda self, p, group: stepped.append((p.shape, p.device.type)))
    with torch.device("meta"):
        model = torch.nn.ModuleList([torch.nn.Linear(8, 6, bias=False) for _ in range(3)] + [torch.nn.LayerNorm(6)])
    optimizer = Apollo(model.parameters(), rank=2, compile=True)
    precompile(optimizer, torch.device("cpu"))
    assert stepped == [((6, 8), "cpu")] * 2 + [((6,), "cpu")] * 2
    assert not optimizer.state
