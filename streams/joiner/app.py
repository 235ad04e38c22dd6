"""The joiner: a Faust agent that consumes interactions and replies.

    cortex joiner
    faust -A streams.joiner worker

The agent's body is the pipeline. It receives whole batches (`streams.joiner.consumer`) and retries each until
its offsets are committed (`streams.joiner.batch`).
"""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import AsyncIterable, Sequence
from typing import Any, cast

import faust
import structlog
from faust.app.base import BootStrategy
from mode import Service
from mode.supervisors import CrashingSupervisor
from pydantic import SecretStr

from cortex_core.errors import ConfigError
from cortex_core.strategy_registry import StrategyRegistry
from streams.connections import async_redis_client, retry
from streams.events import DeadLetter, version_header
from streams.failures import is_transient
from streams.forgotten import ForgottenFollower
from streams.heartbeats import Activity
from streams.joiner.batch import Batch
from streams.joiner.consumer import BatchConsumer, BatchTransport, JoinedTopic, NoTables
from streams.joiner.effects import Engine, Experience
from streams.joiner.metrics import DEAD_LETTERS, count
from streams.joiner.offsets import StoredOffsets
from streams.joiner.records import drop_forgotten, extract_feedback, make_join, read
from streams.joiner.states import RedisStates
from streams.kafka.publisher import Message, Publisher
from streams.kafka.topics import Topics
from streams.replay_writer import ReplayWriter
from streams.settings import Settings
from streams.trail import Trail, WritesLost
from streams.worker import Worker, configure_logs, run_worker

log = structlog.get_logger(__name__)


def create_app(settings: Settings, worker: Worker | None = None) -> JoinerApp:
    """Creates the app.

    Args:
        worker: of the process that starts and stops the app; None: `faust worker` does.

    Raises:
        ConfigError: an address is neither configured nor published by a running stack.
    """
    app = JoinerApp(settings.resolved(), worker)
    topics, join, engine = app.cortex_topics, app.join, app.engine
    events = app.topic(
        topics.interactions, topics.replies, key_serializer="raw", value_serializer="raw", acks=False
    )

    @app.agent(events, name="joiner", supervisor_strategy=CrashingSupervisor)
    async def joiner(batches: AsyncIterable[Batch]) -> None:
        """Joins interactions with replies; writes replay and the experiences topic."""
        async for batch in batches:
            async for attempt in batch.attempts():
                async with attempt as part:
                    read_ = read(
                        part.readable,
                        topics,
                        part.refuse,
                        store_text=join.store_text,
                        is_published=part.batch.is_published,
                        check_model=app.cortex_settings.check_model,
                    )
                    received = drop_forgotten(read_, app.follower.forgotten)
                    tasks = extract_feedback(received, join, part.refuse)
                    while tasks:
                        joined = await engine.join(tasks)
                        await engine.settle(joined)
                        tasks = await engine.save(joined)
                        count(joined.counts)
                        await engine.store(joined)
                        await engine.publish(joined)
                    await app.publish_dead_letters(part.dead_letters)
                    await part.commit()
                    count({"forgotten": len(read_) - len(received)})

    @app.timer(interval=0.5)  # type: ignore[untyped-decorator]  # faust publishes no types
    async def close_unanswered_interactions() -> None:
        for partition, now in app.batches.event_time.items():
            try:
                async with app.timer_lock:
                    count(await engine.timer(partition, now))
            except WritesLost as error:
                app.batches.rewind(error)
                return
            except Exception as error:  # the conversations stay due, and the next run retries them
                log.warning("the timer failed", partition=partition, exc_info=not is_transient(error))
                count({"timer_failures": 1})

    @app.on_partitions_revoked.connect
    async def clear_cache(*_: Any, **__: Any) -> None:
        app.states.clear_cache()

    return app


class JoinerBoot(BootStrategy):
    """Starts no producer of Faust (`Publisher` is idempotent and reconnects by itself) and no web server."""

    enable_kafka_producer = False
    enable_web = False


class JoinerSettings(faust.Settings):
    """Faust's settings; its web server cannot be enabled, for the worker serves `/healthz` and `/metrics`."""

    @property
    def web_enabled(self) -> bool:
        return False

    @web_enabled.setter
    def web_enabled(self, enabled: bool) -> None:
        """Ignores the command's `--with-web`."""


