"""ms-swift's command trains by our rule and resumes, with our plugin."""

import pytest

pytest.importorskip("swift.optimizers", reason="make test-clients has an environment with it")
from command_runs import MATRICES, make_folder, resumes
from ms_swift_runs import APOLLO, RANK, train


def test_the_plugin_trains_by_the_rule_and_resumes_bitwise(tmp_path):
    folder = make_folder(tmp_path)
    full = train(folder, "full", **APOLLO)
    assert full.followed(RANK) == f"{MATRICES} of {MATRICES}"
    groups = {group["name"]: group for group in full.optimizer["param_groups"]}
    assert {name: group["rule"] for name, group in groups.items()} == {
        "matrices": "apollo", "embedding": "adamw", "head": "adamw", "norms": "adamw"
    }  # fmt: skip
    assert [groups[name]["initial_lr"] for name in ("matrices", "head")] == [1e-3, 2e-3]
    assert [groups[name]["weight_decay"] for name in ("matrices", "norms")] == [0.1, 0.0]
    assert resumes(train, folder, full, "again", **APOLLO) == 0.0
