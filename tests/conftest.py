"""Fixtures for all tests. Integration tests always run on a real Kafka and a real Redis; none is skipped.

Both servers come from `CORTEX_TEST_KAFKA` and `CORTEX_TEST_REDIS_URL` if set, else from containers if Docker
runs, else from the packages of the extra `embedded`. The processes of a test run share one Kafka, and each
has a Redis of its own, which some tests configure; the first lines of a run name them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from pydantic import SecretStr

from streams import testing
from streams.settings import Settings
from streams.testing import servers
from tests.guaranteed import DOCUMENTS, GuaranteedTests, named_tests

SERVERS = pytest.StashKey[Path]()
"""The folder of this process's Redis; Kafka's, which all processes of a run share, is its parent."""


def pytest_configure(config: pytest.Config) -> None:
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)  # set in a process of pytest-xdist
    if worker is None:
        folder = tempfile.TemporaryDirectory(prefix="cortex-test-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        config.stash[SERVERS] = Path(folder.name) / "gw0"
        config.pluginmanager.register(GuaranteedTests(set().union(*map(named_tests, DOCUMENTS))))
    else:
        config.stash[SERVERS] = Path(worker["servers"]) / worker["workerid"]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["servers"] = str(node.config.stash[SERVERS].parent)


def pytest_report_header(config: pytest.Config) -> list[str]:
    shared, processes = config.stash[SERVERS].parent, len(config.getoption("tx", None) or ()) or 1
    urls = {servers.redis_url(shared / f"gw{n}") for n in range(processes)}
    shown = {
        f"Kafka: {servers.source(servers.KAFKA_VARIABLES)}": {servers.kafka_address(shared)},
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
    """host:port of a real Kafka, shared by all tests of this run."""
    with _shared_kafka(pytestconfig.stash[SERVERS].parent) as address:
        yield address


@contextlib.contextmanager
def _shared_kafka(folder: Path) -> Iterator[str]:
    """The first process to ask starts it, and stops it once no other uses it."""
    folder.mkdir(parents=True, exist_ok=True)
    address, starting = folder / "kafka.address", FileLock(folder / "kafka.starting")
    with (folder / "kafka.users").open("w") as users, contextlib.ExitStack() as stack:
        with starting:
            started_here = not address.exists()
            if started_here:
                address.write_text(stack.enter_context(testing.kafka_server(folder)))
            fcntl.flock(users, fcntl.LOCK_SH)  # until this file is closed, also by a crash
        yield address.read_text()
        if started_here:
            with starting:
                fcntl.flock(users, fcntl.LOCK_EX)
                address.unlink()
                stack.close()


@pytest.fixture(scope="session")
def redis_url(pytestconfig: pytest.Config) -> Iterator[str]:
    """URL of a real Redis, shared by all tests of this process alone."""
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
