"""A Kafka whose only listener requires SASL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from aiokafka.admin import AIOKafkaAdminClient

from streams.connections import kafka_client_options
from streams.kafka.clients import started
from streams.local.embedded import EmbeddedKafka
from streams.settings import Settings, default_cache_dir

USER = "cortex"
PROPERTIES = """
listeners=SASL_PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=SASL_PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
security.inter.broker.protocol=SASL_PLAINTEXT
sasl.mechanism.inter.broker.protocol=PLAIN
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_plaintext.plain.sasl.jaas.config=\
org.apache.kafka.common.security.plain.PlainLoginModule required \
username="broker" password="{password}" user_broker="{password}" user_{user}="{password}";
"""


class SaslKafka(EmbeddedKafka):
    """An embedded Kafka with SASL/PLAIN and one user; restart it to change the password."""

    def __init__(self, data: Path, password: str) -> None:
        super().__init__(data, default_cache_dir())
        self.password = password

    def properties(self, log_dir: Path, controller_port: int) -> str:
        sasl = PROPERTIES.format(
            port=self.port, controller_port=controller_port, user=USER, password=self.password
        )
        return super().properties(log_dir, controller_port) + sasl  # of a repeated key, the last value counts

    def settings(self, settings: Settings, **changes: str) -> Settings:
        """The settings with this Kafka and its user; `changes` are other values of `kafka_…` settings."""
        sasl = {"security_protocol": "SASL_PLAINTEXT", "sasl_username": USER, "sasl_password": self.password}
        values = {f"kafka_{name}": value for name, value in (sasl | changes).items()}
        validated = Settings.load(kafka=self.address, redis_url=settings.redis_address, **values)
        names = ("kafka", *(f"kafka_{name}" for name in sasl))
        return settings.model_copy(update={name: getattr(validated, name) for name in names})

    async def answers(self) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.close()
        own = self.settings(Settings.load(redis_url="redis://127.0.0.1/0"))
        async with started(AIOKafkaAdminClient(**kafka_client_options(own))) as admin:
            await admin.list_topics()


@contextlib.contextmanager
def sasl_kafka(folder: Path, password: str) -> Iterator[SaslKafka]:
    """A Kafka that no other test uses; stopped at the end."""
    server = SaslKafka(folder, password)
    asyncio.run(server.start())
    try:
        yield server
    finally:
        asyncio.run(server.stop())
