"""The Makefile, the hooks and CI that run its targets, and a rule that no tool checks."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
HOOKS = ROOT / ".pre-commit-config.yaml"
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
SOURCES = ("cortex_core", "streams", "tests", "benchmarks", "examples")
TARGETS = dict(re.findall(r"^([a-z-]+):.*## (.+)$", (ROOT / "Makefile").read_text(), re.M))


def test_the_makefile_describes_every_target() -> None:
    assert {"help", "setup", "up", "demo", "test", "check", "bench", "clean"} <= set(TARGETS)
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert set(phony.split()) == set(TARGETS)
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"  {target} " in done.stdout for target in TARGETS)


def test_ci_calls_what_the_readme_calls() -> None:
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o111
    called = re.findall(r"^make (\w+)", run.read_text(), re.M)
    assert called[-1] == "test"
    assert {"check", "demo", "test"} <= set(called)


def test_hooks_are_local_and_run_targets() -> None:
    config = yaml.safe_load(HOOKS.read_text())
    [local] = config["repos"]
    assert local["repo"] == "local"
    for hook in local["hooks"]:
        assert hook["language"] == "system"
        assert not hook["pass_filenames"]
        assert set(hook["stages"]) <= set(config["default_install_hook_types"])
    assert {target_of(hook["entry"]) for hook in local["hooks"]} == {"check", "test"}


def test_the_workflow_runs_targets() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key "on" as a boolean
    assert workflow["permissions"] == {"contents": "read"}
    [job] = workflow["jobs"].values()
    assert {target_of(step["run"]) for step in job["steps"] if "run" in step} == {"check", "demo", "test"}
    assert set(job["strategy"]["matrix"]["python"]) == python_versions()


def target_of(command: str) -> str:
    """The target of a `make` command, which must exist."""
    make, target, *_ = command.split()
    assert make == "make"
    assert target in TARGETS
    return target


def python_versions() -> set[str]:
    """Those that the package declares."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    return {c.rpartition(" ")[2] for c in classifiers if re.search(r"Python :: \d+\.\d+$", c)}


@pytest.mark.parametrize("name", ["bug", "proposal"])
def test_issue_templates_say_what_they_are_for(name: str) -> None:
    path = ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.md"
    _, front, text = path.read_text().split("---\n", 2)
    fields: dict[str, Any] = yaml.safe_load(front)
    assert {"name", "about"} <= set(fields)
    assert text.strip()


def test_every_ignored_type_error_has_a_reason() -> None:
    """In a comment behind it, or on the line before."""
    without = []
    for path in [p for folder in SOURCES for p in ROOT.glob(f"{folder}/**/*.py")]:
        before = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.search(r"# type: ignore\[[\w, -]+\]$", line) and not before.lstrip().startswith("#"):
                without.append(f"{path.relative_to(ROOT)}: {line.strip()}")
            before = line
    assert without == []
