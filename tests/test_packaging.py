"""What is installed: small imports, a wheel with its data files, constraints that cover the dependencies."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("torch", "sentence_transformers", "transformers", "scipy", "sklearn", "matplotlib")


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after running the code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return set(done.stdout.splitlines())


@pytest.mark.parametrize(
    "code",
    [
        "import cortex_core",
        "import streams, streams.cli",
        "from typer.testing import CliRunner; from streams.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
        "import streams.joiner, streams.trainer, streams.inference",
        "import streams.local.stack, streams.cli.status",
        "import streams.joiner.app, streams.joiner.rebuild, streams.client, streams.kafka.follower",
        "import cortex_core.feedback_collector, cortex_core.replay_buffer, cortex_core.strategy_registry",
    ],
)
def test_what_must_start_quickly_loads_nothing_heavy(code: str) -> None:
    loaded = modules_after(code)
    assert not loaded.intersection(HEAVY)


def test_the_learner_loads_no_worker_and_no_client() -> None:
    every = sorted(
        ".".join(p.relative_to(ROOT / "cortex_core").with_suffix("").parts)
        for p in (ROOT / "cortex_core").rglob("*.py")
        if p.stem != "__init__"
    )
    loaded = modules_after("\n".join(f"import cortex_core.{name}" for name in every))
    assert "torch" in loaded  # the check sees what it looks for
    assert not loaded.intersection(("streams", "faust", "mode", "aiokafka", "redis", "fastapi"))


def test_learning_loads_no_compiler() -> None:
    """It would take longer to load than all the rest of a trainer, and 150 MB."""
    loaded = modules_after(
        "from streams.settings import Settings\nfrom streams.trainer.learner import warm_up\n"
        "warm_up(Settings.load())"
    )
    assert "torch.optim" in loaded
    assert not loaded.intersection(("torch._dynamo", "torch._inductor.compile_fx", "sympy"))


def test_what_ships_for_tests_needs_no_test_framework() -> None:
    loaded = modules_after("import streams.testing")
    assert not loaded.intersection(("pytest", "tests", "testcontainers", *HEAVY))


def test_benchmarks_import_no_test() -> None:
    sources = {file.name: file.read_text() for file in (ROOT / "benchmarks").glob("*.py")}
    assert not [name for name, text in sources.items() if re.search(r"^(from|import) tests\b", text, re.M)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in a wheel built from this tree, by the build backend alone: no network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [file] = out.glob("*.whl")
    return set(zipfile.ZipFile(file).namelist())


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: set[str]) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "cortex_core", "streams"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    inside = {name for name in wheel if ".dist-info/" not in name}
    assert inside == set(tracked)
    assert {"cortex_core/py.typed", "streams/py.typed", "streams/local/kafka_jars.sha256"} <= inside
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_script_is_the_command_line() -> None:
    [script] = entry_points(group="console_scripts", name="cortex")
    assert script.value == PYPROJECT["project"]["scripts"]["cortex"]
    assert version("cortex-streams") == PYPROJECT["project"]["version"]


OF_BENCH = {"pandas", "seaborn"}
"""What mabwiser requires, which the tests' environment does not have."""


def constraints() -> dict[str, list[Requirement]]:
    pinned: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin = Requirement(line)
        pinned.setdefault(canonical(pin.name), []).append(pin)
    return pinned


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_within_its_range() -> None:
    project = PYPROJECT["project"]
    wanted = project["dependencies"] + [d for e in project["optional-dependencies"].values() for d in e]
    pinned = constraints()
    for requirement in map(Requirement, wanted):
        for pin in pinned[canonical(requirement.name)]:
            [exact] = pin.specifier
            assert exact.operator == "=="
            assert requirement.specifier.contains(exact.version), requirement


def test_nothing_is_pinned_that_nothing_requires() -> None:
    """A dependency that is gone takes its pin, and those of what it alone needed, with it."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    pending, seen = [Requirement(f"cortex-streams[{','.join(extras)}]")], set()
    while pending:
        requirement = pending.pop()
        name, of = canonical(requirement.name), frozenset(map(canonical, requirement.extras))
        if (name, of) in seen:
            continue
        seen.add((name, of))
        with contextlib.suppress(PackageNotFoundError):  # for another platform, or of the extra `bench`
            for needed in map(Requirement, requires(name) or []):
                under = re.findall(r'extra == "([^"]+)"', str(needed.marker or ""))
                if not under or of.intersection(map(canonical, under)):
                    pending.append(needed)
    assert set(constraints()) - {name for name, _ in seen} <= OF_BENCH


def test_what_is_installed_is_what_is_pinned() -> None:
    """Also what the dependencies themselves need: nothing comes in a version of the day."""
    pinned = constraints()
    environment: dict[str, str] = {name: str(value) for name, value in default_environment().items()}
    environment["extra"] = ""
    pending, seen = ["cortex-streams"], {"cortex-streams"}
    while pending:
        for text in requires(pending.pop()) or []:
            requirement = Requirement(text)
            name = canonical(requirement.name)
            if name in seen or (requirement.marker and not requirement.marker.evaluate(environment)):
                continue
            seen.add(name)
            pending.append(name)
            applying = [p for p in pinned[name] if not p.marker or p.marker.evaluate(environment)]
            assert [str(p.specifier) for p in applying] == [f"=={version(name)}"], name
    assert len(seen) > 40


def test_constraints_name_no_index_and_no_path() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|--|file:|@", text)
