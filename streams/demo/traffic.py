"""Traffic of the simulated users: requests at a constant rate, each followed by its replies.

All traffic goes over HTTP, like that of an agent. What was sent and acknowledged is recorded in a `Tally`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

import httpx

from cortex_core.errors import CortexError
from cortex_core.strategy_registry import StrategyRegistry
from streams.demo.measures import Sample, Tally
from streams.demo.scenario import MEMORIES
from streams.demo.users import Request, Users, memory_precision, reward

if TYPE_CHECKING:
    from streams.client.client import CortexClient, Decision

CONCURRENCY = 16
"""Maximum number of requests in flight. A machine that cannot sustain the rate serves fewer requests, instead
of all of them too late."""
STRATEGIES = StrategyRegistry().ids


class Traffic:
    """The traffic of one run; the client distributes the conversations over the inference workers.

    Every request is sent twice: for the learning model, and for a control model that gets no replies and so
    stays untrained: its memories are those of cosine similarity.
    """

    def __init__(
        self, users: Users, client: CortexClient, model_id: str, *, concurrency: int = CONCURRENCY
    ) -> None:
        self.users = users
        self.model_id = model_id
        self.control_id = f"{model_id}-control"
        self.tally = Tally()
        self._client = client
        self._slots = asyncio.Semaphore(concurrency)
        # Requests and replies of a conversation are sent in order, as one person sends them.
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._latest: dict[str, str] = {}
        # A request that timed out may still be logged later. Then it is unknown which interaction is the
        # latest of its conversation, so that replies must name theirs.
        self._latest_unknown: set[str] = set()

    async def run(self, seconds: float, rate: float, stop: asyncio.Event) -> None:
        """Sends `rate` requests per second for `seconds`, whatever the answers, and their replies.

        Returns after the last reply, or soon after `stop` is set.
        """
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for index in range(round(seconds * rate)):
                due = begun + index / rate - loop.time()
                if due > 0 and await _set_within(stop, due):
                    break
                await self._slots.acquire()
                if stop.is_set() or loop.time() > begun + seconds:
                    break
                tasks.append(group.create_task(self._one(index)))
            stopped = group.create_task(stop.wait())
            while any(not task.done() for task in tasks) and not stop.is_set():
                await asyncio.wait(
                    [*(t for t in tasks if not t.done()), stopped], return_when="FIRST_COMPLETED"
                )
            stopped.cancel()
            for task in tasks:
                task.cancel()

    async def _one(self, index: int) -> None:
        request = self.users.request(index)
        conversation = f"{self.model_id}/{request.conversation}"
        try:
            learned, control = await asyncio.gather(
                self._decide(request, conversation),
                self._ask(request, f"{conversation}/control", self.control_id, explore=False),
            )
        finally:
            self._slots.release()
        if control is not None:
            self.tally.control_interactions.append(control.interaction_id)
        if learned is None:
            return
        self.tally.interactions.append(learned.interaction_id)
        shown = [memory.id for memory in learned.memories]
        reaction = self.users.react(request, learned.strategy.id, shown)
        if control is not None:
            self._record(request, learned, control, reaction.reward, reaction.satisfied)
        for place, reply in enumerate(reaction.replies):
            await asyncio.sleep(reply.delay_s)
            # Some replies do not name their interaction; the joiner must find it.
            unnamed = place == 0 and index % 4 == 0
            await self._reply(conversation, learned, reply.text, unnamed)

    async def _decide(self, request: Request, conversation: str) -> Decision | None:
        async with self._turns[conversation]:
            decision = await self._ask(request, conversation, self.model_id, explore=True)
            if decision is not None:
                self._latest[conversation] = decision.interaction_id
            else:
                self._latest_unknown.add(conversation)
            return decision

    async def _ask(
        self, request: Request, conversation: str, model_id: str, *, explore: bool
    ) -> Decision | None:
        try:
            return await self._client.decide(
                message=request.text,
                conversation_id=conversation,
                history=list(request.history),
                metadata=dict(request.metadata),
                memories=MEMORIES,
                model_id=model_id,
                explore=explore,
            )
        except (CortexError, httpx.HTTPError) as error:
            self.tally.errors[f"decide: {type(error).__name__}: {error}"] += 1
            return None

    async def _reply(self, conversation: str, decision: Decision, text: str, unnamed: bool) -> None:
        async with self._turns[conversation]:
            latest = None if conversation in self._latest_unknown else self._latest[conversation]
            named = not unnamed or latest != decision.interaction_id
            try:
                reply_id = await self._client.reply(
                    decision if named else None, text, conversation_id=None if named else conversation
                )
            except (CortexError, httpx.HTTPError) as error:
                self.tally.errors[f"reply: {type(error).__name__}: {error}"] += 1
                return
        self.tally.replies[reply_id] = decision.interaction_id

    def _record(
        self, request: Request, learned: Decision, control: Decision, value: float, satisfied: bool
    ) -> None:
        shown = [memory.id for memory in learned.memories]
        cosine = [memory.id for memory in control.memories]
        self.tally.samples.append(
            Sample(
                index=request.index,
                reward=value,
                satisfied=satisfied,
                precision=memory_precision(request.kind, shown),
                control_precision=memory_precision(request.kind, cosine),
                confidence=learned.confidence,
                weights_version=learned.weights_version,
                control={s: reward(request.kind, s, cosine) for s in STRATEGIES},
            )
        )


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True
