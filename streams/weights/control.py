"""Operator commands for a model: rollback, pin, pause, forget; how they are sent and followed.

| action | effect on inference workers | effect on trainers |
|---|---|---|
| rollback | they serve the new version | publish the old weights as a new version, and continue from it |
| pin | they serve this version only | neither learn nor publish |
| unpin | they serve the newest version again | continue with the first experience not learned from |
| pause | none | neither learn nor publish |
| resume | none | continue with the first experience not learned from |
| forget | they drop the model once its versions are deleted | delete its versions, replay and commands |
| forgotten | none | written by the trainer that has forgotten the model, in place of all its commands |

The topic is compacted by key, so a reader gets the state of every model from the topic's beginning. The key
is the model_id and the action's subject: with the model_id alone, a later pause would delete a pin.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import structlog
from aiokafka import AIOKafkaProducer
from pydantic import ValidationError

from cortex_core.errors import InputError, WeightsError
from streams.connections import kafka_client_options
from streams.events import ControlAction, ControlEvent, describe, new_id, parse, utc_now
from streams.forgotten import is_forget
from streams.kafka.clients import started
from streams.kafka.follower import StateFollower
from streams.kafka.reader import reading, records_to_end
from streams.kafka.topics import Topics, create_topics
from streams.settings import Settings
from streams.weights.records import delete
from streams.weights.versions import read_versions

log = structlog.get_logger(__name__)

_SUBJECT: dict[ControlAction, str] = {
    "rollback": "rollback",
    "pin": "pin",
    "unpin": "pin",
    "pause": "pause",
    "resume": "pause",
    "forget": "forget-model",
    "forgotten": "forget-model",
}


@dataclass(frozen=True, slots=True)
class Rollback:
    """The latest rollback requested. It is done once the model's `Resume` contains its offset."""

    version: int
    offset: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Control:
    """The state of one model by all operator commands so far."""

    pinned: int | None = None
    """The version that inference workers serve; None: the newest."""
    paused: bool = False
    rollback: Rollback | None = None
    forget: bool = False
    """Whether the model is to be forgotten, and no trainer has done it yet."""
    forgotten_at: datetime | None = None
    """When the model was last forgotten."""

    @property
    def training_paused(self) -> bool:
        """Whether training is paused, by a pause or a pin."""
        return self.paused or self.pinned is not None

    def after(self, event: ControlEvent, offset: int) -> Control:
        """The state after one more event, whose record has this offset on the control topic.

        Raises:
            InputError: the action needs a version and has none.
        """
        if event.action in ("rollback", "pin") and (event.version is None or event.version < 1):
            raise InputError(
                f"{event.action} of {event.model_id} has version {event.version}, expected one ≥ 1"
            )
        match event.action:
            case "rollback":
                assert event.version is not None
                return replace(self, rollback=Rollback(event.version, offset, event.reason))
            case "pin" | "unpin":
                return replace(self, pinned=event.version if event.action == "pin" else None)
            case "pause" | "resume":
                return replace(self, paused=event.action == "pause")
            case "forget":
                return replace(self, forget=True)
            case "forgotten":
                return Control(forgotten_at=event.occurred_at)


NO_CONTROL = Control()
MAX_MODELS = 100_000
"""Maximum number of models with a state; about 1 KB each."""

OnControl = Callable[[str, Control], Awaitable[None]]


class ControlFollower(StateFollower):
    """Follows the operator commands of all models.

    An invalid record is refused and changes nothing.
    """

    def __init__(
        self,
        settings: Settings,
        on_control: OnControl | None = None,
        *,
        on_state: Callable[[str | None], None] | None = None,
    ) -> None:
        """
        Args:
            on_control: awaited with the model_id and its new state after each event, from the first one on.
            on_state: called with the reason why Kafka is unavailable, or None if it is available.
        """
        super().__init__(settings, Topics.of(settings).control, on_state)
        self._on_control = on_control
        self._of: dict[str, Control] = {}

    def of(self, model_id: str) -> Control:
        """The state of this model."""
        return self._of.get(model_id, NO_CONTROL)

    def models(self) -> list[str]:
        """Ids of the models that had an operator command."""
        return sorted(self._of)

    async def _add(self, record: Any) -> None:
        if record.value is None or is_forget(record.key):
            return
        event = parse(ControlEvent, record.value)
        state = self.of(event.model_id).after(event, record.offset)
        if event.model_id not in self._of and len(self._of) >= MAX_MODELS:
            raise InputError(
                f"{event.action} of {event.model_id}: there are {MAX_MODELS} models with a state"
            )
        self._of[event.model_id] = state
        if self._on_control is not None:
            try:
                await self._on_control(event.model_id, state)
            except Exception as error:
                log.exception("on_control failed", model_id=event.model_id, error=str(error))