class JoinerApp(faust.App):
    """The agent's dependencies (connections, join, engine) and the process's lifecycle and health checks."""

    BootStrategy = JoinerBoot

    def __init__(self, settings: Settings, worker: Worker | None) -> None:
        super().__init__(
            settings.joiner_group,
            broker=f"kafka://{settings.kafka_address.replace(',', ';kafka://')}",
            topic_allow_declare=False,
            topic_disable_leader=True,
            autodiscover=False,
            Topic=JoinedTopic,
            TableManager=NoTables,
        )
        self.cortex_settings = settings
        self.cortex_topics = Topics.of(settings)
        self.is_standalone = worker is None
        """Whether `faust worker` runs the app: then the app itself turns a failure into an exit code."""
        self.worker = worker or Worker("joiner", settings)
        self.publisher = Publisher(settings, self._on_publisher)
        self.redis = async_redis_client(settings)
        self.follower = ForgottenFollower(settings, self._on_forget)
        self.timer_lock = asyncio.Lock()
        self.join = make_join(settings)
        prefix, trail = settings.topic_prefix, Trail(self.redis, settings.topic_prefix)
        self.states = RedisStates(self.redis, prefix, settings.join_window_s, trail)
        self.replay = ReplayWriter(
            self.redis,
            prefix=prefix,
            capacity=settings.replay_capacity,
            strategies=StrategyRegistry.from_set(settings.strategies).ids,
            trail=trail,
        )
        self.engine = Engine(
            self.join, self.states, self.replay, self._publish_experiences, self.follower.forgotten
        )
        offsets = StoredOffsets(self.redis, prefix, trail)
        self.transport = BatchTransport(self, settings, self.worker, offsets, self.states.clear_cache)

    @property
    def batches(self) -> BatchConsumer:
        """The consumer, with its type."""
        return cast(BatchConsumer, self.consumer)

    async def _publish_experiences(self, experiences: Sequence[Experience]) -> None:
        topic = self.cortex_topics.experiences
        await self.publisher.send(
            Message(topic, it.model_id.encode(), it.value, version_header(it.write.version))
            for it in experiences
        )
        count({"experiences": len(experiences)})

    async def publish_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Publishes dead letters; returns when all are acknowledged."""
        topic = self.cortex_topics.dead_letters
        await self.publisher.send(
            Message(topic, base64.b64decode(letter.key or ""), letter.to_bytes()) for letter in letters
        )
        for letter in letters:
            DEAD_LETTERS.labels(letter.topic).inc()
            log.warning("dead letter", id=letter.dead_letter_id, reason=letter.reason[:300])

    # -- lifecycle -----------------------------------------------------------------------------------------

    async def on_start(self) -> None:
        """Serves health checks, then waits until Redis and Kafka answer; then Faust starts the consumer."""
        await self.add_async_context(self.worker.serving())
        self.async_exit_stack.push_async_callback(self.redis.aclose)
        self.async_exit_stack.push_async_callback(self.publisher.stop, timeout_s=1.0)
        self.async_exit_stack.push_async_callback(self.follower.stop)
        await super().on_start()
        try:
            await self.wait(self._connect())
        except ConfigError as error:
            if not self.is_standalone:
                raise
            log.error("cannot run with these settings", error=str(error))
            raise SystemExit(2) from error

    async def _connect(self) -> None:
        await retry(self.redis.ping, self.cortex_settings, self.worker.not_ready)
        self.worker.ready("redis")
        await self.publisher.start()
        # Before the first event, so that no forgotten conversation is joined.
        self.worker.not_ready("kafka", "reading the forgotten conversations")
        await self.follower.start()
        await self.follower.until_caught_up()
        self.worker.activity = self._activity
        self.worker.not_ready("kafka", "joining the group")

    def _activity(self) -> Activity:
        owned = self.batches.assignment() if self.batches.is_reading else ()
        partitions = sorted(f"{tp.topic}-{tp.partition}" for tp in owned)
        return Activity(partitions, control_position=self.follower.position)

    async def _on_forget(self) -> None:
        """Returns when no batch and no timer is in progress that began before the record was read.

        Those that begin later leave out what is forgotten; then `streams.joiner.forget` erases the rest.
        """
        if self.follower.caught_up.is_set():
            await self.batches.idle()
            async with self.timer_lock:
                pass

    def _on_publisher(self, reason: str | None) -> None:
        if reason is not None:
            self.worker.not_ready("kafka", reason)
        elif self.batches.is_reading:
            self.worker.ready("kafka")

    @Service.task
    async def _crash_on_failure(self) -> None:
        await self.worker.stopping.wait()
        if self.worker.refused and self.is_standalone:
            await self.crash(SystemExit(2))
        elif self.worker.failed:
            await self.crash(RuntimeError(self.worker.failed))

    async def on_stop(self) -> None:
        if self.is_standalone:
            self.worker.stop()  # ends the process with code 1 if the rest of the shutdown takes too long
        await super().on_stop()

    def _create_directories(self) -> None:
        """Creates none: Faust would store tables there, and the app has no tables."""


JoinerApp.Settings = JoinerSettings  # within the class, the name would hide our `Settings`


async def run(worker: Worker) -> None:
    """Runs the joiner until `worker.stopping`."""
    app = create_app(worker.settings, worker)
    starting = asyncio.ensure_future(app.start())
    try:
        await app.wait_first(asyncio.shield(starting), worker.stopping.wait())
        await app.wait(worker.stopping.wait())
    finally:
        await app.stop()
    await starting
    if app.crash_reason is not None:
        raise app.crash_reason


def main(settings: Settings) -> None:
    """Runs the joiner as this process."""
    run_worker("joiner", settings, run)


def __getattr__(name: str) -> Any:
    # Only `faust -A streams.joiner worker` needs `app`; other imports of this module read no settings.
    if name == "app":
        import click  # noqa: PLC0415 - Faust's command line uses click

        try:
            settings = Settings.load().of_worker("joiner")
            if "--help" in sys.argv:  # Faust creates the app before it prints help, which needs no server
                unused = {"kafka": "localhost:9092", "redis_url": SecretStr("redis://localhost")}
                settings = settings.model_copy(update=unused)
            configure_logs(settings)
            globals()["app"] = create_app(settings)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        return globals()["app"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
