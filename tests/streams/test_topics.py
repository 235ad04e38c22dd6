"""Topics: what they promise is set at their creation, and checked at every start."""

from __future__ import annotations

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from structlog.testing import capture_logs

from cortex_core.errors import ConfigError
from streams.connections import kafka_client_options
from streams.kafka.clients import started
from streams.kafka.topics import Topics, create_topics, describe_topics
from streams.settings import Settings
from streams.testing import spawn_worker, wait_for
from tests.streams.test_refusals import command

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(("copies", "wanted"), [(1, 1), (2, 1), (3, 2), (5, 2)])
def test_an_event_is_in_two_copies_where_there_are_three_or_more(copies: int, wanted: int) -> None:
    settings = Settings.load(replication_factor=copies)
    assert settings.min_insync_replicas == wanted
    for spec in Topics.of(settings).specs():
        assert spec.config["min.insync.replicas"] == str(wanted)


def test_more_copies_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"CORTEX_MIN_INSYNC_REPLICAS: .*at most CORTEX_REPLICATION_FACTOR"):
        Settings.load(replication_factor=2, min_insync_replicas=3)


async def test_topics_that_promise_less_than_the_settings_are_reported(settings: Settings) -> None:
    await create_topics(settings)
    assert all(not row["differs"] for row in await describe_topics(settings))
    assert {row["replicas"] for row in await describe_topics(settings)} == {1}

    more = settings.model_copy(update={"replication_factor": 3, "min_insync_replicas": 2})
    with capture_logs() as logs:
        assert await create_topics(more) == []
    for about, names in (("CORTEX_MIN_INSYNC_REPLICAS", 7), ("CORTEX_REPLICATION_FACTOR", 7)):
        assert len({each["topic"] for each in logs if about in each["event"]}) == names
    for row in await describe_topics(more):
        assert row["differs"] == {
            "min.insync.replicas": {"is": "1", "wanted": "2"},
            "replicas": {"is": 1, "wanted": 3},
        }


async def test_a_topic_that_nobody_can_write_ends_workers_and_commands(settings: Settings) -> None:
    name = Topics.of(settings).replies
    async with started(AIOKafkaAdminClient(**kafka_client_options(settings))) as admin:
        await admin.create_topics([NewTopic(name, 2, 1, topic_configs={"min.insync.replicas": "2"})])
    says = f"topic {name} has 1 replicas and min.insync.replicas=2, so that nothing can be written"
    created = command(settings, "topics", "create")
    assert created.returncode == 2, created.stderr
    assert says in created.stderr
    worker = spawn_worker("joiner", settings)
    wait_for(lambda: not worker.alive, "the joiner to end")
    assert worker.returncode == 2, worker.log_text()
    assert says in worker.log_text()
    assert "differ" in command(settings, "topics", "show").stdout
