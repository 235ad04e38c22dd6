"""The source of the tests' servers: there is no silent fallback."""

from __future__ import annotations

import os
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from streams.testing.servers import REDIS_VARIABLES, redis_server, source


class FullEngine(BaseHTTPRequestHandler):
    """A Docker engine that answers every request with an error."""

    def do_GET(self) -> None:
        known = self.path.endswith("/version")
        self._answer(200 if known else 500, '{"ApiVersion": "1.44"}' if known else '{"message": "no space"}')

    def do_POST(self) -> None:
        self._answer(500, '{"message": "no space"}')

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def address_string(self) -> str:
        return "docker"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def full_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    path = tmp_path / "docker.sock"
    with socketserver.ThreadingUnixStreamServer(str(path), FullEngine) as engine:
        thread = threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        yield
        engine.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in REDIS_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("full_engine")
def test_a_docker_engine_that_answers_but_fails_is_an_error(tmp_path: Path) -> None:
    from docker.errors import APIError

    assert source(REDIS_VARIABLES) == "container"
    with pytest.raises(APIError, match="no space"), redis_server(tmp_path):
        pass


def test_without_an_engine_the_embedded_server_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no-such.sock")
    assert source(REDIS_VARIABLES) == "embedded"


@pytest.mark.usefixtures("full_engine")
def test_a_configured_server_is_used_before_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REDIS_VARIABLES[0], "redis://:secret@elsewhere:6379/0")
    with redis_server(tmp_path) as url:
        assert url == "redis://:secret@elsewhere:6379/0"


def test_a_run_names_its_servers_first_and_shows_no_secret() -> None:
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-n", "2", "tests/test_docs.py"],
        cwd=Path(__file__).parent.parent.parent,
        env={
            **os.environ,
            "CORTEX_TEST_KAFKA": "",
            "CORTEX_TEST_REDIS_URL": "redis://me:secret@elsewhere:6379/0",
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    first = said.splitlines()[:5]
    assert "Redis: environment, redis://elsewhere:6379/0" in first
    assert any(re.fullmatch(r"Kafka: (embedded|container), 127.0.0.1:\d+", line) for line in first)
    assert "secret" not in said
