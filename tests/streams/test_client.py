"""The agent's client: typed results, clear errors, fail-over, and in-process decisions."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from cortex_core.errors import ConfigError, CortexError, InputError, UnavailableError
from cortex_core.text_encoder import HashingEncoder
from streams.client.client import CortexClient, Decision, Memory
from streams.events import new_id
from streams.inference.api import ConflictError, RequestError
from streams.local.embedded import free_port
from streams.settings import Settings
from streams.testing import async_wait_for, spawn_worker
from tests.streams.serving import interactions, listening, publish_versions, replies, scripted, version

ROOT = Path(__file__).parents[2]
MEMORIES = {"deploy": "deploy billing with the green pipeline", "lunch": "the canteen closes at two"}


# --- against a service --------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_decide_and_reply(settings: Settings) -> None:
    async with listening(settings) as url, CortexClient(url, agent_id="a-7") as cortex:
        decision = await cortex.decide(
            "How do I deploy billing?", conversation_id="c", memories=MEMORIES, explore=False, top_k=1
        )
        replied = await cortex.reply(decision, "thanks, that worked")
        rated = await cortex.reply(decision, rating=-0.5)
        later = await cortex.reply(None, kind="outcome", rating=1.0, conversation_id="c")
        [event] = await interactions(settings)
        found = {e.reply_id: e for e in await replies(settings)}

    assert (decision.interaction_id, decision.conversation_id) == (event.interaction_id, "c")
    assert (decision.model_id, decision.weights_version, event.agent_id) == ("default", 0, "a-7")
    assert decision.strategy.id == event.strategy_id
    assert decision.strategy.prompt_framing
    assert decision.confidence == event.confidence == 0.5
    assert decision.action == "hedge"
    assert sum(decision.probabilities.values()) == pytest.approx(1.0)
    [memory] = decision.memories
    assert (memory.id, memory.text, memory.score) == ("deploy", MEMORIES["deploy"], event.memory_scores[0])
    assert set(found) == {replied, rated, later}
    assert (found[replied].text, found[replied].interaction_id) == (
        "thanks, that worked",
        event.interaction_id,
    )
    assert (found[rated].kind, found[rated].rating) == ("rating", -0.5)
    assert (found[later].kind, found[later].interaction_id) == ("outcome", None)


@pytest.mark.integration
async def test_embeddings_of_ones_own_are_taken_as_they_are(settings: Settings) -> None:
    texts = HashingEncoder()
    row = texts.encode("deploy billing")
    async with listening(settings) as url, CortexClient(url) as cortex:
        for embedding in (row, row.tolist(), 1e30 * row.astype(np.float64)):
            memories: list[Memory | dict[str, Any]] = [
                {"id": "e", "embedding": embedding},
                Memory(id="t", text="lunch"),
            ]
            decision = await cortex.decide("deploy", conversation_id="c", memories=memories, explore=False)
            assert [m.id for m in decision.memories] == ["e", "t"]
        events = await interactions(settings)
    for event in events:
        assert np.abs(event.memories[0].astype(np.float32) - row).max() < 1e-3


@pytest.mark.integration
async def test_errors_say_what_is_wrong(settings: Settings) -> None:
    async with listening(settings) as url, CortexClient(url) as cortex:

        async def decide(message: str = "hello", **options: Any) -> Decision:
            return await cortex.decide(message, **({"conversation_id": "c"} | options))

        with pytest.raises(InputError, match="message is blank"):
            await decide(" ")
        with pytest.raises(RequestError, match="NaN or infinity") as nan:
            await decide(memories=[{"id": "m", "embedding": [float("nan")] * 384}])
        assert list(nan.value.fields) == ["embedding"]
        with pytest.raises(RequestError, match=r"3 numbers, expected 384") as short:
            await decide(memories=[{"id": "m", "embedding": [1.0, 2.0, 3.0]}])
        assert list(short.value.fields) == ["memories.0.embedding (id 'm')"]
        with pytest.raises(InputError, match=r"idle_s.* contains NaN"):
            await decide(metadata={"idle_s": float("nan")})
        with pytest.raises(InputError, match="as JSON"):
            await decide(metadata={"user": object()})
        with pytest.raises(InputError, match="as JSON"):
            await decide("half a character: \ud83d")
        with pytest.raises(InputError, match="top_k"):
            await decide(top_k=-1)
        with pytest.raises(InputError, match="conversation_id"):
            await cortex.reply(None, "thanks")
        with pytest.raises(InputError, match="not blank"):
            await cortex.reply(None, conversation_id="c")
        await decide(interaction_id="mine")
        with pytest.raises(ConflictError, match="another request"):
            await decide("other words", interaction_id="mine")
        assert (await decide(interaction_id="mine")).interaction_id == "mine"
        assert len(await interactions(settings)) == 1


@pytest.mark.parametrize("urls", ["", " , ", "localhost:8080", ["ftp://x"], []])
def test_unusable_urls(urls: str | list[str]) -> None:
    with pytest.raises(ConfigError, match="expected http://"):
        CortexClient(urls)


def test_nothing_to_connect_to(tmp_path: Path) -> None:
    nothing = Settings.load(data=tmp_path)
    with pytest.raises(ConfigError, match="cortex up"):
        CortexClient(settings=nothing)
    with pytest.raises(ConfigError, match="cortex up"):
        CortexClient.local(nothing)
    with pytest.raises(ConfigError, match="both"):
        CortexClient("http://127.0.0.1:1", kafka="127.0.0.1:2")


async def test_nobody_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with CortexClient(url, timeout_s=0.5) as cortex:
        with pytest.raises(UnavailableError, match=f"{url} does not answer"):
            await cortex.decide("hello", conversation_id="c")


# --- repetition and fail-over -------------------------------------------------------------------------------


@pytest.mark.parametrize("failures", [(503, 503), (0, 0), (502, 0, 504)])
async def test_a_call_is_repeated_with_the_same_ids(failures: Sequence[int]) -> None:
    async with scripted(*failures, 200) as (url, bodies), CortexClient(url) as cortex:
        decision = await cortex.decide("hello", conversation_id="c")
    assert (decision.weights_version, decision.strategy.tool_permissions) == (3, ("read",))
    assert len(bodies) == len(failures) + 1
    assert len({b["interaction_id"] for b in bodies}) == 1
    assert bodies[0]["interaction_id"]


async def test_what_cannot_succeed_is_not_repeated() -> None:
    async with scripted(422) as (url, bodies), CortexClient(url) as cortex:
        with pytest.raises(RequestError, match="said 422"):
            await cortex.decide("hello", conversation_id="c")
        assert len(bodies) == 1
    async with scripted(500) as (url, bodies), CortexClient(url) as cortex:
        with pytest.raises(CortexError, match="said 500"):
            await cortex.reply(None, "hello", conversation_id="c")
        assert len(bodies) == 1


@pytest.mark.integration
async def test_a_too_large_request_is_refused_with_the_limit_and_not_repeated(settings: Settings) -> None:
    """The client sends all of it before it reads: the service must not close while it does."""
    memories = [{"id": f"m{n}", "text": "x" * 5_000} for n in range(900)]  # 4.5 MB
    async with listening(settings) as url, CortexClient(url) as cortex:
        sent: list[str] = []
        post = cortex._transport._http.post  # type: ignore[attr-defined]  # of the transport over HTTP

        async def counted(url: str, **options: Any) -> Any:
            sent.append(url)
            return await post(url, **options)

        cortex._transport._http.post = counted  # type: ignore[attr-defined]  # as above
        with pytest.raises(RequestError, match="expected at most 4000000"):
            await cortex.decide("hello", conversation_id="c", memories=memories)
        assert len(sent) == 1
        assert (await cortex.decide("hello", conversation_id="c")).weights_version == 0


@pytest.mark.integration
async def test_a_client_that_closes_after_its_request_reads_the_refusal_too(settings: Settings) -> None:
    """urllib sends Connection: close, and reads the answer only when it has sent everything."""

    def post(url: str, size: int) -> tuple[int, str]:
        request = urllib.request.Request(
            f"{url}/v1/decide", b" " * size, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        with caught.value as answer:
            return answer.code, json.loads(answer.read())["error"]["type"]

    async with listening(settings) as url:
        for size in (4_000_001, 20_000_000):
            assert await asyncio.to_thread(post, url, size) == (413, "too_large")
    secured = settings.model_copy(update={"api_keys": SecretStr(f"a:decide:{'0' * 64}")})
    async with listening(secured) as url:
        assert await asyncio.to_thread(post, url, 3_000_000) == (401, "unauthorized")


async def test_conversations_stay_with_one_service_and_spread_over_all() -> None:
    async with scripted(200) as (one, at_one), scripted(200) as (two, at_two):
        async with CortexClient(f"{one},{two}/") as cortex:
            for turn in range(40):
                await cortex.decide("hello", conversation_id=f"c-{turn % 20}")
        first, second = ({b["conversation_id"] for b in bodies} for bodies in (at_one, at_two))
        assert not first & second
        assert len(first | second) == 20
        assert min(len(first), len(second)) > 2


async def test_a_service_that_failed_is_asked_last() -> None:
    async with (
        scripted(503) as (bad, at_bad),
        scripted(200) as (good, at_good),
        CortexClient([bad, good]) as cortex,
    ):
        for turn in range(20):
            await cortex.decide("hello", conversation_id=f"c-{turn}")
    assert len(at_bad) == 1
    assert len(at_good) == 20


@pytest.mark.integration
async def test_one_of_two_workers_is_killed(settings: Settings) -> None:
    """Every decision and reply that was acknowledged is in Kafka, and each counts once."""
    workers = [spawn_worker("inference", settings) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    decisions: list[Decision] = []
    told: list[str] = []
    async with CortexClient([w.url for w in workers]) as cortex:

        async def converse(number: int) -> None:
            for turn in range(15):
                decision = await cortex.decide(
                    f"question {turn}", conversation_id=f"c-{number}", memories=MEMORIES
                )
                decisions.append(decision)
                told.append(await cortex.reply(decision, f"thanks {turn}"))

        async def kill() -> None:
            await async_wait_for(lambda: len(decisions) > 40, "some traffic", every_s=0.002)
            workers[0].kill()

        await asyncio.gather(kill(), *(converse(n) for n in range(10)))
    assert workers[0].returncode == -9

    made = {d.interaction_id: d for d in decisions}
    assert len(made) == len(decisions) == 150
    events = await interactions(settings)
    assert {e.interaction_id for e in events} == set(made)
    # What the dead worker published without answering was decided again by the other: alike, so that it
    # does not matter which of the two records counts.
    times = Counter(e.interaction_id for e in events)
    for event in events:
        decision = made[event.interaction_id]
        assert event.strategy_id == decision.strategy.id
        assert event.memory_ids[: len(decision.memories)] == [m.id for m in decision.memories]
        assert times[event.interaction_id] <= 2
    assert {e.reply_id for e in await replies(settings)} == set(told)
    assert len(set(told)) == 150


# --- in-process ---------------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_in_process(settings: Settings) -> None:
    await publish_versions(settings, version(settings, 1))
    async with CortexClient.local(settings) as cortex:
        first = await cortex.decide("How do I deploy billing?", conversation_id="c", memories=MEMORIES)
        assert first.weights_version == 1
        assert {m.text for m in first.memories} == set(MEMORIES.values())
        told = await cortex.reply(first, "thanks, that worked")
        with pytest.raises(RequestError, match="3 numbers, expected 384"):
            await cortex.decide("x", conversation_id="c", memories=[{"id": "m", "embedding": [1, 2, 3]}])

        await publish_versions(settings, version(settings, 2))

        async def follows() -> bool:
            return (await cortex.decide("x", conversation_id="c")).weights_version == 2

        await async_wait_for(follows, "version 2")
    [event, *_] = await interactions(settings)
    [reply] = await replies(settings)
    assert (event.interaction_id, event.strategy_id) == (first.interaction_id, first.strategy.id)
    assert (reply.reply_id, reply.interaction_id) == (told, first.interaction_id)
    assert reply.embedding is not None
    assert reply.embedding.shape == event.message.shape


async def test_in_process_without_kafka_says_which_address(settings: Settings) -> None:
    address = f"127.0.0.1:{free_port()}"
    cortex = CortexClient(kafka=address, settings=settings, start_timeout_s=3.0)
    with pytest.raises(UnavailableError, match=f"(?s)not ready within 3 s.*{address}"):
        await cortex.__aenter__()
    with pytest.raises(ConfigError, match="async with"):
        await cortex.decide("hello", conversation_id="c")


# --- the package --------------------------------------------------------------------------------------------


def test_importing_the_client_loads_no_torch() -> None:
    code = "import sys; from streams import CortexClient; assert CortexClient; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


@pytest.mark.integration
async def test_the_example_runs(settings: Settings) -> None:
    async with listening(settings) as url:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ROOT / "examples" / "agent.py"),
            url,
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PYTHONPATH": str(ROOT)},
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        assert "weights version 0" in output.decode()
        [event] = await interactions(settings)
        [reply] = await replies(settings)
    assert reply.interaction_id == event.interaction_id
    assert reply.text == "Thanks, that worked!"
    assert new_id() > event.interaction_id  # UUIDv7: ordered by time
