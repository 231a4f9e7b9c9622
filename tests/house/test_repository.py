"""What a release is made of says the same everywhere: version, changelog, citation, workflows, templates."""

import re
from pathlib import Path

import pytest
import yaml

import apollo_optim
from tools.check_release import problems, version

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_version_is_written_once_and_the_citation_follows() -> None:
    assert version() == apollo_optim.__version__
    assert re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE) is None
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == apollo_optim.__version__
    assert f"\n## {apollo_optim.__version__} (" in (ROOT / "CHANGELOG.md").read_text()


def test_a_tag_that_is_not_the_version_is_refused() -> None:
    assert problems("v9.9.9")[0] == f"the tag is v9.9.9, the version {apollo_optim.__version__}"
    assert not any(line.startswith("the tag") for line in problems(f"v{apollo_optim.__version__}"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_a_workflow_runs_is_there(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            words = step.get("run", "").split()
            if words[:1] == ["make"]:
                assert targets >= set(words[1:])
            for word in words:
                if word.startswith(("tests/", "tools/")):
                    assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_contributing_says_of_every_job_how_it_is_run_by_hand(path: Path) -> None:
    rows = re.findall(rf"^\| {path.stem}: ([\w-]+).*\|.*\|.*\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(yaml.safe_load(path.read_text())["jobs"])


def test_a_bug_report_asks_for_what_env_prints() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    assert any("apollo-optim env" in field["attributes"]["label"] for field in form["body"])
