"""TLS, SASL and access control: what workers and commands do, with the documented permissions alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import redis
from aiokafka.errors import KafkaConnectionError

from cortex_core.errors import ConfigError
from streams.connections import async_redis_client, explain, kafka_client_options, redis_client
from streams.kafka.topics import create_topics
from streams.settings import Settings
from streams.testing import async_wait_for, spawn_worker, wait_for
from streams.testing.workers import WorkerProcess
from tests.streams.redis_servers import administer
from tests.streams.secure_servers import (
    PASSWORD,
    USER,
    Certificates,
    SecureKafka,
    documented_acls,
    documented_redis_user,
    secure_kafka,
    secure_redis,
    settings_of,
)
from tests.streams.serving import body
from tests.streams.test_refusals import command

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("tls")]  # one Kafka for all


LESSER = {"topicless": "--topic", "groupless": "--group", "transactionless": "--transactional-id"}
"""Users of Kafka, and what they lack of the documented permissions."""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates") / "pem")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[SecureKafka]:
    with secure_kafka(tmp_path_factory.mktemp("kafka"), certificates) as kafka:
        kafka.add_users(USER, *LESSER)
        asyncio.run(kafka.permit(USER, documented_acls()))
        for user, missing in LESSER.items():
            asyncio.run(kafka.permit(user, [rule for rule in documented_acls() if missing not in rule]))
        yield kafka


@pytest.fixture(scope="module")
def redis_urls(
    tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> Iterator[tuple[str, str]]:
    with secure_redis(tmp_path_factory.mktemp("redis"), certificates) as urls:
        yield urls


def all_alive(workers: list[WorkerProcess]) -> bool:
    for worker in workers:
        assert worker.alive, worker.log_text()
    return True


async def learned(http: httpx.AsyncClient, than: int) -> int:
    """The served version if it is newer than `than`, else 0."""
    answer = await http.get("/v1/models/default")
    version = int(answer.json()["version"]) if answer.status_code == 200 else 0
    return version if version > than else 0


@pytest.mark.parametrize("protocol", ["SASL_SSL", "SSL"])
async def test_a_reply_becomes_a_version_over_tls_with_the_documented_permissions(
    server: SecureKafka, redis_urls: tuple[str, str], tmp_path: Path, protocol: str
) -> None:
    url, admin = redis_urls
    settings = settings_of(server.options(protocol), url, tmp_path)
    administer(admin, "ACL", "LOG", "RESET")
    workers = [spawn_worker(name, settings) for name in ("joiner", "trainer", "inference")]
    for worker in workers:
        await asyncio.to_thread(worker.wait_ready)
    async with httpx.AsyncClient(base_url=workers[-1].url, timeout=60) as http:
        before = (await http.get("/v1/models/default")).json().get("version", 0)
        decided = await http.post("/v1/decide", json=body(conversation_id=protocol))
        assert decided.status_code == 200, decided.text
        replied = await http.post(
            "/v1/replies", json={"conversation_id": protocol, "text": "Thanks, that worked!"}
        )
        assert replied.status_code == 202, replied.text
        await async_wait_for(
            lambda: learned(http, before) if all_alive(workers) else 0,
            "a version that has learned from the reply",
        )

    outputs = [worker.log_text() for worker in workers]
    for arguments in COMMANDS:
        done = await asyncio.to_thread(command, settings, *arguments)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        outputs.append(done.stdout + done.stderr)
    assert denied(admin) == set()

    arguments_of = [" ".join(psutil.Process(worker.pid).cmdline()) for worker in workers]
    for worker in workers:
        assert worker.stop() == 0, worker.log_text()
    assert not [text for text in (*outputs, *arguments_of) if PASSWORD in text]


COMMANDS = (
    ("topics", "create"),
    ("topics", "show"),
    ("status",),
    ("dead-letters", "list"),
    ("control", "pin"),
    ("control", "unpin"),
    ("rebuild", "--from", "beginning"),
    ("audit",),
)


def denied(admin: str) -> set[str]:
    """What Redis did not permit, but for the command with which redis-py introduces itself."""
    with redis.Redis.from_url(admin, decode_responses=True) as client:
        log = client.acl_log()
    return {entry["object"] for entry in log} - {"client|setinfo", "client"}


# --- refusals ---------------------------------------------------------------------------------------------


CAFILE = "CORTEX_KAFKA_SSL_CAFILE: the broker's certificate is not trusted"
CERTFILE = "CORTEX_KAFKA_SSL_CERTFILE: the broker refused this certificate, or its absence"
PROTOCOL = "CORTEX_KAFKA_SECURITY_PROTOCOL: the broker's listener uses another one"
WRONG: dict[str, tuple[str, dict[str, str | None], str]] = {
    "another authority": ("SASL_SSL", {"kafka_ssl_cafile": "{foreign.ca}"}, CAFILE),
    "the system's authorities": ("SSL", {"kafka_ssl_cafile": None}, CAFILE),
    "a host that is not the certificate's": ("SASL_SSL", {"kafka": "localhost:{ports[sasl]}"}, CAFILE),
    "no certificate": ("SSL", {"kafka_ssl_certfile": None, "kafka_ssl_keyfile": None}, CERTFILE),
    "a certificate of another authority": (
        "SSL",
        {"kafka_ssl_certfile": "{foreign.client}", "kafka_ssl_keyfile": "{foreign.client}"},
        CERTFILE,
    ),
    "no TLS": ("SSL", {"kafka_security_protocol": "PLAINTEXT"}, PROTOCOL),
    "no TLS, but SASL": ("SASL_SSL", {"kafka_security_protocol": "SASL_PLAINTEXT"}, PROTOCOL),
    "TLS where there is none": ("SASL_SSL", {"kafka": "{address}"}, PROTOCOL),
    "no SASL": ("SASL_SSL", {"kafka_security_protocol": "SSL"}, PROTOCOL),
}
"""By mistake: the listener, what differs from the settings that fit it (None: not set), and the message."""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of another authority."""
    return Certificates(tmp_path_factory.mktemp("foreign") / "pem")


