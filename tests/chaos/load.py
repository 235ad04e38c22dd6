"""The load: agents over HTTP, and events that reach Kafka out of order and more than once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from aiokafka.errors import KafkaError

from cortex_core.errors import CortexError, UnavailableError
from streams.client.client import CortexClient, Decision
from streams.events import InteractionEvent, ReplyEvent, new_id
from streams.settings import Settings
from streams.testing import send
from tests.streams import joined
from tests.streams.experiences import experience

AGENTS = 6
PAUSE_S = 0.3
"""The mean pause of an agent between two calls."""
MEMORIES = {"m1": "Deploys run on Fridays.", "m2": "Staging is called blue.", "m3": "Answers are short."}
TEXTS = ("Thanks, that worked!", "No, I meant the other one.", "Why?", "Next: what about billing?")
FEATURES = (
    "message",
    "history",
    "metadata",
    "situation",
    "memories",
    "memory_ids",
    "memory_scores",
    "memory_propensities",
    "strategy_id",
    "strategy_ids",
    "probabilities",
    "context",
)


@dataclass(frozen=True, slots=True)
class Sent:
    """An acknowledged reply that named its interaction."""

    reply_id: str
    interaction_id: str
    conversation_id: str
    model_id: str
    at: float
    """When its call began, on the monotonic clock."""


@dataclass
class Load:
    """Sends events while `running`; remembers what was acknowledged and how long each call took."""

    settings: Settings
    urls: Sequence[str]
    models: Sequence[str]
    interactions: set[str] = field(default_factory=set)
    """Ids of all acknowledged interactions."""
    replies: set[str] = field(default_factory=set)
    """Ids of all acknowledged replies."""
    recent: list[Sent] = field(default_factory=list)
    """Of this round."""
    longest_s: float = 0.0
    """The longest call of this round."""
    failed: int = 0
    """Calls that were given up after the client's timeout, in all rounds: they may be stored or not."""
    _conversations: int = 0

    @contextlib.asynccontextmanager
    async def running(self, rng: random.Random) -> AsyncIterator[None]:
        """Sends until the body ends; then every agent finishes its conversation."""
        self.recent, self.longest_s = [], 0.0
        stop = asyncio.Event()
        async with CortexClient(self.urls) as client, httpx.AsyncClient(verify=False, timeout=5) as http:
            agents = [self._agent(client, http, random.Random(rng.random())) for _ in range(AGENTS)]
            works = [*agents, self._out_of_order(random.Random(rng.random()))]
            tasks = [asyncio.create_task(_repeated(work, stop)) for work in works]
            try:
                yield
                stop.set()
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _agent(
        self, client: CortexClient, http: httpx.AsyncClient, rng: random.Random
    ) -> Callable[[], Coroutine[Any, Any, None]]:
        async def conversation() -> None:
            name, model_id = f"agent-{new_id()}", rng.choice(self.models)
            with contextlib.suppress(UnavailableError):  # counted in `_timed`
                for _ in range(rng.randint(1, 3)):
                    decision = await self._decide(client, name, model_id)
                    await asyncio.sleep(rng.uniform(0, 2 * PAUSE_S))
                    # The later ones amend the experience of the first.
                    for _ in range(rng.choice([0, 1, 1, 2, 3])):
                        await self._reply(client, http, decision, rng)
                        await asyncio.sleep(rng.uniform(0, 2 * PAUSE_S))

        return conversation

    async def _decide(self, client: CortexClient, conversation_id: str, model_id: str) -> Decision:
        decision: Decision = await self._timed(
            client.decide(
                "How do I deploy this?",
                conversation_id=conversation_id,
                memories=MEMORIES,
                model_id=model_id,
            )
        )
        self.interactions.add(decision.interaction_id)
        return decision

    async def _reply(
        self, client: CortexClient, http: httpx.AsyncClient, decision: Decision, rng: random.Random
    ) -> None:
        named, reply_id, began = rng.random() < 0.7, new_id(), time.monotonic()
        said: dict[str, Any] = (
            {"rating": rng.choice([-1.0, 0.5, 1.0])} if rng.random() < 0.5 else {"text": rng.choice(TEXTS)}
        )
        conversation_id = decision.conversation_id
        await self._timed(
            client.reply(
                decision if named else None, conversation_id=conversation_id, reply_id=reply_id, **said
            )
        )
        self.replies.add(reply_id)
        if named:
            ids = (reply_id, decision.interaction_id, conversation_id, decision.model_id)
            self.recent.append(Sent(*ids, began))
        if rng.random() < 0.2:
            # Again, and possibly at the other worker, which does not know it: a second event with this id.
            body = {
                "conversation_id": conversation_id,
                "interaction_id": decision.interaction_id if named else None,
                "kind": "rating" if "rating" in said else "text",
                "reply_id": reply_id,
                **said,
            }
            with contextlib.suppress(httpx.HTTPError):
                await http.post(f"{rng.choice(self.urls)}/v1/replies", json=body)

    async def _timed(self, call: Coroutine[Any, Any, Any]) -> Any:
        began = time.monotonic()
        try:
            return await call
        except UnavailableError:
            self.failed += 1
            raise
        finally:
            self.longest_s = max(self.longest_s, time.monotonic() - began)

    def _out_of_order(self, rng: random.Random) -> Callable[[], Coroutine[Any, Any, None]]:
        async def batch() -> None:
            await self.burst(rng, conversations=2)
            await asyncio.sleep(rng.uniform(0.5, 1.5))

        return batch

    async def burst(self, rng: random.Random, conversations: int) -> None:
        """Sends whole conversations to Kafka, in random order and two events twice."""
        numbers = range(self._conversations, self._conversations + conversations)
        self._conversations += conversations
        model_id = rng.choice(self.models)
        features = experience(f"features-{numbers.start}", model_id=model_id).interaction
        update = {"model_id": model_id} | {name: getattr(features, name) for name in FEATURES}
        events = [
            event.model_copy(update=update) if isinstance(event, InteractionEvent) else event
            for n in numbers
            for event in joined.conversation(n, named=n % 2 == 0)
        ]
        rng.shuffle(events)
        events += rng.sample(events, 2)
        while True:
            try:
                await send(self.settings, events)
                break
            except (CortexError, KafkaError, OSError):  # what was sent already is sent again
                await asyncio.sleep(PAUSE_S)
        self.interactions |= {e.interaction_id for e in events if isinstance(e, InteractionEvent)}
        self.replies |= {e.reply_id for e in events if isinstance(e, ReplyEvent)}


async def _repeated(work: Callable[[], Coroutine[Any, Any, None]], stop: asyncio.Event) -> None:
    while not stop.is_set():
        await work()
