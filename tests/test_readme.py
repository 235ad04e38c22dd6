"""Every command and snippet of the README is run. A block that this test does not know how to run fails."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from streams.settings import default_cache_dir
from streams.testing import wait_for

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL))
OWN_SERVERS = "With your own Kafka and Redis"
ALONE = "Use the learner alone"
RUN_FOR_LONG = ("up", "joiner", "trainer", "inference")


on_one_stack = pytest.mark.xdist_group("readme")


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def commands(section: str) -> list[str]:
    text = "".join(blocks(section, "sh")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def environment(home: Path) -> dict[str, str]:
    """A newcomer's: an empty home, the virtual environment's programs on the path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CORTEX_")}
    return kept | {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CORTEX_CACHE": str(default_cache_dir()),  # the broker's jars: not downloaded again for this test
        "CORTEX_ENCODER": "hashing",
    }


class LongCommand:
    """A command that runs until it is told to stop."""

    def __init__(self, line: str, env: dict[str, str], cwd: Path) -> None:
        self.line = line
        self.output = cwd / f"{re.sub(r'[^a-z]+', '-', line)}.log"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                shlex.split(line), env=env, cwd=cwd, stdout=file, stderr=subprocess.STDOUT
            )

    def text(self) -> str:
        assert self.process.poll() is None, f"{self.line} ended by itself:\n{self.output.read_text()}"
        return self.output.read_text()

    def wait_until_it_works(self) -> str:
        """The first HTTP address it serves, once that is ready."""

        def address() -> str | None:
            found = re.search(
                r"Agents connect to\s+(http://\S+)|address=(http://[\d.:]+)|\"address\": \"(http[^\"]+)",
                re.sub(r"\x1b\[[\d;]*m", "", self.text()),
            )
            return next(filter(None, found.groups())) if found else None

        url = str(wait_for(address, f"the address of `{self.line}`"))
        wait_for(lambda: self.is_ready(url), f"`{self.line}` to be ready at {url}")
        return url

    def is_ready(self, url: str) -> bool:
        self.text()
        try:
            return httpx.get(f"{url}/readyz", verify=False).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        code = self.process.wait()
        assert code == 0, f"{self.line} exited with {code} on {number.name}:\n{self.output.read_text()}"

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def run(line: str, env: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(line, shell=True, check=False, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"`{line}` exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def run_command(line: str, env: dict[str, str], cwd: Path) -> None:
    """Runs one line of a shell block to its end; `export` changes the environment of the lines after it."""
    words = shlex.split(line)
    match words:
        case ["export", assignment]:
            name, _, value = assignment.partition("=")
            env[name] = value
        case ["make", target]:
            # `.ci/run` runs these two for real; here only that they exist, since one of them runs this test.
            run(f"make -n {target}", env, ROOT)
            assert f"make {target}" in (ROOT / ".ci" / "run").read_text()
        case ["docker", "compose", "up", *options]:
            # There need be no engine: what the line names must exist.
            services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
            scaled = {o.partition("=")[0] for o in options if "=" in o}
            assert scaled <= set(services), f"{scaled - set(services)} is no service of docker-compose.yml"
        case ["cortex", command, *_] if command in RUN_FOR_LONG:
            process = LongCommand(line, env, cwd)
            try:
                process.wait_until_it_works()
                process.stop(signal.SIGTERM)
            finally:
                process.kill()
        case ["cortex" | "curl", *_]:
            output = run(line, env, cwd)
            if words[0] == "curl":
                assert "error" not in json.loads(output), output
        case _:
            raise AssertionError(f"the README has a command that this test cannot run: {line}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """`cortex up`, as the README has it, running while the other blocks run."""
    assert "cortex up" in commands("Use it")
    process = LongCommand("cortex up", environment(home), home)
    try:
        yield process.wait_until_it_works()
        process.stop(signal.SIGINT)
    finally:
        process.kill()
        # Shown where a test fails.
        for log in (process.output, *sorted(home.rglob("logs/*.log"))):
            sys.stderr.write(f"--- {log.name}\n{log.read_text(errors='replace')[-2_000:]}\n")


@on_one_stack
@pytest.mark.parametrize("section", [s for s in SECTIONS if s not in (OWN_SERVERS, ALONE) and commands(s)])
def test_commands(section: str, url: str, home: Path) -> None:
    env = environment(home)
    for line in commands(section):
        if line != "cortex up":
            run_command(line.replace("http://127.0.0.1:8080", url), env, home)


@on_one_stack  # two stacks that start at the same moment can choose the same free port
def test_commands_with_own_servers(kafka: str, redis_url: str, tmp_path: Path) -> None:
    env = environment(tmp_path) | {"CORTEX_TOPIC_PREFIX": "readme"}
    for line in commands(OWN_SERVERS):
        for shown, real in (("localhost:9092", kafka), ("redis://localhost:6379/0", redis_url)):
            line = line.replace(shown, real)  # noqa: PLW2901 - the one change: where the servers are
        run_command(line, env, tmp_path)


@on_one_stack
def test_agent_example(url: str, home: Path) -> None:
    [snippet] = blocks("Use it", "python")
    printed = run_python(snippet.replace("http://127.0.0.1:8080", url), home)
    assert re.match(r"\w+ \['m\d', 'm\d', 'm\d'\] [01]\.\d+ (proceed|hedge|escalate)", printed), printed


def test_learner_example(tmp_path: Path) -> None:
    [snippet] = blocks(ALONE, "python")
    printed = run_python(snippet, tmp_path)
    reward, signals = printed.split(" ", 1)
    assert 0.5 <= float(reward) <= 1.0
    assert "positive" in signals
    assert (tmp_path / "replay.jsonl").exists()


def run_python(snippet: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", snippet], check=False, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_section_with_code_is_covered() -> None:
    languages = set(re.findall(r"^```(\w*)$", README, re.MULTILINE)) - {""}
    assert languages == {"sh", "python"}, "a new kind of block needs a way to run it here"
    with_python = {s for s in SECTIONS if blocks(s, "python")}
    assert with_python == {"Use it", ALONE}, "each Python block needs its test here"
