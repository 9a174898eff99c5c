"""What the forge reads: the workflow runs the tests that dev.py has, and every version is the project's."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def project_version() -> str:
    return re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]


def test_citation_and_changelog_name_the_version_of_the_project():
    assert read_yaml(ROOT / "CITATION.cff")["version"] == project_version()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest[1] == project_version()


def test_pre_commit_formats_with_the_ruff_of_the_lock():
    locked = re.search(r"^ruff==(\S+)", (ROOT / "locks" / "tested.txt").read_text("utf-8"), re.MULTILINE)[1]
    repos = {
        each["repo"].rpartition("/")[2]: each for each in read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    }
    assert repos["ruff-pre-commit"]["rev"] == f"v{locked}"


def test_the_forge_runs_both_ends_of_the_allowed_versions_on_linux():
    jobs = read_yaml(GITHUB / "workflows" / "ci.yml")["jobs"]
    runs = {each["python"]: each["command"] for each in jobs["linux"]["strategy"]["matrix"]["include"]}
    assert runs == {"3.10": "python dev.py test --oldest", "3.13": "bash .ci/run"}
    assert (ROOT / ".ci" / "run").is_file()
    assert "3.10" in (ROOT / "pyproject.toml").read_text("utf-8").partition("requires-python")[2][:20]
    assert {"windows-latest", "macos-latest"} == set(jobs["others"]["strategy"]["matrix"]["system"])


def test_a_bug_report_asks_for_the_doctor_by_options_that_exist():
    from comfyui_blip3o.cli.main import build_parser

    template = read_yaml(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")
    doctor = next(each for each in template["body"] if each.get("id") == "doctor")
    assert doctor["validations"]["required"]
    command = re.search(r"`blip3o ([^`]+)`", doctor["attributes"]["label"])[1]
    assert build_parser().parse_args(command.split()).json


@pytest.mark.parametrize("path", sorted(GITHUB.rglob("*.yml")), ids=lambda path: path.name)
def test_templates_have_what_the_forge_needs(path: Path):
    tree = read_yaml(path)
    if path.parent.name == "ISSUE_TEMPLATE" and path.name != "config.yml":
        assert {"name", "description", "body"} <= tree.keys()
        ids = [each["id"] for each in tree["body"] if "id" in each]
        assert len(ids) == len(set(ids)) >= 2
        for each in tree["body"]:
            assert each["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")


def test_every_json_file_passes_the_check_that_pre_commit_makes():
    listing = subprocess.run(["git", "ls-files", "*.json"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in listing.stdout.splitlines():
        if (ROOT / name).is_file():
            json.loads((ROOT / name).read_text("utf-8"))
