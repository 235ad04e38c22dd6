"""Kafka refuses the configuration of a process; aiokafka reports an unreachable broker or a timeout."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError

from cortex_core.errors import ConfigError, UnavailableError
from streams.connections import explain
from streams.inference.service import Service
from streams.kafka.topics import create_topics
from streams.settings import Settings
from streams.testing import async_wait_for, spawn_worker, wait_for
from streams.worker import config_error
from tests.streams.joined import partitions
from tests.streams.sasl_kafka import SaslKafka, sasl_kafka
from tests.streams.test_joiner_process import faust_worker
from tests.streams.test_refusals import command
from tests.streams.trainers import Running, for_trainers

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("sasl")]  # one Kafka for all

REFUSED = "CORTEX_KAFKA_SASL_USERNAME or CORTEX_KAFKA_SASL_PASSWORD: the broker refused them"
OTHER_PROTOCOL = "CORTEX_KAFKA_SECURITY_PROTOCOL: the broker's listener uses another one"
WRONG = {
    "password": ({"sasl_password": "wrong-secret"}, REFUSED),
    "user": ({"sasl_username": "nobody"}, REFUSED),
    "protocol": ({"security_protocol": "PLAINTEXT"}, OTHER_PROTOCOL),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SaslKafka]:
    with sasl_kafka(tmp_path_factory.mktemp("sasl"), "right-secret") as kafka:
        yield kafka


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("error", [KafkaConnectionError("Unable to bootstrap"), TimeoutError()])
async def test_a_refusal_is_found_behind_an_error_that_hides_it(
    server: SaslKafka, settings: Settings, wrong: str, error: Exception
) -> None:
    changes, says = WRONG[wrong]
    meaning = await explain(error, server.settings(settings, **changes))
    assert isinstance(meaning, ConfigError)
    assert says in str(meaning)
    assert server.address in str(meaning)
    assert "secret" not in str(meaning)


async def test_with_the_right_password_the_same_errors_are_transient(
    server: SaslKafka, settings: Settings
) -> None:
    right = server.settings(settings)
    assert len(await create_topics(right)) > 0
    assert isinstance(await explain(TimeoutError(), right), UnavailableError)


def test_refused_workers_and_commands_end_at_their_start(server: SaslKafka, settings: Settings) -> None:
    changes, says = WRONG["password"]
    refused = server.settings(settings, **changes)
    workers = [spawn_worker(name, refused) for name in ("joiner", "trainer", "inference")]
    topics = command(refused, "topics", "show")
    for worker in workers:
        wait_for(lambda: not worker.alive, f"the {worker.name} to end")  # noqa: B023
    for worker in workers:
        assert worker.returncode == 2, worker.log_text()
        assert says in worker.log_text()
    assert topics.returncode == 2, topics.stderr
    assert topics.stderr.splitlines()[-1].startswith(f"cortex: {says}")
    for text in (topics.stderr, *(worker.log_text() for worker in workers)):
        assert "secret" not in text
        assert "Traceback" not in text


async def test_workers_end_when_the_password_changes_while_they_run(
    server: SaslKafka, settings: Settings
) -> None:
    own = for_trainers(server.settings(settings))
    trainer, service = Running(own), Service(own)
    async with asyncio.TaskGroup() as group:
        training = group.create_task(ending(trainer.trainer.run()))
        await service.start()
        await async_wait_for(lambda: not trainer.worker.missing, "the trainer to be ready")
        serving = group.create_task(ending(service.until_refused()))
        await server.stop()
        server.password = "new-secret"
        await server.start()
    await service.stop()
    for error in (training.result(), serving.result()):
        assert REFUSED in str(error)
        assert "secret" not in str(error)


async def test_joiners_end_when_the_password_changes_while_they_run(
    server: SaslKafka, settings: Settings
) -> None:
    own = for_trainers(server.settings(settings))
    log = settings.data / "faust.log"
    joiner, standalone = spawn_worker("joiner", own).wait_ready(), faust_worker(own, log)
    try:
        await async_wait_for(
            lambda: len(partitions(joiner)) == 4, "each joiner to own half of the partitions"
        )
        await server.stop()
        server.password = "newer-secret"
        await server.start()
        await async_wait_for(lambda: not joiner.alive, "the joiner to end")
        await async_wait_for(lambda: standalone.poll() is not None, "the standalone joiner to end")
    finally:
        standalone.kill()
        standalone.wait()
    for code, output in ((joiner.returncode, joiner.log_text()), (standalone.returncode, log.read_text())):
        assert code == 2, output
        assert REFUSED in output
        assert "secret" not in output
        assert "Traceback" not in output


async def ending(work: Coroutine[Any, Any, object]) -> ConfigError | None:
    """The configuration error that `work` ends with."""
    try:
        await work
    except Exception as error:
        return config_error(error)
    return None