# asyncio leaves the transport of a handshake that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", WRONG)
async def test_a_connection_that_kafka_closes_is_explained(
    server: SecureKafka, foreign: Certificates, tmp_path: Path, what: str
) -> None:
    protocol, changes, says = WRONG[what]
    names = {"foreign": foreign, "ports": server.ports, "address": server.address}
    options = server.options(protocol) | {k: v and v.format(**names) for k, v in changes.items()}
    settings = settings_of(options, "redis://127.0.0.1:1/0", tmp_path)
    with pytest.raises(KafkaConnectionError) as caught:
        await create_topics(settings)
    meaning = await explain(caught.value, settings)
    assert isinstance(meaning, ConfigError)
    assert says in str(meaning)
    assert PASSWORD not in str(meaning)


@pytest.mark.parametrize("missing", ["kafka_sasl_username", "kafka_sasl_password", "kafka_ssl_cafile"])
def test_what_a_client_needs_is_missed_before_it_connects(
    server: SecureKafka, tmp_path: Path, missing: str
) -> None:
    options = server.options("SASL_SSL")
    if missing == "kafka_ssl_cafile":
        options[missing] = str(tmp_path / "nothing.pem")
    else:
        del options[missing]
    with pytest.raises(ConfigError, match=f"CORTEX_{missing.upper()}"):
        kafka_client_options(settings_of(options, "redis://127.0.0.1:1/0", tmp_path))


