"""The classification of errors of real servers: transient, configuration, or neither."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from aiokafka import AIOKafkaProducer
from aiokafka import errors as kafka_errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis import exceptions as redis_errors

from cortex_core.errors import ConfigError, InputError, UnavailableError
from streams.connections import async_redis_client, explain, redis_client, retry
from streams.failures import is_transient
from streams.local.embedded import free_port
from streams.settings import Settings
from streams.testing import async_wait_for, wait_for
from tests.streams.redis_servers import NOWHERE, administer, own_redis

SCRIPT = "return redis.call('SET', KEYS[1], 'x')"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis for these tests, which change its configuration."""
    with own_redis(tmp_path_factory.mktemp("failures")) as url:
        yield url


@pytest.fixture
def at(server: str, settings: Settings) -> Iterator[Settings]:
    """Settings with that Redis, whose configuration is restored afterwards."""
    with redis.Redis.from_url(server, single_connection_client=True) as client:
        client.ping()  # connects, so that a password set later does not apply to this connection
        yield settings.model_copy(update={"redis_url": Settings.load(redis_url=server).redis_url})
        client.execute_command("REPLICAOF", "NO", "ONE")
        client.config_set("replica-serve-stale-data", "yes")
        client.config_set("maxmemory", 0)
        client.config_set("min-replicas-to-write", 0)
        client.config_set("save", "")
        client.config_set("requirepass", "")
        client.acl_deluser("limited")
        client.flushall()


def raised(work: Callable[[], object]) -> Exception:
    """The exception that `work` raises."""
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def demoted(url: str) -> None:
    administer(url, "REPLICAOF", *NOWHERE)


def stale(url: str) -> None:
    demoted(url)
    administer(url, "CONFIG", "SET", "replica-serve-stale-data", "no")


def full(url: str) -> None:
    administer(url, "CONFIG", "SET", "maxmemory", 1)


def alone(url: str) -> None:
    administer(url, "CONFIG", "SET", "min-replicas-to-write", 1)


