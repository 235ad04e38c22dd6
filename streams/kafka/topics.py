"""Names, keys, partitions and retention of all topics. Defined here and nowhere else.

| topic | key | value | kept |
|---|---|---|---|
| interactions | conversation_id | InteractionEvent | 30 days |
| replies | conversation_id | ReplyEvent | 30 days |
| experiences | model_id | ExperienceEvent | 90 days |
| weights | model_id + slot | manifest of a version | compacted |
| payloads | model_id + slot + part | chunks of a version | compacted |
| control | model_id or digest of a conversation_id, and subject | ControlEvent, ForgetEvent | compacted |
| dead-letters | as received | DeadLetter | 30 days |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import structlog
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import TopicAlreadyExistsError, for_code
from aiokafka.partitioner import murmur2

from cortex_core.errors import ConfigError
from streams.connections import kafka_client_options
from streams.failures import configuration_error, is_transient
from streams.kafka.clients import started
from streams.settings import Settings

log = structlog.get_logger(__name__)

DAY_MS = 86_400_000
MAX_RECORD_BYTES = 8_000_000
"""An interaction with a thousand logged memories; weights chunks stay at 900 KB."""

MAX_PARTITIONS = 1_024
"""Partitions that are looked up in Redis where Kafka is not asked how many there are."""


@dataclass(frozen=True)
class TopicSpec:
    """The required configuration of one topic."""

    name: str
    partitions: int
    config: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Topics:
    """The names and required configurations of all topics under one prefix."""

    prefix: str
    partitions: int
    min_insync_replicas: int = 1

    @classmethod
    def of(cls, settings: Settings) -> Topics:
        return cls(settings.topic_prefix, settings.partitions, settings.min_insync_replicas)

    @property
    def interactions(self) -> str:
        return f"{self.prefix}.interactions"

    @property
    def replies(self) -> str:
        return f"{self.prefix}.replies"

    @property
    def experiences(self) -> str:
        return f"{self.prefix}.experiences"

    @property
    def weights(self) -> str:
        return f"{self.prefix}.weights"

    @property
    def payloads(self) -> str:
        return f"{self.prefix}.payloads"

    @property
    def control(self) -> str:
        return f"{self.prefix}.control"

    @property
    def dead_letters(self) -> str:
        return f"{self.prefix}.dead-letters"

    def specs(self) -> list[TopicSpec]:
        """The required configuration of every topic."""
        common = {
            "max.message.bytes": str(MAX_RECORD_BYTES),
            "min.insync.replicas": str(self.min_insync_replicas),
        }

        def kept(days: int) -> dict[str, str]:
            return common | {"cleanup.policy": "delete", "retention.ms": str(days * DAY_MS)}

        def compacted(segment: int) -> dict[str, str]:
            # The segment being written is not compacted: a small one keeps short what a follower reads.
            return common | {
                "cleanup.policy": "compact",
                "segment.bytes": str(segment),
                "min.cleanable.dirty.ratio": "0.3",
                "max.compaction.lag.ms": "600000",
            }

        return [
            TopicSpec(self.interactions, self.partitions, kept(30)),
            TopicSpec(self.replies, self.partitions, kept(30)),
            TopicSpec(self.experiences, self.partitions, kept(90)),
            # As many as experiences: a transaction that a crash leaves open hides the models of one trainer's
            # partition, and no others.
            TopicSpec(self.weights, self.partitions, compacted(1 << 20)),
            TopicSpec(self.payloads, self.partitions, compacted(1 << 25)),
            # One: the commands of all models are ordered.
            TopicSpec(self.control, 1, compacted(1 << 20)),
            TopicSpec(self.dead_letters, 1, kept(30)),
        ]


def partition_of(model_id: str, partitions: int) -> int:
    """The partition of a model's records: Kafka's default partitioner applied to the model_id."""
    return int((murmur2(model_id.encode()) & 0x7FFFFFFF) % partitions)


async def create_topics(settings: Settings) -> list[str]:
    """Creates missing topics and checks existing ones; safe to call from several workers at once.

    Returns:
        The names created by this call.

    Raises:
        ConfigError: the topics that the joiner joins exist with unequal numbers of partitions, so that one
            joiner would not own a conversation's partition of both; or another configuration error.
    """
    topics = Topics.of(settings)
    async with started(AIOKafkaAdminClient(**kafka_client_options(settings))) as admin:
        existing = set(await admin.list_topics())
        wanted = [s for s in topics.specs() if s.name not in existing]
        created: list[str] = []
        if wanted:
            response = await admin.create_topics(
                [
                    NewTopic(
                        s.name,
                        num_partitions=s.partitions,
                        replication_factor=settings.replication_factor,
                        topic_configs=s.config,
                    )
                    for s in wanted
                ]
            )
            for name, code, *rest in response.topic_errors:
                if code == 0:
                    created.append(name)
                elif code != TopicAlreadyExistsError.errno:
                    error = for_code(code)(f"topic {name} cannot be created: {rest[0] if rest else ''}")
                    raise (
                        error
                        if is_transient(error)
                        else configuration_error(error, settings) or ConfigError(str(error))
                    )
        described = await admin.describe_topics([topics.interactions, topics.replies])
        counts = {d["topic"]: len(d["partitions"]) for d in described if not d["error_code"]}
        if len(set(counts.values())) > 1:
            raise ConfigError(
                f"{counts} must have the same number of partitions: one joiner owns partition i of both. "
                "Add partitions to the smaller topic"
            )
        there = [s.name for s in topics.specs() if s.name in existing]
        _check_durability(await _described(admin, there), settings)
        return created


@dataclass(frozen=True)
class _Described:
    """An existing topic: the fewest replicas of its partitions, and its configuration."""

    name: str
    partitions: int
    replicas: int
    config: dict[str, str | None]


async def _described(admin: AIOKafkaAdminClient, names: list[str]) -> list[_Described]:
    """Describes topics.

    Raises:
        KafkaError: this user may not describe one, or it was deleted.
    """
    if not names:
        return []
    configs: dict[str, dict[str, str | None]] = {}
    for answer in await admin.describe_configs(
        [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    ):
        for code, _, _, name, entries in answer.resources:
            if code:
                raise for_code(code)(f"topic {name} cannot be described: permit DescribeConfigs")
            configs[name] = {key: value for key, value, *_ in entries}
    described = []
    for topic in await admin.describe_topics(names):
        if topic["error_code"]:
            raise for_code(topic["error_code"])(f"topic {topic['topic']} cannot be described")
        name, partitions = topic["topic"], topic["partitions"]
        replicas = min(len(partition["replicas"]) for partition in partitions)
        described.append(_Described(name, len(partitions), replicas, configs[name]))
    return described


def _check_durability(described: list[_Described], settings: Settings) -> None:
    """Logs which topics promise less than the settings do.

    Raises:
        ConfigError: a topic demands more replicas than it has, so that nothing can be written to it.
    """
    for topic in described:
        insync = int(topic.config["min.insync.replicas"] or 1)
        if insync > topic.replicas:
            raise ConfigError(
                f"topic {topic.name} has {topic.replicas} replicas and min.insync.replicas={insync}, so that "
                "nothing can be written: lower the one with kafka-configs, or add replicas with "
                "kafka-reassign-partitions"
            )
        if insync < settings.min_insync_replicas:
            log.warning(
                "topic acknowledges events with fewer copies than CORTEX_MIN_INSYNC_REPLICAS: change "
                "min.insync.replicas with kafka-configs",
                topic=topic.name,
                actual=insync,
                wanted=settings.min_insync_replicas,
            )
        if topic.replicas < settings.replication_factor:
            log.warning(
                "topic has fewer replicas than CORTEX_REPLICATION_FACTOR: add some with "
                "kafka-reassign-partitions",
                topic=topic.name,
                actual=topic.replicas,
                wanted=settings.replication_factor,
            )


async def describe_topics(settings: Settings) -> list[dict[str, object]]:
    """For each topic: name, existence, partitions, and the settings that differ from the required ones."""
    topics = Topics.of(settings)
    async with started(AIOKafkaAdminClient(**kafka_client_options(settings))) as admin:
        existing = set(await admin.list_topics())
        described = await _described(admin, [s.name for s in topics.specs() if s.name in existing])
    found = {topic.name: topic for topic in described}
    rows: list[dict[str, object]] = []
    for spec in topics.specs():
        topic = found.get(spec.name)
        if topic is None:
            rows.append({"topic": spec.name, "exists": False, "partitions": 0, "replicas": 0, "differs": {}})
            continue
        wanted = spec.config | {"replicas": settings.replication_factor}
        actual = topic.config | {"replicas": topic.replicas}
        differs = {
            key: {"is": actual.get(key), "wanted": value}
            for key, value in wanted.items()
            if actual.get(key) != value
        }
        row = {"topic": spec.name, "exists": True, "partitions": topic.partitions, "replicas": topic.replicas}
        rows.append(row | {"differs": differs})
    return rows


async def retention(settings: Settings) -> dict[str, timedelta | None]:
    """How long the broker keeps the records of each topic that is not compacted; None: for ever."""
    kept: dict[str, timedelta | None] = {}
    async with started(AIOKafkaAdminClient(**kafka_client_options(settings))) as admin:
        names = [spec.name for spec in Topics.of(settings).specs() if "retention.ms" in spec.config]
        for topic in await _described(admin, names):
            ms = int(topic.config["retention.ms"] or -1)
            kept[topic.name] = timedelta(milliseconds=ms) if 0 <= ms < 36_500 * DAY_MS else None
    return kept
