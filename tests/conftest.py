"""Fixtures for all tests. Integration tests always run on a real Kafka and a real Redis; none is skipped.

Both servers come from `CORTEX_TEST_KAFKA` and `CORTEX_TEST_REDIS_URL` if set, else from containers if Docker
runs, else from the packages of the extra `embedded`. Each process of a test run starts them at most once; the
first lines of a run name them.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from streams import testing
from streams.settings import Settings
from streams.testing import servers

SERVERS = pytest.StashKey[Path]()
"""The folder of this process's servers."""


def pytest_configure(config: pytest.Config) -> None:
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)  # set in a process of pytest-xdist
    if worker is None:
        folder = tempfile.TemporaryDirectory(prefix="cortex-test-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        config.stash[SERVERS] = Path(folder.name)
    else:
        config.stash[SERVERS] = Path(worker["servers"]) / worker["workerid"]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["servers"] = str(node.config.stash[SERVERS])


def pytest_report_header(config: pytest.Config) -> list[str]:
    own, processes = config.stash[SERVERS], len(config.getoption("tx", None) or ())
    folders = [own / f"gw{n}" for n in range(processes)] or [own]
    urls = {servers.redis_url(folder) for folder in folders}
    shown = {
        f"Kafka: {servers.source(servers.KAFKA_VARIABLES)}": {servers.kafka_address(f) for f in folders},
        f"Redis: {servers.source(servers.REDIS_VARIABLES)}": {
            Settings.model_construct(redis_url=SecretStr(url)).redis_shown for url in urls
        },
    }
    return [f"{server}, {', '.join(sorted(addresses))}" for server, addresses in shown.items()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: the many short ones then fill the end, and no process idles while another works."""
    items.sort(key=lambda item: not {"kafka", "redis_url"} & set(getattr(item, "fixturenames", ())))


@pytest.fixture(scope="session")
def kafka(pytestconfig: pytest.Config) -> Iterator[str]:
    """host:port of a real Kafka, shared by all tests of this process."""
    with testing.kafka_server(pytestconfig.stash[SERVERS]) as address:
        yield address


@pytest.fixture(scope="session")
def redis_url(pytestconfig: pytest.Config) -> Iterator[str]:
    """URL of a real Redis, shared by all tests of this process."""
    with testing.redis_server(pytestconfig.stash[SERVERS]) as url:
        yield url


@pytest.fixture
def settings(kafka: str, redis_url: str, tmp_path: Path) -> Iterator[Settings]:
    """Settings of one test: short times, and its own topics, groups and keys, deleted at the end."""
    prefix = f"test-{uuid.uuid4().hex[:10]}"
    own = Settings.load(
        kafka=kafka,
        redis_url=redis_url,
        data=tmp_path,
        topic_prefix=prefix,
        # Else a worker that the test before has killed is a member of this test's groups for a while.
        partitions=2,
        encoder="hashing",
        port=0,
        publish_interval_s=0.05,
        shutdown_timeout_s=60,
    )
    yield own
    testing.end_spawned()
    testing.delete_all(own)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hides a developer's `CORTEX_*` variables and `.env` from tests; ends spawned workers."""
    for name in [n for n in os.environ if n.startswith("CORTEX_") and not n.startswith("CORTEX_TEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(Settings.model_config, "env_file", None)
    yield
    testing.end_spawned()