def unable_to_save(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        folder = Path(client.config_get("dir")["dir"])
        (folder / "taken").mkdir(exist_ok=True)
        client.config_set("dbfilename", "taken")
        client.config_set("save", "3600 1")
        client.bgsave()
        wait_for(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "it to fail")


@pytest.mark.parametrize("condition", [demoted, stale, full, alone, unable_to_save])
@pytest.mark.parametrize("way", ["command", "script", "pipeline", "script in a pipeline"])
async def test_a_redis_that_cannot_serve_now_is_transient(
    at: Settings, condition: Callable[[str], None], way: str
) -> None:
    condition(at.redis_address)

    def use() -> None:
        with redis_client(at) as client:
            pipe = client.pipeline(transaction=False)
            match way:
                case "command":
                    client.set("k", "v")
                case "script":
                    client.eval(SCRIPT, 1, "k")
                case "pipeline":
                    pipe.set("k", "v").execute()
                case "script in a pipeline":
                    pipe.eval(SCRIPT, 1, "k").execute()

    error = raised(use)
    assert isinstance(error, redis.RedisError)
    assert is_transient(error), error
    assert isinstance(await explain(error, at), UnavailableError)
    assert at.redis_shown in str(await explain(error, at))


async def test_an_endless_script_is_transient(at: Settings) -> None:
    administer(at.redis_address, "CONFIG", "SET", "lua-time-limit", 1)
    endless = threading.Thread(
        target=lambda: raised(lambda: administer(at.redis_address, "EVAL", "while true do end", 0))
    )
    endless.start()

    def answer() -> Exception | None:
        try:
            administer(at.redis_address, "GET", "k")
        except redis.RedisError as error:
            return error
        return None

    busy = wait_for(answer, "BUSY")
    administer(at.redis_address, "SCRIPT", "KILL")
    endless.join()
    assert str(busy).startswith("BUSY")
    assert is_transient(busy)


def test_a_cluster_without_its_slots_is_transient(tmp_path: Path) -> None:
    with own_redis(tmp_path, "--cluster-enabled", "yes") as url:
        error = raised(lambda: administer(url, "GET", "k"))
    assert isinstance(error, redis_errors.ClusterDownError)
    assert is_transient(error)


async def test_servers_that_are_unreachable_or_silent_are_transient(settings: Settings) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        refused = f"redis://127.0.0.1:{free_port()}/0"
        mute = f"redis://127.0.0.1:{silent.getsockname()[1]}/0?socket_timeout=0.1"
        for url in (refused, mute, "redis://no-such-host.invalid/0"):
            elsewhere = settings.model_copy(update={"redis_url": Settings.load(redis_url=url).redis_url})
            with redis_client(elsewhere) as client:
                error = raised(client.ping)
            assert is_transient(error), error
            assert isinstance(await explain(error, elsewhere), UnavailableError)

    nobody = settings.model_copy(update={"kafka": f"127.0.0.1:{free_port()}"})
    producer = AIOKafkaProducer(bootstrap_servers=nobody.kafka_address)
    with pytest.raises(kafka_errors.KafkaConnectionError) as caught:
        await producer.start()
    await producer.stop()
    assert is_transient(caught.value)
    meaning = await explain(caught.value, nobody)
    assert isinstance(meaning, UnavailableError)
    assert nobody.kafka_address in str(meaning)


def wrong_password(url: str) -> str:
    administer(url, "CONFIG", "SET", "requirepass", "right")
    return url.replace("//", "//:wrong@")


def no_password(url: str) -> str:
    administer(url, "CONFIG", "SET", "requirepass", "right")
    return url


def no_permission(url: str) -> str:
    administer(url, "ACL", "SETUSER", "limited", "on", ">right", "~*", "+ping", "+eval")
    return url.replace("//", "//limited:right@")


def no_database(url: str) -> str:
    return url.removesuffix("0") + "99"


@pytest.mark.parametrize("way", ["command", "script"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (wrong_password, "refused the password"),
        (no_password, "refused the password"),
        (no_permission, "lacks a permission"),
        (no_database, "no such database"),
    ],
)
async def test_configuration_errors_of_redis_name_the_setting(
    at: Settings, wrong: Callable[[str], str], says: str, way: str
) -> None:
    url = wrong(at.redis_address)
    refused = at.model_copy(update={"redis_url": Settings.load(redis_url=url).redis_url})
    with redis_client(refused) as client:
        error = raised(lambda: client.set("k", "v") if way == "command" else client.eval(SCRIPT, 1, "k"))
    async with async_redis_client(refused) as aio:
        with pytest.raises(type(error)) as caught:
            await (aio.set("k", "v") if way == "command" else aio.eval(SCRIPT, 1, "k"))
    for each in (error, caught.value):
        assert not is_transient(each)
        meaning = await explain(each, refused)
        assert isinstance(meaning, ConfigError)
        assert "CORTEX_REDIS_URL" in str(meaning)
        assert says in str(meaning)
        assert not any(secret in str(meaning) for secret in ("wrong", "right@"))


@pytest.mark.parametrize(
    "command", [("LPUSH", "k", "v"), ("EVAL", "return nil + 1", 0), ("NO-SUCH-COMMAND",)]
)
async def test_errors_of_one_key_or_script_are_neither(at: Settings, command: tuple[Any, ...]) -> None:
    administer(at.redis_address, "SET", "k", "a string")
    error = raised(lambda: administer(at.redis_address, *command))
    assert isinstance(error, redis.ResponseError)
    assert not is_transient(error)
    assert await explain(error, at) is None


def test_a_value_is_not_mistaken_for_an_error_reply(at: Settings) -> None:
    """A pipeline's error contains the command with its arguments, which can be anything."""
    administer(at.redis_address, "SET", "k", "a string")
    with redis_client(at) as client:
        pipe = client.pipeline(transaction=False)
        pipe.lpush("k", "READONLY ", "@user_script: 1: -OOM ")
        error = raised(pipe.execute)
    assert "READONLY" in str(error)
    assert not is_transient(error)


async def test_what_kafka_refuses(settings: Settings) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)
    await admin.start()
    try:
        topic = f"{settings.topic_prefix}.refused"
        answer = await admin.create_topics([NewTopic(topic, 1, 99)])
        refused = kafka_errors.for_code(answer.topic_errors[0][1])()
        await admin.create_topics([NewTopic(topic, 1, 1, topic_configs={"max.message.bytes": "100"})])
    finally:
        await admin.close()
    meaning = await explain(refused, settings)
    assert isinstance(meaning, ConfigError)
    assert "CORTEX_REPLICATION_FACTOR" in str(meaning)

    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_address)
    await producer.start()
    try:
        with pytest.raises(kafka_errors.MessageSizeTooLargeError) as caught:
            await producer.send_and_wait(topic, b"x" * 1000)
    finally:
        await producer.stop()
    assert not is_transient(caught.value)
    assert await explain(caught.value, settings) is None


