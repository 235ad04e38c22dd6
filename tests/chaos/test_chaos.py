"""A short run of `make chaos`: three rounds, each with two faults at once, and a session of a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.faults import Fault
from tests.chaos.rounds import Chaos, settings_of
from tests.streams.joined import quick

pytestmark = pytest.mark.integration

ROUNDS = (
    (Fault("kill -9", "kafka"), Fault("kill -9", "inference")),
    (Fault("SIGSTOP", "joiner"), Fault("kill -9", "trainer")),
    (Fault("kill -9", "joiner"), Fault("kill -9", "redis")),
)


async def test_what_is_promised_holds_while_any_process_is_killed(tmp_path: Path) -> None:
    said: list[str] = []
    async with Chaos.running(quick(settings_of(tmp_path)), 0, said.append) as chaos:
        for faults in ROUNDS:
            played = await chaos.play(faults)
            assert played.deviations == [], said
    assert played.events > 0
