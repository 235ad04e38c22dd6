"""A real Kafka and a real Redis: configured ones, else containers if Docker runs, else embedded servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from aiokafka.admin import AIOKafkaAdminClient
from redis import Redis

from streams.kafka.clients import started
from streams.local.embedded import EmbeddedKafka, EmbeddedRedis, EmbeddedServer, remembered_port
from streams.settings import Settings, default_cache_dir
from streams.testing.waiting import wait_for

KAFKA_IMAGE = "apache/kafka:4.3.1"
REDIS_IMAGE = "redis:7-alpine"
KAFKA_VARIABLES = ("CORTEX_TEST_KAFKA", "CORTEX_KAFKA")
REDIS_VARIABLES = ("CORTEX_TEST_REDIS_URL", "CORTEX_REDIS_URL")
Source = Literal["environment", "container", "embedded"]


@contextlib.contextmanager
def kafka_server(folder: Path) -> Iterator[str]:
    """host:port of a Kafka from `source`; a server that this starts is stopped at the end.

    Args:
        folder: for the data and the log of an embedded server.

    Raises:
        docker.errors.DockerException: the Docker engine answers but cannot run the image.
        UnavailableError: the embedded server did not start.
    """
    address = kafka_address(folder)
    match source(KAFKA_VARIABLES):
        case "environment":
            yield address
        case "container":
            port = int(address.rpartition(":")[2])
            variables = {
                "KAFKA_NODE_ID": "1",
                "KAFKA_PROCESS_ROLES": "broker,controller",
                "KAFKA_LISTENERS": f"PLAINTEXT://:{port},CONTROLLER://:9093",
                "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://{address}",
                "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
                "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
                "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
                "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
                "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
                "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
                "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
                "KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS": "1000",
                "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
            }
            with _container(KAFKA_IMAGE, {port: port}, variables):
                wait_for(lambda: asyncio.run(_kafka_answers(address)), f"Kafka at {address}")
                yield address
        case "embedded":
            kafka = EmbeddedKafka(folder, default_cache_dir())
            with _started(kafka):
                yield kafka.address


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """URL of a Redis; otherwise like `kafka_server`."""
    url = redis_url(folder)
    match source(REDIS_VARIABLES):
        case "environment":
            yield url
        case "container":
            with _container(REDIS_IMAGE, {6379: _port(folder, "redis")}, {}):
                wait_for(lambda: _redis_answers(url), f"Redis at {url}")
                yield url
        case "embedded":
            redis = EmbeddedRedis(folder)
            with _started(redis):
                yield redis.url


def kafka_address(folder: Path) -> str:
    """host:port of `kafka_server(folder)`, also before it runs."""
    return _configured(KAFKA_VARIABLES) or f"127.0.0.1:{_port(folder, 'kafka')}"


def redis_url(folder: Path) -> str:
    """URL of `redis_server(folder)`, also before it runs."""
    return _configured(REDIS_VARIABLES) or f"redis://127.0.0.1:{_port(folder, 'redis')}/0"


def _port(folder: Path, name: str) -> int:
    return remembered_port(folder / name, name)  # as an embedded server does


def source(variables: Sequence[str]) -> Source:
    """The source of a server: the environment if a variable is set, else Docker, else embedded."""
    if _configured(variables):
        return "environment"
    return "container" if find_spec("testcontainers") and _docker_listens() else "embedded"


def _configured(variables: Sequence[str]) -> str:
    return next(filter(None, map(os.environ.get, variables)), "")


def _docker_listens() -> bool:
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not host.startswith("unix://"):
        return True  # configured explicitly, so an engine is expected
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(host.removeprefix("unix://")) == 0


@contextlib.contextmanager
def _container(image: str, ports: dict[int, int], variables: dict[str, str]) -> Iterator[None]:
    """Runs the image with each port of the container bound to a port of this machine."""
    from testcontainers.core.container import DockerContainer  # noqa: PLC0415 - of the extra `dev`

    it = DockerContainer(image).with_envs(**variables)
    for inside, outside in ports.items():
        it.with_bind_ports(inside, outside)
    with it:
        yield


@contextlib.contextmanager
def _started(server: EmbeddedServer) -> Iterator[None]:
    asyncio.run(server.start())
    try:
        yield
    finally:
        asyncio.run(server.stop())


async def _kafka_answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.close()
        async with started(AIOKafkaAdminClient(bootstrap_servers=address)) as admin:
            await admin.list_topics()
    except Exception:
        return False
    return True


def _redis_answers(url: str) -> bool:
    try:
        with Redis.from_url(url) as client:
            return bool(client.ping())
    except Exception:
        return False


def delete_all(settings: Settings) -> None:
    """Deletes all topics and keys with the settings' prefix."""

    async def delete_topics() -> None:
        async with started(AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)) as admin:
            mine = [t for t in await admin.list_topics() if t.startswith(f"{settings.topic_prefix}.")]
            if mine:
                await admin.delete_topics(mine)

    asyncio.run(delete_topics())
    with Redis.from_url(settings.redis_address) as client:
        for keys in iter(lambda: list(client.scan_iter(f"{settings.topic_prefix}:*", count=1000)), []):
            client.delete(*keys)
