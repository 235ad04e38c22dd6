"""When models were forgotten: what reads events again leaves out those from before. Loads no torch."""

from __future__ import annotations

import contextlib

from cortex_core.errors import InputError
from streams.events import ControlEvent, parse
from streams.kafka.reader import reading, records_to_end
from streams.kafka.topics import Topics
from streams.settings import Settings


async def forgotten_models(settings: Settings) -> dict[str, float]:
    """Model → Unix seconds when it was last forgotten (`cortex models forget`), of those that were.

    Raises:
        UnavailableError: Kafka stopped sending.
        KafkaError, OSError: the broker does not answer, or has no such topic.
    """
    forgotten: dict[str, float] = {}
    async with reading(settings, [Topics.of(settings).control]) as consumer:
        async for record in records_to_end(consumer, settings):
            with contextlib.suppress(InputError):
                if record.value is not None:
                    event = parse(ControlEvent, record.value)
                    if event.action == "forgotten":
                        forgotten[event.model_id] = event.occurred_at.timestamp()
    return forgotten
