"""Fixtures for all tests. Integration tests run on a real Kafka and a real Redis, always; none is skipped.

Both servers come from `CORTEX_TEST_KAFKA` and `CORTEX_TEST_REDIS_URL` when set, else from containers where
Docker answers, else from the packages of the extra `embedded`. They start at most once in a run.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams import testing
from streams.settings import Settings


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a real Kafka, shared by the whole run."""
    with testing.kafka_server(tmp_path_factory.mktemp("kafka")) as address:
        yield address


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Redis, shared by the whole run."""
    with testing.redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def settings(kafka: str, redis_url: str, tmp_path: Path) -> Iterator[Settings]:
    """A test's settings: both servers; its own topics, groups and keys, deleted afterwards; small timings."""
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
        shutdown_timeout_s=5,
    )
    yield own
    testing.end_spawned()
    testing.forget(own)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A developer's own `CORTEX_*` variables and `.env` say nothing in tests; spawned workers are ended."""
    for name in [n for n in os.environ if n.startswith("CORTEX_") and not n.startswith("CORTEX_TEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(Settings.model_config, "env_file", None)
    yield
    testing.end_spawned()