@pytest.mark.parametrize(
    ("error", "transient", "configuration"),
    [
        (redis_errors.BusyLoadingError("Redis is loading the dataset in memory"), True, False),
        (redis_errors.TryAgainError("Multiple keys request during rehashing of slot"), True, False),
        (redis_errors.NoScriptError("No matching script. Please use EVAL."), True, False),
        (redis_errors.MovedError("3999 127.0.0.1:6381"), False, True),
        (redis_errors.DataError("Invalid input of type"), False, False),
        (kafka_errors.NotLeaderForPartitionError(), True, False),
        (kafka_errors.NotEnoughReplicasError(), True, False),
        (kafka_errors.KafkaTimeoutError(), True, False),
        (kafka_errors.RebalanceInProgressError(), True, False),
        (kafka_errors.KafkaError("Unable to get cluster metadata over all known brokers"), True, False),
        (kafka_errors.SaslAuthenticationFailed("Authentication failed"), False, True),
        (kafka_errors.UnsupportedSaslMechanismError(), False, True),
        (kafka_errors.TopicAuthorizationFailedError("t"), False, True),
        (kafka_errors.GroupAuthorizationFailedError("g"), False, True),
        (kafka_errors.TransactionalIdAuthorizationFailed(), False, True),
        (kafka_errors.ProducerFenced(), False, False),
        (kafka_errors.IllegalStateError("not assigned"), False, False),
        (kafka_errors.RecordTooLargeError(), False, False),
        (ConnectionResetError(104, "Connection reset by peer"), True, False),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed"), True, False),
        (TimeoutError(), True, False),
        (UnavailableError("not connected yet"), True, False),
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), False, True),
        (FileNotFoundError(2, "No such file or directory"), False, False),
        (InputError("an event"), False, False),
        (ValueError("a bug"), False, False),
    ],
)
async def test_each_error_has_one_of_three_meanings(
    settings: Settings, error: Exception, transient: bool, configuration: bool
) -> None:
    assert is_transient(error) == transient
    meaning = await explain(error, settings)
    assert isinstance(meaning, ConfigError) == configuration
    assert isinstance(meaning, UnavailableError) == transient
    assert (meaning is None) == (not transient and not configuration)


async def test_retry_waits_for_a_server_and_reports_its_answer(at: Settings) -> None:
    said: list[tuple[str, str]] = []
    demoted(at.redis_address)
    client = async_redis_client(at)
    waiting = asyncio.create_task(
        retry(lambda: client.set("k", "v"), at, lambda need, why: said.append((need, why)))
    )
    await async_wait_for(lambda: len(said) >= 2, "two failures")
    administer(at.redis_address, "REPLICAOF", "NO", "ONE")
    assert await waiting
    await client.aclose()
    need, why = said[0]
    assert need == "redis"
    assert "READONLY" in why or "read only replica" in why
    assert at.redis_shown in why


async def test_retry_raises_errors_that_are_not_transient(at: Settings) -> None:
    administer(at.redis_address, "SET", "k", "a string")
    async with async_redis_client(at) as client:
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            await retry(lambda: client.lpush("k", "v"), at)
    elsewhere = no_database(at.redis_address)
    wrong = at.model_copy(update={"redis_url": Settings.load(redis_url=elsewhere).redis_url})
    async with async_redis_client(wrong) as client:
        with pytest.raises(ConfigError, match="CORTEX_REDIS_URL"):
            await retry(lambda: client.get("k"), wrong)


@pytest.mark.parametrize("kind", ["threads", "event loop"])
async def test_connections_to_a_demoted_primary_are_closed(at: Settings, kind: str) -> None:
    """A new connection resolves the address again, and so reaches the new primary after a failover."""

    def connections() -> set[str]:
        with redis.Redis.from_url(at.redis_address) as admin:
            return {c["id"] for c in admin.client_list() if c["name"] == "observed"}

    named = f"{at.redis_address}?client_name=observed"
    observed = at.model_copy(update={"redis_url": Settings.load(redis_url=named).redis_url})
    client = async_redis_client(observed) if kind == "event loop" else None
    blocking = redis_client(observed)

    async def write(way: str) -> object:
        if client is not None:
            return await (client.set("k", "v") if way == "command" else client.eval(SCRIPT, 1, "k"))
        return blocking.set("k", "v") if way == "command" else blocking.eval(SCRIPT, 1, "k")

    try:
        for way in ("command", "script"):
            administer(at.redis_address, "REPLICAOF", "NO", "ONE")
            await write(way)
            before = connections()
            assert len(before) == 1
            demoted(at.redis_address)
            with pytest.raises(redis.RedisError):
                await write(way)
            assert not before & connections()
    finally:
        blocking.close()
        if client is not None:
            await client.aclose()
