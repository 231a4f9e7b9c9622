"""axolotl's command trains by our rule and resumes, on `apollo-optim shim`."""

import pytest

pytest.importorskip("axolotl", reason="make test-clients has an environment with it")
from axolotl_runs import APOLLO, RANK, train
from command_runs import MATRICES, make_folder, resumes


def test_apollo_adamw_trains_by_the_rule_and_resumes_bitwise(tmp_path):
    folder = make_folder(tmp_path)
    full = train(folder, "full", **APOLLO)
    assert full.followed(RANK) == f"{MATRICES + 1} of {MATRICES}", "transformers takes the head in"
    assert [group["rule"] for group in full.optimizer["param_groups"]] == ["adamw", "apollo"]
    assert resumes(train, folder, full, "again", **APOLLO) == 0.0
