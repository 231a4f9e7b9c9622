"""Loops with accelerate and optimizers of ours: prepare, accumulate, save_state, load_state."""

import pytest

pytest.importorskip("accelerate", reason="the dev extra brings it")
import accelerate_runs
from accelerate_runs import KINDS, compared
from command_runs import on_two


def check(row):
    assert row.pop("follows") == "2 of 2"
    assert set(row.values()) == {0.0}, row


@pytest.mark.parametrize("name", ["apollo-mini", "apollo-svd"])
def test_one_process_resumes_and_releases_bitwise(tmp_path, name):
    check(compared("one", name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resume_and_release_bitwise(kind):
    check(on_two(accelerate_runs.__file__, kind, "apollo-mini"))
