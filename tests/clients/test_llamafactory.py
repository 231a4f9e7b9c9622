"""LLaMA-Factory's command trains by our rule and resumes, on `apollo-optim shim`."""

from pathlib import Path

import pytest

pytest.importorskip("llamafactory", reason="make test-clients has an environment with it")
from command_runs import MATRICES, Result, make_folder, resumes
from llamafactory_runs import APOLLO, RANK, train


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = make_folder(tmp_path_factory.mktemp("llamafactory"))
    return folder, train(folder, "full", **APOLLO)


def test_use_apollo_trains_by_the_rule(full):
    _, result = full
    assert result.followed(RANK) == f"{MATRICES} of {MATRICES}"
    groups = result.optimizer["param_groups"]
    assert [group["rule"] for group in groups] == ["adamw", "adamw", "apollo"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.1]
    assert [groups[2][key] for key in ("scale", "proj", "scale_type", "update_proj_gap")] == [
        32.0, "gaussian", "channel", 200
    ]  # fmt: skip


def test_it_resumes_bitwise(full):
    folder, result = full
    assert resumes(train, folder, result, "again", **APOLLO) == 0.0


def test_layerwise_trains_and_says_once_what_cannot_be_honoured(full):
    folder, result = full
    own = {**APOLLO, "apollo_layerwise": True, "apollo_proj_type": "left", "max_steps": 2, "save_strategy": "no"}
    layerwise = train(folder, "layerwise", **own)
    assert layerwise.said.count('proj_type="left" cannot be honoured') == 1
    assert layerwise.weights.keys() == result.weights.keys()