@pytest.mark.parametrize("make", [redis_client, async_redis_client])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("rediss://h:1/0?ssl_ca_certs=/nowhere/ca.crt", "ssl_ca_certs.* cannot be read.*expected PEM files"),
        ("rediss://h:1/0?ssl_certfile=/nowhere/client.crt", "ssl_certfile.* cannot be read"),
        ("redis://h:1/0?ssl_ca_certs=/nowhere/ca.crt", "an option is unknown or invalid.*need rediss://"),
        ("redis://:s3cret@h:1/0?passwd=s3cret", "an option is unknown or invalid.*'passwd'"),
        ("redis://:s3cret@h:1/0?socket_timeout=s3cret", "an option is unknown or invalid.*socket_timeout"),
    ],
)
def test_an_option_of_the_redis_url_is_checked_before_it_connects(
    make: Callable[[Settings], object], url: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s)CORTEX_REDIS_URL.*{says}") as caught:
        make(Settings.load(redis_url=url))
    assert PASSWORD not in str(caught.value)


def end_refused(settings: Settings, says: str, *workers: str) -> None:
    """Workers end with exit code 2 and this message, without a password and a traceback."""
    for worker in [spawn_worker(name, settings) for name in workers]:
        wait_for(lambda: not worker.alive, f"the {worker.name} to end")  # noqa: B023
        assert worker.returncode == 2, worker.log_text()
        assert says in worker.log_text()
        assert PASSWORD not in worker.log_text()
        assert "Traceback" not in worker.log_text()


def test_servers_that_are_not_trusted_end_workers_and_commands(
    server: SecureKafka, redis_urls: tuple[str, str], foreign: Certificates, tmp_path: Path
) -> None:
    url, other = redis_urls[0], f"{redis_urls[0].partition('=')[0]}={foreign.ca}"
    kafka = server.options("SASL_SSL") | {"kafka_ssl_cafile": str(foreign.ca)}
    end_refused(settings_of(kafka, url, tmp_path), CAFILE, "joiner", "trainer", "inference")
    for arguments in (("topics", "show"), ("dead-letters", "list")):
        done = command(settings_of(kafka, url, tmp_path), *arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"cortex: {CAFILE}")

    says = "the server's certificate is not trusted; append ?ssl_ca_certs=FILE with its CA"
    settings = settings_of(server.options("SASL_SSL"), other, tmp_path)
    end_refused(settings, f"CORTEX_REDIS_URL {settings.redis_shown}: {says}", "joiner", "trainer")
    done = command(settings, "rebuild", "--from", "beginning")
    assert done.returncode == 2, done.stderr
    assert says in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("user", "worker"),
    [
        ("topicless", "inference"),
        ("topicless", "joiner"),
        ("groupless", "joiner"),
        ("groupless", "trainer"),
        ("transactionless", "trainer"),
    ],
)
def test_a_permission_of_kafka_that_is_missing_ends_a_worker(
    server: SecureKafka, redis_urls: tuple[str, str], tmp_path: Path, user: str, worker: str
) -> None:
    settings = settings_of(server.options("SASL_SSL", user), redis_urls[0], tmp_path)
    asyncio.run(create_topics(settings_of(server.options("SASL_SSL"), redis_urls[0], tmp_path)))
    end_refused(settings, "CORTEX_KAFKA_SASL_USERNAME: this user lacks a permission", worker)


def test_a_permission_of_redis_that_is_missing_ends_workers_and_commands(
    server: SecureKafka, redis_urls: tuple[str, str], tmp_path: Path
) -> None:
    url, admin = redis_urls
    administer(
        admin, *documented_redis_user()[:2], "lesser", *documented_redis_user()[3:], "-evalsha", "-ping"
    )
    lesser = url.replace(f"//{USER}:", "//lesser:")
    settings = settings_of(server.options("SASL_SSL"), lesser, tmp_path)
    says = f"CORTEX_REDIS_URL {settings.redis_shown}: the user lacks a permission"
    end_refused(settings, says, "joiner", "trainer")
    done = command(settings, "rebuild", "--from", "beginning")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"cortex: {says}")
