"""timm and diffusers, in loops as their own scripts have them, train by our rule and resume bitwise."""

from importlib.util import find_spec

import pytest

if not (find_spec("timm") and find_spec("diffusers")):
    pytest.skip("make test-clients has an environment with timm and diffusers", allow_module_level=True)
from vision_runs import diffusers_row, timm_row, timm_train


def check(row, matrices):
    assert row.pop("follows") == matrices
    assert row.pop("accumulated") < 1e-4
    assert {value for value in row.values() if isinstance(value, float)} == {0.0}, row


def test_the_registry_of_timm_makes_our_optimizer_and_its_saver_resumes(tmp_path):
    check(timm_row(tmp_path), "8 of 8")
    _, (model, optimizer) = timm_train(tmp_path / "groups", steps=1)
    decayed = {name for group in optimizer.param_groups if group["weight_decay"] for name in group["param_names"]}
    assert decayed == {
        name for name, p in model.named_parameters() if p.ndim >= 2 and name not in model.no_weight_decay()
    }


@pytest.mark.parametrize(("kind", "matrices"), [("UNet2DModel", 26), ("DiTTransformer2DModel", 20)])
def test_models_of_diffusers_train_by_the_rule_and_resume(tmp_path, kind, matrices):
    check(diffusers_row(tmp_path, kind), f"{matrices} of {matrices}")
