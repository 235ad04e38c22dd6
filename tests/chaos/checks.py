"""What must hold after every round; each deviation is one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import redis
from pydantic import SecretStr

from cortex_core.errors import CortexError
from streams.audit.compare import audit
from streams.audit.evidence import Evidence, Version
from streams.audit.reading import collect
from streams.audit.report import Report
from streams.audit.versions import check_versions
from streams.joiner.rebuild import rebuild
from streams.kafka.topics import Topics
from streams.local.stack import Stack
from streams.replay_store import RedisReplayBuffer, decode
from streams.settings import Settings
from streams.testing import async_wait_for
from tests.chaos.load import Load
from tests.chaos.watch import Versions
from tests.streams.kafka_helpers import lag

SETTLED_S = 10.0
"""An interaction whose window closed less than this before a rebuild may be closed by one of the two only."""


async def settled(stack: Stack) -> None:
    """Waits until every worker is ready and has committed everything."""
    settings, topics = stack.settings, Topics.of(stack.settings)
    groups = {
        topics.interactions: settings.joiner_group,
        topics.replies: settings.joiner_group,
        topics.experiences: settings.trainer_group,
    }

    missing: dict[str, str] = {}

    async def ready() -> bool:
        missing.clear()
        async with httpx.AsyncClient(timeout=5, verify=False) as http:
            for worker in stack.workers:
                try:
                    answer = await http.get(f"{worker.url}/readyz")
                except httpx.HTTPError as error:
                    missing[worker.name] = f"{type(error).__name__}: {error}"
                else:
                    if answer.status_code != 200:
                        missing[worker.name] = answer.text
        return not missing

    async def committed() -> bool:
        return not any([await lag(settings, group, topic) for topic, group in groups.items()])

    try:
        await async_wait_for(ready, "all workers to be ready", every_s=0.1)
    except AssertionError as error:
        raise AssertionError(f"{error}; not ready: {missing}") from error
    await async_wait_for(committed, "all events to be joined and learned", every_s=0.1)


async def deviations(stack: Stack, load: Load, versions: Versions) -> tuple[list[str], Report]:
    """Everything that is not as promised; to be called once the stack has settled."""
    settings = stack.settings
    evidence = await collect(settings)
    report = audit(evidence)
    return [
        *map(str, report.findings),
        *_unaccounted(evidence, report, load),
        *await _chain(versions),
        *await _not_newest(stack, versions),
        *await _rebuilt(settings, load.models),
    ], report


def _unaccounted(evidence: Evidence, report: Report, load: Load) -> list[str]:
    """Acknowledged events that no topic has, and what the audit only counts but never happens here."""
    gone = [
        ("interaction", load.interactions - {i.id for i in evidence.interactions}),
        ("reply", load.replies - {r.id for r in evidence.replies}),
    ]
    lost = [f"lost: {what} {id_} was acknowledged, and is in no topic" for what, ids in gone for id_ in ids]
    replies = len({(r.conversation_id, r.id) for r in evidence.replies})
    if report.counts["joined"] != replies:
        lost.append(f"lost: {report.counts['joined']} of {replies} replies are in an experience")
    return lost + [
        f"{report.counts[name]} events are {name}"
        for name in ("refused", "uncommitted", "late", "excess", "reused", "beyond")
        if report.counts[name]
    ]


async def _chain(versions: Versions) -> list[str]:
    """Forks among all versions since the start, also those that compaction has removed."""
    await versions.follower.catch_up()
    report = Report()
    check_versions((Version.of(manifest) for _, manifest in versions.seen), report)
    return [str(finding) for finding in report.findings]


async def _not_newest(stack: Stack, versions: Versions) -> list[str]:
    """Inference workers that do not come to serve the newest version of every model."""
    behind: list[str] = []

    async def all_newest() -> bool:
        await versions.follower.catch_up()
        wanted = versions.newest()
        behind.clear()
        async with httpx.AsyncClient(timeout=5, verify=False) as http:
            for worker in stack.workers:
                if worker.kind == "inference":
                    models: Any = (await http.get(f"{worker.url}/v1/models")).json()["models"]
                    served = {m["model_id"]: m["version"] for m in models}
                    if served != wanted:
                        behind.append(f"{worker.name} serves {served}, the newest versions are {wanted}")
        return not behind

    try:
        await async_wait_for(all_newest, "the newest versions", every_s=0.1, timeout_s=30.0)
    except AssertionError:
        return behind
    return []


async def _rebuilt(settings: Settings, models: Sequence[str]) -> list[str]:
    """Differences between live replay and a rebuild into an empty database of the same Redis."""
    other_url = settings.redis_address.removesuffix("/0") + "/1"
    empty = settings.model_copy(update={"redis_url": SecretStr(other_url)})
    with (
        redis.Redis.from_url(settings.redis_address) as live,
        redis.Redis.from_url(other_url) as other,
    ):
        other.flushdb()
        before = {model: _entries(settings, live, model) for model in models}
        now: Any = live.time()
        try:
            await rebuild(empty)
        except CortexError as error:
            return [f"the rebuild failed: {error}"]
        after = {model: _entries(empty, other, model) for model in models}
        other.flushdb()
    open_since = now[0] - settings.join_window_s - SETTLED_S
    found = []
    for model in models:
        for id_ in sorted(before[model].keys() | after[model].keys()):
            one, two = before[model].get(id_), after[model].get(id_)
            entry = one or two
            assert entry is not None
            may_differ = b'"outcome":"no_reply"' in entry[1] and entry[0] > open_since
            if one != two and not may_differ:
                found.append(f"rebuild: {id_} of {model} is {_shown(two)}, in replay it is {_shown(one)}")
    return found


Entry = tuple[float, bytes]
"""When its interaction occurred, in Unix seconds, and the JSON; versions depend on the time of writing."""


def _entries(settings: Settings, client: redis.Redis, model_id: str) -> dict[str, Entry]:
    store = RedisReplayBuffer.of(settings, model_id, client)
    order: Any = client.zrange(store.keys.order, 0, -1, withscores=True)
    scores = {id_.decode(): score for id_, score in order}
    return {
        id_: (scores[id_], decode(value)[1])
        for id_, value in store.raw_values([*scores])
        if value is not None
    }


def _shown(entry: Entry | None) -> str:
    return "missing" if entry is None else entry[1][:2_000].decode()
