"""Trainers on a real Kafka and Redis: replies, crashes, rebalances and invalid input.

Trainers that are killed or stopped are processes; the others run in this process, which has loaded torch.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from pydantic import SecretStr

from streams.connections import kafka_client_options
from streams.events import version_header
from streams.kafka.clients import started
from streams.kafka.topics import Topics, partition_of
from streams.local.embedded import EmbeddedKafka, EmbeddedRedis, EmbeddedServer
from streams.settings import Settings
from streams.testing import async_wait_for, spawn_worker
from tests.streams.experiences import (
    WeightsWatch,
    committed,
    dead_letters,
    ends,
    experience,
    publish_experiences,
    send_raw,
)
from tests.streams.trainers import Running, all_committed, for_trainers, running, watching

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return for_trainers(settings)


@pytest_asyncio.fixture
async def watch(settings: Settings) -> AsyncIterator[WeightsWatch]:
    async with watching(settings) as weights:
        yield weights


async def test_one_reply_makes_a_version_and_sigterm_loses_none(
    settings: Settings, watch: WeightsWatch
) -> None:
    worker = spawn_worker("trainer", settings)
    await asyncio.to_thread(worker.wait_ready)
    for n in (1, 2, 3):
        await publish_experiences(settings, [experience(f"e{n}")])
        await watch.learned(n)
    assert watch.newest().version == 3
    assert watch.newest().updates == 3
    assert watch.newest().oldest_reply_at == experience("e3").replied_at
    rest = [experience(f"e{n}") for n in range(4, 60)]
    await publish_experiences(settings, rest)
    assert await asyncio.to_thread(worker.stop) == 0
    await watch.check()
    left = watch.newest().consumed
    async with running(settings) as heir:
        await watch.learned(59)
        # All that was learned before SIGTERM has been published; the rest is left to learn.
        assert heir.outcomes("learned") == 59 - next(iter(left.values()))
        assert heir.outcomes("repeated") == 0
    assert await committed(settings) == ends(settings, [experience("x")] * 59)


async def test_killed_in_mid_stream_another_does_all_and_each_experience_is_learned_once(
    settings: Settings, watch: WeightsWatch
) -> None:
    rng = random.Random(7)
    distinct = {f"model-{m}": [f"{m}-{i}" for i in range(25)] for m in range(8)}
    names = [(m, n) for m, all_names in distinct.items() for n in all_names]
    rng.shuffle(names)
    names += rng.sample(names, 30)  # a joiner that crashed sends some twice
    events = [experience(n, model_id=m) for m, n in names]
    victim = spawn_worker("trainer", settings)
    await asyncio.to_thread(victim.wait_ready)
    async with running(settings) as heir:
        await async_wait_for(lambda: heir.partitions() == 2, "the two to share the four partitions")
        sending = asyncio.create_task(publish_experiences(settings, events, every_s=0.01))
        theirs = {m for m in distinct if not heir.trainer._owned.keys() & _home(settings, m)}
        await async_wait_for(lambda: theirs & watch.seen.keys(), "the victim to publish something")
        victim.kill()
        await sending
        for m, all_names in distinct.items():
            await watch.learned(len(all_names), m)
        assert heir.partitions() == 4
        await all_committed(settings, ends(settings, events))
    await watch.check()
    assert {m: watch.newest(m).interactions for m in distinct} == dict.fromkeys(distinct, 25)
    assert await dead_letters(settings) == []


async def test_after_kill_9_the_confidence_stays_calibrated_and_the_gate_keeps_its_ring(
    settings: Settings, watch: WeightsWatch
) -> None:
    """Sure decisions got bad replies: one good reply after the restart does not outweigh them."""
    sure = [4.0, 0.5, 0.1, 0.0, 0.5, 0.1, 0.4]
    events = [experience(f"e{i}", reward=-0.8, context=sure) for i in range(40)]
    victim = spawn_worker("trainer", settings)
    await asyncio.to_thread(victim.wait_ready)
    await publish_experiences(settings, events)
    await watch.learned(40)
    victim.kill()
    last = watch.newest().version
    async with running(settings) as heir:
        before = (await heir.trainer._follower.fetch("m", last)).to_model()
        await publish_experiences(settings, [experience("e40", reward=0.8, context=sure)])
        await watch.learned(41)
        [learner] = [m for p in heir.trainer._owned.values() if (m := p.models.get("m"))]
        after, posteriors = learner._model, learner._trainer._posteriors
        assert [(d.context, d.label) for d in posteriors._decisions] == [(sure, 0.0)] * 40 + [(sure, 1.0)]
        assert posteriors._ring.used == 41
    # As without a restart: the fit to all 41 replies. Of the last one alone it would be above one half.
    contexts, labels = np.array([sure] * 41, np.float32), np.array([0.0] * 40 + [1.0], np.float32)
    before.estimator.fit(contexts, labels, np.ones(41, np.float32))
    with torch.no_grad():
        wanted, found = (float(m.estimator(torch.zeros(384), torch.tensor(sure))) for m in (before, after))
    assert wanted < 0.45
    assert abs(found - wanted) < 0.05


def _home(settings: Settings, model_id: str) -> set[TopicPartition]:
    [partition] = ends(settings, [experience("x", model_id=model_id)])
    return {TopicPartition(Topics.of(settings).experiences, partition)}


async def test_a_trainer_that_comes_back_from_the_dead_is_fenced(
    settings: Settings, watch: WeightsWatch
) -> None:
    """Stopped for longer than its session, then continued: it does not publish what it learned before."""
    zombie = spawn_worker("trainer", settings, publish_interval_s=3)
    await asyncio.to_thread(zombie.wait_ready)
    await publish_experiences(settings, [experience("e0")])
    await watch.learned(1)
    # The zombie learns from these, and is stopped before it publishes.
    await publish_experiences(settings, [experience(f"e{i}") for i in range(1, 4)])
    counted = 'cortex_trainer_experiences_total{model_id="m",outcome="learned"} 4.0'
    await async_wait_for(lambda: counted in zombie.get("/metrics").text, "the zombie to learn them")
    os.kill(zombie.pid, signal.SIGSTOP)
    try:
        async with running(settings) as heir:
            await async_wait_for(lambda: heir.partitions() == 4, "the heir to own all")
            await watch.learned(4)
            os.kill(zombie.pid, signal.SIGCONT)
            more = [experience(f"e{i}") for i in range(4, 40)]
            await publish_experiences(settings, more, every_s=0.05)
            await watch.learned(40)
            await asyncio.to_thread(zombie.wait_ready)
            await async_wait_for(lambda: heir.partitions() == 2, "the two to share")
    finally:
        os.kill(zombie.pid, signal.SIGCONT)
    await publish_experiences(settings, [experience("e40")])
    await watch.learned(41)
    await watch.check()
    assert watch.newest().interactions == 41


@pytest.mark.parametrize("moment", ["begin", "send", "offsets", "commit", "after commit"])
async def test_a_failure_at_any_point_of_publishing_changes_nothing(
    settings: Settings, watch: WeightsWatch, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    name = {
        "begin": "begin_transaction",
        "send": "send",
        "offsets": "send_offsets_to_transaction",
    }.get(moment, "commit_transaction")
    real = getattr(AIOKafkaProducer, name)
    calls = 0

    async def failing(self: AIOKafkaProducer, *args: Any, **options: Any) -> Any:
        nonlocal calls
        if self._txn_manager is None or self._txn_manager.transactional_id is None:
            return await real(self, *args, **options)
        calls += 1
        if calls % 3 != 2 or calls > 12:
            return await real(self, *args, **options)
        if moment == "after commit":
            await real(self, *args, **options)
        raise OSError("the network is down")

    monkeypatch.setattr(AIOKafkaProducer, name, failing)
    events = [experience(f"e{i}", model_id=f"m{i % 3}") for i in range(30)]
    async with running(settings) as trainer:
        await publish_experiences(settings, events, every_s=0.02)
        for m in ("m0", "m1", "m2"):
            await watch.learned(10, m)
        await async_wait_for(lambda: trainer.partitions() == 4, "all partitions to be open again")
        assert trainer.count("cortex_trainer_failures_total") > 0
        monkeypatch.undo()
    await watch.check()
    assert {m: v[-1].interactions for m, v in watch.seen.items()} == {"m0": 10, "m1": 10, "m2": 10}
    assert await committed(settings) == ends(settings, events)


async def test_repeated_and_amended_experiences_count_once_also_after_a_restart(
    settings: Settings, watch: WeightsWatch
) -> None:
    first = experience("e1")
    async with running(settings) as trainer:
        await publish_experiences(settings, [first, first])
        await watch.learned(1)
        await all_committed(settings, ends(settings, [first] * 2))
    assert trainer.outcomes("repeated") == 1
    async with running(settings) as trainer:
        amended = experience("e1", revision=2, reward=-1.0)
        await publish_experiences(settings, [first, amended, experience("e2"), amended])
        await watch.learned(2)
        await all_committed(settings, ends(settings, [first] * 6))
    assert trainer.outcomes("repeated") == 2
    assert trainer.outcomes("amended") == 1
    assert trainer.outcomes("learned") == 1
    await watch.check()
    assert watch.newest().interactions == 2


async def test_no_reply_is_counted_and_not_learned(settings: Settings, watch: WeightsWatch) -> None:
    async with running(settings) as trainer:
        silence = experience("e1", revision=0)
        await publish_experiences(settings, [silence])
        await async_wait_for(lambda: trainer.outcomes("no_reply") == 1, "it to be counted")
    assert await committed(settings) == ends(settings, [silence])
    await watch.follower.catch_up()
    assert watch.seen == {}
    async with running(settings):
        await publish_experiences(settings, [experience("e1", revision=1)])
        await watch.learned(1)


async def test_invalid_experiences_become_dead_letters_and_the_rest_is_learned(
    settings: Settings, watch: WeightsWatch
) -> None:
    await publish_experiences(settings, [experience("good-1")])
    partition = next(iter(ends(settings, [experience("x")])))
    good = experience("bad")
    short = np.full(16, 0.25)
    bad = {
        "no JSON": (b"m", b"{"),
        "a tombstone": (b"m", None),
        "another key": (b"m", experience("x", model_id="other").to_bytes()),
        "small embeddings": (
            b"m",
            experience(
                "x", message=short, history=short, situation=short, memories=np.stack([short] * 4)
            ).to_bytes(),
        ),
        "an unknown strategy": (
            b"m",
            experience("x", strategy_id="dance", strategy_ids=["dance"], probabilities=[1.0]).to_bytes(),
        ),
        "too few metadata": (b"m", experience("x", metadata=[1.0]).to_bytes()),
        "NaN": (b"m", good.to_bytes().replace(b'"reward":0.8', b'"reward":NaN')),
        "a newer schema": (b"m", good.to_bytes().replace(b'"schema_version":1', b'"schema_version":99', 1)),
        "neither key nor experience": (None, b"{}"),
        "an invalid key": (b"\xff", good.to_bytes()),
    }
    for key, value in bad.values():
        await send_raw(settings, key, value, partition)
    await publish_experiences(settings, [experience("good-2")])
    async with running(settings):
        await watch.learned(2)
    letters = await dead_letters(settings)
    assert len(letters) == len(bad), [x.reason for x in letters]
    assert [x.offset for x in letters] == list(range(1, len(bad) + 1))
    assert all(x.topic == Topics.of(settings).experiences and x.reason for x in letters)
    assert set(watch.seen) == {"m"}


async def test_an_experience_in_the_partition_of_another_model_is_learned_once(
    settings: Settings, watch: WeightsWatch
) -> None:
    [partition] = ends(settings, [experience("x")])
    names = [str(n) for n in range(99)]
    stranger = next(m for m in names if partition not in ends(settings, [experience("x", model_id=m)]))
    event = experience("astray", model_id=stranger)
    version = version_header(event.revision)
    await send_raw(settings, stranger.encode(), event.to_bytes(), partition, version)
    await send_raw(settings, None, experience("without a key").to_bytes(), partition, version)
    await publish_experiences(settings, [event, experience("good")])
    async with running(settings) as trainer:
        await async_wait_for(lambda: trainer.outcomes("learned") == 3, "all experiences")
        await async_wait_for(lambda: trainer.outcomes("repeated") == 1, "the one that is there twice")
    assert set(watch.seen) == {"m", stranger}
    assert not await dead_letters(settings)


async def test_partitions_may_be_added_while_experiences_come(
    settings: Settings, watch: WeightsWatch
) -> None:
    models = [f"model-{n}" for n in range(12)]
    async with running(settings) as trainer:
        await publish_experiences(settings, [experience(f"a-{m}", model_id=m) for m in models])
        async with started(AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)) as admin:
            await admin.create_partitions({Topics.of(settings).experiences: NewPartitions(7)})
        # Still by the old number, as a producer that has not seen the new partitions does.
        for model in models:
            old = partition_of(model, settings.partitions)
            event = experience(f"b-{model}", model_id=model)
            await send_raw(settings, model.encode(), event.to_bytes(), old, version_header(event.revision))
        await async_wait_for(lambda: trainer.partitions() == 7, "the new partitions")
        await publish_experiences(settings, [experience(f"c-{m}", model_id=m) for m in models])
        await async_wait_for(lambda: trainer.outcomes("learned") == 3 * len(models), "all experiences")
    assert not await dead_letters(settings)
    await watch.check()
    assert {m: watch.newest(m).interactions for m in models} == dict.fromkeys(models, 3)


async def test_models_learn_from_a_topic_that_is_made_again(settings: Settings, watch: WeightsWatch) -> None:
    topic = Topics.of(settings).experiences
    async with running(settings):
        await publish_experiences(settings, [experience(f"old-{n}") for n in range(5)])
        await watch.learned(5)
    async with started(AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)) as admin:
        await admin.delete_topics([topic])

        async def is_gone() -> bool:
            return topic not in await admin.list_topics()

        await async_wait_for(is_gone, "the topic to be deleted")
        await admin.create_topics([NewTopic(topic, settings.partitions, 1)])
    async with running(settings):
        await publish_experiences(settings, [experience(f"new-{n}") for n in range(3)])
        await watch.learned(8)


async def test_unreachable_servers_are_named(settings: Settings) -> None:
    away = settings.model_copy(
        update={"kafka": "127.0.0.1:1", "redis_url": SecretStr("redis://:secret@127.0.0.1:2/0")}
    )
    it = Running(away)
    task = asyncio.create_task(it.trainer.run())
    await async_wait_for(lambda: "127.0.0.1:1" in it.worker.missing["kafka"], "Kafka's address")
    await async_wait_for(lambda: "127.0.0.1:2" in it.worker.missing["redis"], "Redis's address")
    assert "secret" not in str(it.worker.missing)
    it.worker.stopping.set()
    await task


def kill(server: EmbeddedServer) -> None:
    assert server.child is not None
    server.child.kill()


async def test_kafka_and_redis_may_restart_during_training(tmp_path: Path, settings: Settings) -> None:
    """Uses its own servers, as it kills them."""
    kafka, store = EmbeddedKafka(tmp_path / "kafka", settings.cache), EmbeddedRedis(tmp_path / "redis")
    await asyncio.gather(kafka.start(), store.start())
    try:
        own = settings.model_copy(update={"kafka": kafka.address, "redis_url": SecretStr(store.url)})
        async with watching(own) as watch, running(own) as trainer:
            await publish_experiences(own, [experience(f"e{i}") for i in range(5)])
            await watch.learned(5)

            kill(kafka)
            await async_wait_for(
                lambda: kafka.address in trainer.worker.missing.get("kafka", ""), "Kafka missed"
            )
            await kafka.start()
            await publish_experiences(own, [experience(f"e{i}") for i in range(5, 10)])
            await watch.learned(10)

            kill(store)
            await async_wait_for(
                lambda: store.url[8:] in trainer.worker.missing.get("redis", ""), "Redis missed"
            )
            producer = AIOKafkaProducer(**kafka_client_options(own))
            await producer.start()
            for i in range(10, 15):
                await producer.send_and_wait(
                    Topics.of(own).experiences, experience(f"e{i}").to_bytes(), key=b"m"
                )
            await producer.stop()
            await store.start()
            await watch.learned(15)
            await async_wait_for(lambda: not trainer.worker.missing, "the trainer to be ready again")
            await watch.check()
            assert watch.newest().interactions == 15
    finally:
        await asyncio.gather(kafka.stop(), store.stop())
