"""The command line: what each command says and exits with, run as a user runs it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaProducer
from redis import Redis
from typer.main import get_group
from typer.testing import CliRunner

from streams.cli import status
from streams.cli.app import app
from streams.cli.logs import show_logs
from streams.heartbeats import FORGOTTEN_S
from streams.kafka.topics import Topics, create_topics
from streams.settings import Settings
from streams.testing import spawn_worker, wait_for

COMMANDS = {
    "up", "demo", "joiner", "trainer", "inference", "rebuild", "topics", "status", "audit", "logs",
    "dead-letters", "control", "models", "forget", "keys", "version",
}  # fmt: skip


def cortex(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("CORTEX_")} | variables
    command = [sys.executable, "-m", "streams.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def here(*args: str) -> Done:
    """The same in this process, which spares the second that Python and the clients take to load."""
    result = CliRunner().invoke(app, args)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


def flags(settings: Settings) -> list[str]:
    return ["--kafka", settings.kafka_address, "--topic-prefix", settings.topic_prefix]


def test_every_command_is_there_and_says_what_it_does() -> None:
    commands = get_group(app).commands
    assert set(commands) == COMMANDS
    for name in commands:
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0, result.output
        assert commands[name].help


@pytest.mark.parametrize("name", ["joiner", "trainer", "inference"])
def test_unusable_settings_are_one_line_and_exit_code_2(name: str, tmp_path: Path) -> None:
    done = cortex(name, "--data", str(tmp_path))
    assert done.returncode == 2
    assert "CORTEX_KAFKA and CORTEX_REDIS_URL not set" in done.stderr
    assert "cortex up" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_wrong_value_names_its_variable(tmp_path: Path) -> None:
    done = cortex("status", CORTEX_KAFKA="localhost", CORTEX_DATA=str(tmp_path))
    assert done.returncode == 2
    assert "CORTEX_KAFKA" in done.stderr
    assert "'localhost'" in done.stderr
    assert "Traceback" not in done.stderr
    done = cortex("trainer", "--kafka", "localhost:1", "--redis", "localhost:2")
    assert done.returncode == 2
    assert "CORTEX_REDIS_URL" in done.stderr


def test_a_broker_that_does_not_answer_is_exit_code_1_and_named() -> None:
    done = cortex("topics", "show", "--kafka", "127.0.0.1:1")
    assert done.returncode == 1
    assert "Kafka at 127.0.0.1:1 does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    url = "redis://user:hidden-secret@127.0.0.1:1/0"
    done = cortex("status", "--kafka", "127.0.0.1:1", "--data", str(tmp_path), CORTEX_REDIS_URL=url)
    assert done.returncode == 1
    assert "127.0.0.1:1/0" in done.stdout
    assert "hidden-secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("url", ["redis://:hidden-secret@h/0", "redis://h/0?password=hidden-secret"])
def test_a_password_among_the_arguments_is_refused(url: str) -> None:
    done = here("status", "--kafka", "127.0.0.1:1", "--redis", url)
    assert done.returncode == 2
    assert "set CORTEX_REDIS_URL" in done.stderr
    assert "hidden-secret" not in done.stdout + done.stderr


def test_topics_are_created_once_and_shown(settings: Settings) -> None:
    first = here("topics", "create", *flags(settings))
    assert first.returncode == 0, first.stderr
    assert len(first.stdout.splitlines()) == 7
    assert f"created {settings.topic_prefix}.interactions" in first.stdout
    assert here("topics", "create", *flags(settings)).stdout == "all topics exist\n"
    shown = json.loads(here("topics", "show", "--json", *flags(settings)).stdout)
    assert all(row["exists"] and not row["differs"] for row in shown)
    assert "as expected" in here("topics", "show", *flags(settings)).stdout


def test_a_list_of_models_is_read_from_the_environment_and_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().models == ()
    monkeypatch.setenv("CORTEX_MODELS", " support, sales,")
    assert Settings.load().models == ("support", "sales")
    assert Settings.load().environment()["CORTEX_MODELS"] == "support,sales"


def test_topics_that_are_missing_are_said(settings: Settings) -> None:
    assert "does not exist" in here("topics", "show", *flags(settings)).stdout


def test_rebuild_says_what_it_read(settings: Settings) -> None:
    both = [*flags(settings), "--redis", settings.redis_address]
    done = here("rebuild", "--from", "beginning", *both)
    assert done.returncode == 0, done.stderr
    assert "read 0 interactions and 0 replies" in done.stdout
    unknown = here("rebuild", "--from", "beginning", "--model", "support", *both)
    assert unknown.returncode == 1
    assert "the topics have no interaction of 'support'" in unknown.stderr
    assert here("rebuild", "--from", "2026-01-01T00:00:00Z", *both).returncode == 0
    wrong = here("rebuild", "--from", "yesterday", *both)
    assert wrong.returncode == 2
    assert "--from is 'yesterday'" in wrong.stderr


def test_a_dead_letter_is_listed_and_sent_in_again(settings: Settings) -> None:
    worker = spawn_worker("joiner", settings).wait_ready()
    topic = Topics.of(settings).replies

    async def send() -> None:
        async with AIOKafkaProducer(bootstrap_servers=settings.kafka_address) as producer:
            await producer.send_and_wait(topic, b"no json", key=b"c", partition=0)

    asyncio.run(send())

    def letters() -> list[dict[str, object]]:
        listed: list[dict[str, object]] = json.loads(
            here("dead-letters", "list", "--json", *flags(settings)).stdout
        )
        return listed

    [letter] = wait_for(letters, "the dead letter")
    assert letter["topic"] == topic
    assert letter["offset"] == 0
    assert worker.alive
    letter_id = str(letter["dead_letter_id"])
    assert letter["reason"]
    shown = here("dead-letters", "list", *flags(settings)).stdout
    assert letter_id in shown.split()  # whole, also where the terminal is narrow
    assert str(letter["reason"]) in shown

    done = here("dead-letters", "retry", letter_id, *flags(settings))
    assert (done.returncode, done.stdout) == (0, "resent 1\n"), done.stderr
    wait_for(lambda: len(letters()) == 2, "the same as another letter")  # it can be read no better now
    unknown = here("dead-letters", "retry", "nobody", *flags(settings))
    assert unknown.returncode == 1
    assert "nobody: unknown dead letter" in unknown.stderr
    assert here("dead-letters", "retry", *flags(settings)).returncode == 2
    assert here("dead-letters", "retry", "x", "--all", *flags(settings)).returncode == 2


def test_control_is_sent_and_a_version_that_is_not_kept_refused(settings: Settings) -> None:
    done = here("control", "pause", "support", "--reason", "odd replies", *flags(settings))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "requested pause of support\n"
    refused = here("control", "pin", "support", "--version", "7", *flags(settings))
    assert refused.returncode == 1
    assert "version 7 is not kept" in refused.stderr


async def test_status_reports_lag_and_replay_and_what_does_not_answer(settings: Settings) -> None:
    await create_topics(settings)
    async with AIOKafkaProducer(bootstrap_servers=settings.kafka_address) as producer:
        for _ in range(3):
            await producer.send_and_wait(Topics.of(settings).replies, b"{}", key=b"c")
    report = await status.collect(settings)
    by_topic = {row["topic"]: row for row in report["groups"]}
    topics = Topics.of(settings)
    assert set(by_topic) == {topics.interactions, topics.replies, topics.experiences}
    assert by_topic[topics.replies] == {
        "group": settings.joiner_group,
        "members": 0,
        "topic": topics.replies,
        "events": 3,
        "lag": 3,
        "behind_s": by_topic[topics.replies]["behind_s"],
    }
    assert by_topic[topics.interactions]["lag"] == 0
    assert by_topic[topics.replies]["behind_s"] >= 0.0
    assert by_topic[topics.interactions]["behind_s"] is None
    assert report["errors"] == {}
    assert report["workers"] == report["replay"] == report["weights"] == report["waiting"] == []
    assert report["problems"] == [f"no {kind} worker runs" for kind in ("inference", "joiner", "trainer")]

    away = await status.collect(
        Settings.load(**settings.model_dump() | {"redis_url": "redis://127.0.0.1:1/0"})
    )
    assert set(away["errors"]) == {"workers", "waiting", "replay"}  # one part that is away hides no other
    assert {g["topic"]: g["lag"] for g in away["groups"]} == {g["topic"]: g["lag"] for g in report["groups"]}


def reported(settings: Settings) -> tuple[int, dict[str, Any]]:
    """The exit code and the report of `cortex status`."""
    done = here("status", "--json", *flags(settings), "--redis", settings.redis_address)
    return done.returncode, json.loads(done.stdout)


def test_status_sees_workers_wherever_they_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_JOINER_GROUP", settings.joiner_group)
    code, report = reported(settings)
    assert (code, report["workers"]) == (1, [])

    started = {kind: spawn_worker(kind, settings) for kind in ("joiner", "trainer", "inference")}
    for worker in started.values():
        worker.wait_ready()
    decision = {"conversation_id": "c", "message": "hello", "interaction_id": "asked"}
    httpx.post(f"{started['inference'].url}/v1/decide", json=decision, timeout=30).raise_for_status()

    def answered(code_: int, ok: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        def probe() -> dict[str, Any]:
            code, report = reported(settings)
            return report if code == code_ and ok(report) else {}

        return wait_for(probe, f"a report with exit code {code_}", every_s=0.2)

    report = answered(0, lambda r: r["waiting"] and any(w["version"] == 0 for w in r["weights"]))
    by_kind = {w["kind"]: w for w in report["workers"]}
    assert by_kind.keys() == started.keys()
    topics = Topics.of(settings)
    for kind, worker in started.items():
        row = by_kind[kind]
        assert row["name"] == f"{kind}@{socket.gethostname()}:{worker.port}"
        assert (row["pid"], row["url"], row["state"]) == (worker.pid, worker.url, "ready")
        assert row["release"] == version("cortex-streams")
    assert set(by_kind["joiner"]["partitions"]) == {
        f"{topic}-{n}" for topic in (topics.interactions, topics.replies) for n in range(2)
    }
    assert set(by_kind["trainer"]["partitions"]) == {f"{topics.experiences}-{n}" for n in range(2)}
    assert report["waiting"][0]["oldest_interaction"] == "asked"

    # What is learned and what operators ask for is seen in trainers and inference workers alike.
    reply = {"conversation_id": "c", "interaction_id": "asked", "text": "Thanks, that worked!"}
    httpx.post(f"{started['inference'].url}/v1/replies", json=reply, timeout=30).raise_for_status()

    def learned(report: dict[str, Any]) -> bool:
        return {(w["kind"], w["version"]) for w in report["weights"]} == {("trainer", 1), ("inference", 1)}

    answered(0, learned)
    here("control", "pin", "default", "--version", "1", *flags(settings))
    answered(0, lambda r: [w["pinned"] for w in r["weights"]] == [1, 1])
    shown = here("status", *flags(settings), "--redis", settings.redis_address).stdout
    assert "pinned to 1" in shown
    assert "Consumer groups" in shown

    assert started["trainer"].stop() == 0
    stopped = answered(1, lambda r: len(r["workers"]) == 2)
    assert stopped["problems"] == ["no trainer worker runs"]
    started["joiner"].kill()
    with Redis.from_url(settings.redis_address) as client:  # a minute later
        client.expire(f"{settings.topic_prefix}:worker:{by_kind['joiner']['name']}", FORGOTTEN_S - 60)
    lost = answered(1, lambda r: any(w["state"] == "missing" for w in r["workers"]))
    name = by_kind["joiner"]["name"]
    assert any(p.startswith(f"{name} is missing: its last heartbeat is") for p in lost["problems"])


def write_logs(folder: Path) -> Path:
    logs = folder / "logs"
    logs.mkdir()
    for name in ("kafka", "inference-1", "inference-2"):
        (logs / f"{name}.log").write_text("".join(f"{name} line {n}\n" for n in range(30)))
    return logs


def test_logs_of_one_of_all_and_of_none(tmp_path: Path) -> None:
    write_logs(tmp_path)
    one = here("logs", "kafka", "--lines", "2", "--data", str(tmp_path)).stdout
    assert one == "kafka line 28\nkafka line 29\n"
    several = here("logs", "inference", "-n", "1", "--data", str(tmp_path)).stdout
    assert several == "inference-1 | inference-1 line 29\ninference-2 | inference-2 line 29\n"
    assert len(here("logs", "--data", str(tmp_path)).stdout.splitlines()) == 3 * 20
    none = here("logs", "redis", "--data", str(tmp_path))
    assert none.returncode == 2
    assert "available: inference-1, inference-2, kafka" in none.stderr


def test_logs_follow_what_comes_also_through_a_rotation(tmp_path: Path) -> None:
    log = write_logs(tmp_path) / "kafka.log"
    command = [sys.executable, "-m", "streams.cli", "logs", "kafka", "-f", "-n", "0", "--data", str(tmp_path)]
    out = tmp_path / "out"
    with out.open("w") as file, subprocess.Popen(command, stdout=file) as process:
        with log.open("a") as writer:
            # Whatever is written before it looks is not what comes: write until the first is seen.
            def seen() -> bool:
                writer.write("hello\n")
                writer.flush()
                return "hello" in out.read_text()

            wait_for(seen, "the first line", every_s=0.1)
            writer.write("half ")
            writer.flush()
            writer.write("a line\n")
        wait_for(lambda: "half a line\n" in out.read_text(), "the whole line")
        log.write_text("after rotation\n")
        wait_for(lambda: "after rotation" in out.read_text(), "the line after the rotation")
        process.terminate()


def test_logs_end_without_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_logs(write_logs(tmp_path), "kafka", lines=1, follow=False)
    assert capsys.readouterr().out == "kafka line 29\n"


@pytest.mark.parametrize("name", ["joiner", "trainer", "inference"])
def test_a_port_that_is_taken_ends_a_worker_and_is_said(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = cortex(name, "--kafka", "127.0.0.1:1", "--redis", "redis://127.0.0.1:1", "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "CORTEX_PORT" in done.stderr
