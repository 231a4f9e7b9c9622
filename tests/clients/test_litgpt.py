"""litgpt's command takes an optimizer of ours by class path, trains by its rule and resumes."""

import pytest

pytest.importorskip("litgpt", reason="make test-clients has an environment with it")
from litgpt_runs import OURS, followed, make_folder, resumes, train


def test_a_class_path_trains_by_the_rule_and_resumes_bitwise(tmp_path):
    folder = make_folder(tmp_path)
    full = train(folder, "ours", OURS)
    assert followed(full) == "10 of 10"
    named = {name: group for group in full["optimizer"]["param_groups"] for name in group["param_names"]}
    assert {name: group["rule"] for name, group in named.items() if "lm_head" in name or "wte" in name} == {
        "lm_head.weight": "adamw", "transformer.wte.weight": "adamw"
    }  # fmt: skip
    decayed = {name for name, group in named.items() if group["weight_decay"]}
    assert decayed == {name for name in named if name.endswith("weight") and "norm" not in name and "ln_f" not in name}
    assert resumes(folder, full, "ours", OURS) == 0.0
