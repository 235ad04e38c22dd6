"""The auditor on real topics and replay: clean after a joiner, and not after changes from outside."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
import redis
from aiokafka import AIOKafkaProducer
from prometheus_client.parser import text_string_to_metric_families

from streams.events import ExperienceEvent, parse, utc_now
from streams.kafka.topics import Topics
from streams.replay_store import ReplayKeys
from streams.settings import Settings
from streams.testing import WorkerProcess, interaction, reply, send, spawn_worker, wait_for
from streams.weights.records import publish
from tests.streams.experiences import send_raw
from tests.streams.joined import conversation
from tests.streams.kafka_helpers import read_all
from tests.streams.weights_records import snapshot
from tests.test_cli import Done, flags, here

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with a window of 2 s, for the workers and the command."""
    monkeypatch.setenv("CORTEX_JOIN_WINDOW_S", "2")
    return settings.model_copy(update={"join_window_s": 2.0, "session_timeout_s": 1.0})


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


def audit(settings: Settings, *more: str) -> Done:
    return here("audit", *flags(settings), "--redis", settings.redis_address, *more)


def report(settings: Settings) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(audit(settings, "--json").stdout)
    return loaded


def findings(settings: Settings) -> set[tuple[str, str]]:
    return {(f["kind"], f["subject"]) for f in report(settings)["findings"]}


async def publish_versions(settings: Settings, *versions: int) -> None:
    async with AIOKafkaProducer(
        bootstrap_servers=settings.kafka_address, transactional_id=settings.topic_prefix
    ) as producer:
        for version in versions:
            async with producer.transaction():
                await publish(producer, settings, snapshot(version))


def test_the_report_is_clean_until_outputs_are_changed(settings: Settings, client: redis.Redis) -> None:
    missing = audit(settings)
    assert missing.returncode == 1
    assert f"{settings.topic_prefix}.experiences" in missing.stderr

    topics = Topics.of(settings)
    events = [event for n in range(20) for event in conversation(n)]
    random.Random(2).shuffle(events)
    now = utc_now()
    fresh = [
        interaction("answered", "fresh", occurred_at=now),
        reply(
            "before",
            "answered",
            "fresh",
            occurred_at=now + timedelta(seconds=1),
            kind="rating",
            rating=1.0,
            text="",
        ),
        reply("nobody", "never", "fresh", occurred_at=now),
        interaction("silent", "still", occurred_at=now),
    ]
    asyncio.run(send(settings, [*fresh[::-1], *events, *events[:5], (topics.replies, b"c", b"no json")]))
    assert report(settings)["counts"]["uncommitted"] == len(events) + 5 + len(fresh) + 1

    joiner = spawn_worker("joiner", settings).wait_ready()
    wait_for(lambda: report(settings)["counts"]["expired"] >= 1, "the windows to close", every_s=0.5)
    wait_for(
        lambda: (c := report(settings)["counts"])["uncommitted"] + c["open"] == 0, "the rest", every_s=0.5
    )
    asyncio.run(publish_versions(settings, 1, 2, 3))
    done = audit(settings)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("clean\n")
    got = report(settings)
    assert got["clean"]
    assert got["findings"] == []
    counts = got["counts"]
    replies = sum(hasattr(event, "reply_id") for event in [*events, *fresh])
    assert counts["acknowledged"] == len(events) + len(fresh)
    assert (counts["repeated"], counts["refused"], counts["versions"]) == (5, 1, 3)
    assert (counts["joined"], counts["orphaned"]) == (replies - 1, 1)
    assert counts["experiences"] == len(events) + len(fresh) - replies
    assert got["models"]["default"] == {"entries": counts["experiences"]}
    assert joiner.stop() == 0

    keys = ReplayKeys(settings.topic_prefix, "default")
    whole: Any = client.hgetall(keys.entries)

    def put_back() -> None:
        client.hset(keys.entries, mapping=whole)
        client.zadd(keys.order, {"silent": now.timestamp(), "answered": now.timestamp()})

    client.hdel(keys.entries, "silent")
    client.zrem(keys.order, "silent")
    assert findings(settings) == {("lost", "silent")}
    put_back()
    client.zadd(keys.order, {"answered": 5.0})
    assert findings(settings) == {("wrong", f"answered in {keys.entries}")}
    put_back()
    answered = parse(ExperienceEvent, whole[b"answered"].partition(b"\n")[2])
    for changes, found in (
        ({"reward": -1.0}, {("wrong", "answered")}),
        ({"reply_ids": [], "readings": []}, {("wrong", "answered"), ("lost", "before")}),
        (
            {"interaction": answered.interaction.model_copy(update={"confidence": 0.1})},
            {("wrong", "answered")},
        ),
    ):
        client.hset(keys.entries, "answered", b"1\n" + answered.model_copy(update=changes).to_bytes())
        assert findings(settings) == found
    assert audit(settings).returncode == 1
    put_back()
    assert findings(settings) == set()

    [last] = [r for r in asyncio.run(read_all(settings, topics.experiences)) if b'"silent"' in r.value]
    forged = parse(ExperienceEvent, last.value).model_copy(update={"reward": 0.5})
    asyncio.run(send_raw(settings, last.key, forged.to_bytes()))
    assert findings(settings) == set(), "without a version it is older than all"
    asyncio.run(send_raw(settings, last.key, forged.to_bytes(), headers=last.headers))
    assert findings(settings) == {("wrong", "silent")}
    asyncio.run(publish_versions(settings, 2))
    assert ("fork", "version 2") in findings(settings)


