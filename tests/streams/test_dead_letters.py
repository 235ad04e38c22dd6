from __future__ import annotations

import base64
from types import SimpleNamespace

import pytest

from streams.events import DeadLetter, parse
from streams.kafka.dead_letters import dead_letter, list_dead_letters, retry_dead_letters
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.settings import Settings
from streams.testing import send
from tests.streams.kafka_helpers import read_all

pytestmark = pytest.mark.integration


async def test_letters_are_listed_and_resent_unchanged(settings: Settings) -> None:
    topics = Topics.of(settings)
    assert await list_dead_letters(settings) == []
    values = [b"\xff\x00 no json", b"[]", b"x" * (MAX_RECORD_BYTES - 500_000), b"{}"]
    keys = [b"\xfe key", None, b"big", b"c"]
    await send(settings, [(topics.replies, k, v) for k, v in zip(keys, values, strict=True)])
    records = {bytes(r.value): r for r in await read_all(settings, topics.replies)}
    letters = [dead_letter(records[v], f"reason {n}") for n, v in enumerate(values)]
    written = [(topics.dead_letters, b"", letter.to_bytes()) for letter in letters]
    await send(settings, [*written, *written[:2], (topics.dead_letters, b"", b"not a letter")])

    listed = await list_dead_letters(settings)
    assert [letter.to_bytes() for letter in listed] == [letter.to_bytes() for letter in letters]
    assert [base64.b64decode(letter.raw) for letter in listed] == [values[0], values[1], b"", values[3]]
    assert [letter.raw_at_source for letter in listed] == [False, False, True, False]
    assert [letter.reason for letter in await list_dead_letters(settings, limit=2)] == [
        "reason 2",
        "reason 3",
    ]

    ids = [letter.dead_letter_id for letter in letters]
    done = await retry_dead_letters(settings, [ids[2], "never", ids[0], ids[0]])
    assert (done.sent, done.unknown, done.lost) == ([ids[2], ids[0]], ["never"], [])
    again = await retry_dead_letters(settings)
    assert again.sent == ids
    got = sorted((r.key, bytes(r.value)[:20]) for r in await read_all(settings, topics.replies) if r.key)
    wanted = [(keys[0], values[0])] * 3 + [(keys[2], values[2][:20])] * 3 + [(keys[3], values[3])] * 2
    assert got == sorted(wanted)


async def test_a_letter_whose_record_was_deleted_is_reported_as_lost(settings: Settings) -> None:
    topics = Topics.of(settings)
    await send(settings, [(topics.replies, b"c", b"{}")])
    [record] = await read_all(settings, topics.replies)
    letter = dead_letter(record, "too large").model_copy(
        update={"raw": "", "raw_at_source": True, "offset": -1}
    )
    await send(settings, [(topics.dead_letters, b"", letter.to_bytes())])
    done = await retry_dead_letters(settings)
    assert (done.sent, done.lost) == ([], [letter.dead_letter_id])


async def test_a_letter_that_no_worker_wrote_is_not_sent(settings: Settings) -> None:
    topics = Topics.of(settings)
    await send(settings, [(topics.replies, b"c", b"{}")])
    [record] = await read_all(settings, topics.replies)
    good = dead_letter(record, "why")
    changes = {
        "bytes": {"raw": "no base64!"},
        "key": {"key": "="},
        "elsewhere": {"topic": "payments"},
        "ours, but nobody's input": {"topic": topics.weights},
    }
    forged = [good.model_copy(update={"dead_letter_id": i} | change) for i, change in changes.items()]
    letters = [*forged, good.model_copy(update={"dead_letter_id": "good"})]
    await send(settings, [(topics.dead_letters, b"", letter.to_bytes()) for letter in letters])

    done = await retry_dead_letters(settings)
    assert done.sent == ["good"]
    assert list(done.refused) == list(changes)
    assert done.refused["bytes"].startswith("raw is 'no base64!', expected base64")
    assert done.refused["elsewhere"].startswith(f"its topic is 'payments', expected {topics.interactions}")
    assert len(await read_all(settings, topics.replies)) == 2


@pytest.mark.parametrize("timestamp", [-1, 0, 10**15, -(10**15), 2**63 - 1, -(2**63)])
def test_any_timestamp_of_a_record_makes_a_dead_letter(timestamp: int) -> None:
    record = SimpleNamespace(topic="t", partition=0, offset=7, key=None, value=b"x", timestamp=timestamp)
    assert parse(DeadLetter, dead_letter(record, "why").to_bytes()).dead_letter_id == "t-0-7"