async def send_control(
    settings: Settings, action: ControlAction, model_id: str, version: int | None = None, reason: str = ""
) -> ControlEvent:
    """Sends an operator command; returns once Kafka has acknowledged it.

    Args:
        version: for rollback and pin, one of the kept versions. None: for a rollback, the version before the
            newest; for a pin, the newest.

    Raises:
        WeightsError: the version is not kept; the message lists those that are.
        KafkaError, OSError: the broker does not answer.
    """
    await create_topics(settings)
    if action in ("rollback", "pin"):
        kept = [m.version for m in (await read_versions(settings)).history(model_id)]
        if version is None and len(kept) > (action == "rollback"):
            version = kept[-2] if action == "rollback" else kept[-1]
        if version not in kept:
            which = "no version to go to" if version is None else f"version {version} is not kept"
            raise WeightsError(
                f"{action} of {model_id}: {which}; kept are {', '.join(map(str, kept)) or 'none'}"
            )
    try:
        event = ControlEvent(
            control_id=new_id(),
            occurred_at=utc_now(),
            model_id=model_id,
            action=action,
            version=version,
            reason=reason,
        )
    except ValidationError as error:
        raise InputError(f"{action} of {model_id!r}: {describe(error)}") from error
    options = kafka_client_options(settings)
    async with started(AIOKafkaProducer(**options, enable_idempotence=True)) as producer:
        key = encode_control_key(model_id, _SUBJECT[action])
        await producer.send_and_wait(Topics.of(settings).control, event.to_bytes(), key=key, partition=0)
    return event


def encode_control_key(model_id: str, subject: str) -> bytes:
    """The key of a model's commands about one subject."""
    return json.dumps([model_id, subject], ensure_ascii=False).encode()


async def publish_forgotten(producer: AIOKafkaProducer, settings: Settings, model_id: str) -> None:
    """Replaces all commands for a model by the note that it is forgotten, in the caller's open transaction.

    Raises:
        KafkaError: abort the transaction.
    """
    topic = Topics.of(settings).control
    obsolete = sorted({*_SUBJECT.values()} - {_SUBJECT["forget"]})
    await delete(producer, [(topic, 0, encode_control_key(model_id, subject)) for subject in obsolete])
    event = ControlEvent(control_id=new_id(), occurred_at=utc_now(), model_id=model_id, action="forgotten")
    key = encode_control_key(model_id, _SUBJECT[event.action])
    await (await producer.send(topic, event.to_bytes(), key=key, partition=0))


async def read_controls(settings: Settings) -> dict[str, Control]:
    """The state of each model that had an operator command.

    Raises:
        UnavailableError: Kafka stopped sending.
        KafkaError, OSError: the broker does not answer, or has no such topic.
    """
    controls = ControlFollower(settings)
    async with reading(settings, [Topics.of(settings).control]) as consumer:
        async for record in records_to_end(consumer, settings):
            await controls.handle([record])
    return {model_id: controls.of(model_id) for model_id in controls.models()}


async def wait_until_forgotten(settings: Settings, model_id: str) -> None:
    """Returns once a trainer has carried out a `forget`. Give it a timeout."""
    forgotten = asyncio.Event()

    async def note(changed: str, control: Control) -> None:
        if changed == model_id:
            forgotten.clear() if control.forget else forgotten.set()

    async with ControlFollower(settings, note) as controls:
        await controls.until_caught_up()
        await forgotten.wait()
