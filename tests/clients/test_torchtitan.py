"""torchtitan's trainer trains by our rule and resumes, with our container."""

import pytest

pytest.importorskip("torchtitan.config", reason="make test-clients has an environment with it")
from torchtitan_runs import MATRICES, followed, make_folder, resumes, train


def test_the_container_trains_by_the_rule_and_resumes_bitwise(tmp_path):
    folder = make_folder(tmp_path)
    full = train(folder, "full", "apollo")
    assert followed(full) == f"{MATRICES} of {MATRICES}"
    groups = full["optimizer"]
    named = {name: groups[f"param_groups.{name}.rule"] for name in ("tok_embeddings.weight", "lm_head.weight")}
    assert named == {"tok_embeddings.weight": "adamw", "lm_head.weight": "adamw"}
    peaks = [groups[f"param_groups.{name}.initial_lr"] for name in ("layers.0.attention.wo.weight", "lm_head.weight")]
    assert peaks == [1e-2, 1e-3]
    assert resumes(folder, full, "full", "apollo") == 0.0
    assert resumes(folder, full, "full", "unwrapped") == 0.0, "without activation checkpointing"