def counters(worker: WorkerProcess) -> dict[str, float]:
    """The sums of a worker's counters, by name and outcome."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(worker.get("/metrics").text):
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            name = sample.labels.get("outcome") or sample.name
            found[name] = found.get(name, 0.0) + sample.value
    return found


def test_the_workers_counters_agree_with_the_audit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORTEX_JOIN_WINDOW_S", "5")
    settings = settings.model_copy(update={"join_window_s": 5.0})
    kinds = ("joiner", "trainer", "inference")
    joiner, trainer, inference = [spawn_worker(kind, settings).wait_ready() for kind in kinds]

    def post(path: str, **body: Any) -> None:
        url, fields = inference.url + path, {"conversation_id": "c"} | body
        httpx.post(url, json=fields, timeout=30).raise_for_status()

    def joined(number: int) -> None:
        wait_for(lambda: counters(joiner)["joined"] == number, f"{number} joined replies", every_s=0.1)

    for name in ("a", "b", "silent"):
        post("/v1/decide", message="How?", interaction_id=name)
    post("/v1/replies", text="Thanks!", interaction_id="a", reply_id="1")
    post("/v1/replies", text="No, that is wrong.", interaction_id="a", reply_id="2")
    post("/v1/replies", text="Perfect!", reply_id="moves", conversation_id="d")
    post("/v1/replies", text="Nobody asked.", interaction_id="never")
    joined(2)
    now = utc_now()
    # What is sent by others: an interaction that is later than its reply, and the same event twice.
    # Of the model's dimensions: what it cannot learn from is not stored, and not amended after its window.
    fits: dict[str, Any] = {"dim": 384, "metadata": [0.0] * 10}
    others = [interaction("d1", "d", occurred_at=now - timedelta(seconds=9), **fits)] * 2
    asyncio.run(send(settings, others))
    joined(3)
    asyncio.run(send(settings, [interaction("d2", "d", occurred_at=now - timedelta(seconds=8), **fits)]))
    wait_for(lambda: counters(joiner)["moved"] == 1, "the move", every_s=0.1)

    def settled() -> bool:
        counts = report(settings)["counts"]
        return not any(counts[name] for name in ("uncommitted", "open", "waiting"))

    wait_for(settled, "the windows to close", every_s=0.5)
    audited = report(settings)
    assert audited["clean"], audited
    counts = audited["counts"]
    names = ["joined", "amended", "repeated", "moved", "orphaned", "expired", "late"]

    def agree() -> bool:  # a joiner counts after it has published
        counted = counters(joiner)
        return {name: counted[name] for name in names} == {name: counts[name] for name in names}

    wait_for(agree, f"the counters to agree with {counts}", every_s=0.1)
    assert counts["moved"] == counts["orphaned"] == counts["repeated"] == 1
    assert counters(inference)["cortex_acknowledged_total"] == counts["acknowledged"] - 2
    assert counters(trainer)["cortex_trainer_versions_total"] == counts["versions"] > 0
    assert counters(inference)["cortex_weights_forks_total"] == counts["forks"] == 0
