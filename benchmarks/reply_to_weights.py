"""Latency from a user's reply to weights that have learned from it, with real processes.

    python -m benchmarks.reply_to_weights [--idle 30] [--rate 50 --seconds 20 --models 4] [--json FILE]

Kafka, Redis, a joiner and a trainer run in their own processes (Kafka and Redis embedded, or those of
`CORTEX_KAFKA` and `CORTEX_REDIS_URL`). This process is agent and inference worker: it sends interactions and
replies to Kafka, and follows the weights. Two runs: idle (one reply at a time) and load (a constant rate of
replies over several models). For each reply:

    sent ──▶ experience     the joiner has joined it with its interaction and published the experience
         ──▶ learned        the trainer has created the first version that contains it (`created_at`)
         ──▶ serving        a follower has read, verified and loaded that version

All times are from one machine's clock, since just before the reply is passed to the producer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from cortex_core.metadata import METADATA_KEYS
from cortex_core.strategy_registry import StrategyRegistry
from cortex_core.weights import WeightsManifest, WeightsSnapshot
from streams.connections import kafka_client_options
from streams.events import ExperienceEvent, InteractionEvent, ReplyEvent, new_id, parse, utc_now
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.local.stack import Stack
from streams.settings import Settings
from streams.weights.architecture import build_model
from streams.weights.follower import WeightsFollower

STAGES = ("experience", "learned", "serving")
REPLIES = ("thanks, that worked", "no, that's wrong", "perfect, exactly what I needed", "I don't understand")


@dataclass
class Reply:
    """One reply; times in seconds since `sent`."""

    sent: float
    model_id: str
    place: tuple[str, int] | None = None
    """"topic-partition" and offset of its experience"""
    after: dict[str, float] = field(default_factory=dict)


class Agent:
    """Sends interactions and replies, and records when their experiences and weights arrive."""

    def __init__(self, settings: Settings, seed: int = 0) -> None:
        self.settings = settings
        self.topics = Topics.of(settings)
        self.waiting: dict[str, Reply] = {}
        self.done: list[Reply] = []
        self._none_waiting = asyncio.Event()
        self._versions: dict[str, list[tuple[dict[str, int], float, float]]] = {}
        self._rng = np.random.default_rng(seed)
        self._strategies = list(StrategyRegistry.from_set(settings.strategies).ids)
        self._producer = AIOKafkaProducer(**kafka_client_options(settings), enable_idempotence=True)
        self._consumer = AIOKafkaConsumer(
            self.topics.experiences,
            **kafka_client_options(settings),
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
        )
        self._follower = WeightsFollower(settings, self._changed)
        self._swapping = set[asyncio.Task[None]]()

    async def __aenter__(self) -> Agent:
        await self._producer.start()
        await self._consumer.start()
        await self._follower.start()
        await self._follower.until_caught_up()
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._follower.stop()
        await self._consumer.stop()
        await self._producer.stop()

    async def interact(self, model_id: str) -> tuple[str, str]:
        """Sends one interaction; returns (interaction_id, conversation_id)."""
        message = self._unit()
        event = InteractionEvent(
            occurred_at=utc_now(),
            interaction_id=new_id(),
            conversation_id=new_id(),
            model_id=model_id,
            weights_version=0,
            message=message,
            history=self._unit(),
            metadata=[0.0] * len(METADATA_KEYS),
            situation=message,
            memories=self._unit(8),
            memory_ids=[f"memory-{i}" for i in range(8)],
            memory_scores=[0.5, 0.4, 0.3],
            memory_propensities=[0.5] * 3,
            strategy_id=self._strategies[int(self._rng.integers(len(self._strategies)))],
            strategy_ids=self._strategies,
            probabilities=[1 / len(self._strategies)] * len(self._strategies),
            context=[0.5] * 7,
            confidence=0.5,
        )
        key = event.conversation_id.encode()
        await self._producer.send_and_wait(self.topics.interactions, event.to_bytes(), key=key)
        return event.interaction_id, event.conversation_id

    async def reply(self, interaction_id: str, conversation_id: str, model_id: str) -> None:
        """Sends a reply."""
        event = ReplyEvent(
            occurred_at=utc_now(),
            reply_id=new_id(),
            conversation_id=conversation_id,
            interaction_id=interaction_id,
            text=REPLIES[int(self._rng.integers(len(REPLIES)))],
        )
        self.waiting[interaction_id] = Reply(time.time(), model_id)
        self._none_waiting.clear()
        await self._producer.send_and_wait(
            self.topics.replies, event.to_bytes(), key=conversation_id.encode()
        )

    async def all_done(self, timeout_s: float = 60.0) -> None:
        """Waits until all replies sent are in weights that serve."""
        async with asyncio.timeout(timeout_s):
            await self._none_waiting.wait()

    def _unit(self, *shape: int) -> npt.NDArray[np.float64]:
        vectors = self._rng.normal(size=(*shape, self.settings.text_dim))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors

    async def _read(self) -> None:
        async for record in self._consumer:
            event = parse(ExperienceEvent, record.value)
            reply = self.waiting.get(event.interaction.interaction_id)
            if reply is not None and event.revision:
                reply.place = f"{record.topic}-{record.partition}", record.offset
                reply.after["experience"] = time.time() - reply.sent
                self._settle()

    def _changed(self, model_id: str) -> None:
        task = asyncio.create_task(self._swap(model_id))
        self._swapping.add(task)
        task.add_done_callback(self._swapping.discard)

    async def _swap(self, model_id: str) -> None:
        async def build(snapshot: WeightsSnapshot, _resume: bytes) -> WeightsManifest:
            await asyncio.to_thread(build_model, snapshot)
            return snapshot.manifest

        manifest, now = await self._follower.use(model_id, build), time.time()
        assert manifest is not None
        self._versions.setdefault(manifest.model_id, []).append(
            (manifest.consumed, manifest.created_at.timestamp(), now)
        )
        self._settle()

    def _settle(self) -> None:
        """Matches experiences and versions, which may arrive here in either order."""
        for interaction_id, reply in list(self.waiting.items()):
            if reply.place is None:
                continue
            partition, offset = reply.place
            for consumed, created_at, serving_at in self._versions.get(reply.model_id, []):
                if consumed.get(partition, 0) > offset:
                    reply.after |= {"learned": created_at - reply.sent, "serving": serving_at - reply.sent}
                    self.done.append(self.waiting.pop(interaction_id))
                    break
        if not self.waiting:
            self._none_waiting.set()


async def idle(agent: Agent, replies: int) -> list[Reply]:
    """Sends one reply at a time, each to an idle system."""
    for n in range(replies + 1):
        names = await agent.interact("idle")
        await asyncio.sleep(2 * agent.settings.publish_interval_s)
        await agent.reply(*names, "idle")
        await agent.all_done()
        if n == 0:
            agent.done.clear()  # the first reply also creates the model
    return agent.done


async def load(agent: Agent, rate: float, seconds: float, models: int) -> list[Reply]:
    """Sends `rate` replies per second, over `models` models."""
    count = int(rate * seconds)
    names = [f"load-{i}" for i in range(models)]
    asked = [(await agent.interact(names[n % models]), names[n % models]) for n in range(count)]
    started = time.monotonic()
    sending = []
    for n, (ids, model_id) in enumerate(asked):
        await asyncio.sleep(max(0.0, started + n / rate - time.monotonic()))
        sending.append(asyncio.create_task(agent.reply(*ids, model_id)))
    await asyncio.gather(*sending)
    await agent.all_done()
    return agent.done


def figures(replies: list[Reply]) -> dict[str, Any]:
    """p50, p99 and maximum of each stage, in ms."""
    out: dict[str, Any] = {"replies": len(replies)}
    for stage in STAGES:
        ms = np.array([1000 * r.after[stage] for r in replies])
        out[stage] = {
            "p50": round(float(np.percentile(ms, 50)), 1),
            "p99": round(float(np.percentile(ms, 99)), 1),
            "max": round(float(ms.max()), 1),
        }
    return out


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.load(
            data=Path(folder), topic_prefix=f"bench-{new_id()[-12:]}", encoder="hashing", port=0
        )
        async with Stack(settings, joiners=1, trainers=1, inference=0, on_event=print) as stack:
            results: dict[str, Any] = {
                "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
                "load_average": os.getloadavg()[0],
            }
            async with Agent(stack.settings) as agent:
                results["idle"] = figures(await idle(agent, arguments.idle))
            async with Agent(stack.settings) as agent:
                results["load"] = {
                    "rate": arguments.rate,
                    "models": arguments.models,
                    **figures(await load(agent, arguments.rate, arguments.seconds, arguments.models)),
                }
            return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--idle", type=int, default=30, help="number of replies to an idle system")
    parser.add_argument("--rate", type=float, default=50.0, help="replies per second under load")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the load")
    parser.add_argument("--models", type=int, default=4, help="number of models under load")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    results = asyncio.run(run(parser.parse_args()))
    print(f"{'ms after the reply':>22}  {'p50':>8}  {'p99':>8}  {'max':>8}")
    for name in ("idle", "load"):
        for stage in STAGES:
            row = results[name][stage]
            print(f"{name:>10} {stage:>11}  {row['p50']:8.1f}  {row['p99']:8.1f}  {row['max']:8.1f}")
    if path := parser.parse_args().json:
        path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
