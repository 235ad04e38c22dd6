"""The embedded Kafka and Redis: real servers, the same port again, data kept, nothing left behind."""

from __future__ import annotations

from redis import Redis

from streams.settings import Settings
from streams.topics import create_topics, describe_topics


async def test_fixtures_are_real_servers(settings: Settings) -> None:
    created = await create_topics(settings)
    assert len(created) == 6
    assert all(row["exists"] and not row["differs"] for row in await describe_topics(settings))
    with Redis.from_url(settings.redis_address) as client:
        client.set(f"{settings.topic_prefix}:x", "1")
        assert client.get(f"{settings.topic_prefix}:x") == b"1"
