"""Every setting of every worker: environment `CORTEX_*`, a `.env` file, or a flag of the command line.

Validated once at start, frozen afterwards, secrets masked in `repr`. Nothing else in this package reads
the environment.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cortex_core.errors import ConfigError
from streams.ports import WORKER_PORTS

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def default_data_dir() -> Path:
    """Where embedded servers keep their data and logs when no `--data` is given."""
    return Path.home() / ".local" / "share" / "cortex"


def default_cache_dir() -> Path:
    """Where the embedded Kafka's jars are kept, for all data folders alike."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cortex"


class Settings(BaseSettings):
    """All settings. `Settings.load()` is how a worker gets them."""

    model_config = SettingsConfigDict(env_prefix="CORTEX_", env_file=".env", extra="ignore", frozen=True)

    # Where things are
    kafka: str | None = None
    """Bootstrap servers, host:port[,host:port…]. None: those of the stack that runs on `data`."""
    redis_url: SecretStr | None = None
    """redis://[user:password@]host:port/db or rediss://…. None: that of the stack that runs on `data`."""
    data: Path = Field(default_factory=default_data_dir)
    """Folder of the embedded servers, their logs and `stack.json`."""
    cache: Path = Field(default_factory=default_cache_dir)
    """Folder of what is fetched once: the embedded Kafka's jars."""

    # Kafka security, handed to the clients as it is
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    kafka_sasl_username: str | None = None
    kafka_sasl_password: SecretStr | None = None
    kafka_ssl_cafile: Path | None = None
    kafka_ssl_certfile: Path | None = None
    kafka_ssl_keyfile: Path | None = None

    # Topics
    topic_prefix: str = "cortex"
    """Topics are named <prefix>.interactions and so on."""
    partitions: Count = 8
    """Partitions of interactions, replies and experiences; all three alike."""
    replication_factor: Count = 1

    # HTTP
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port of the inference service; of health and metrics in the other workers, each of which has its own
    default (`streams/ports.py`). 0: a free one."""
    max_body_bytes: Count = 4_000_000
    max_text_chars: Count = 32_000
    max_memories: Count = 1_000
    """Most memories, and most earlier messages, in one request."""
    publish_timeout_s: Positive = 5.0
    """How long a request waits for Kafka's acknowledgement before it is answered 503."""

    # The model
    encoder: str = "minilm"
    """Text encoder: minilm, hashing, or a path or hub name of a SentenceTransformer."""
    text_dim: Count = 384
    text_cache: Count = 10_000
    """Texts whose embeddings an inference worker keeps; about 2 KB each."""
    models_in_memory: Count = 100
    """Models that an inference worker keeps ready, about 2 MB each; others are read from Kafka on demand."""
    strategies: Literal["generic", "developer", "support"] = "generic"
    """Strategy set: generic, developer or support."""
    top_k: Count = 3
    """Memories that enter the context, unless a request asks for another number."""
    passed_over: Annotated[int, Field(ge=0)] = 5
    """Memories not retrieved that are logged with an interaction, as the learner's contrast."""
    store_text: bool = False
    """Whether raw text is kept in interactions, experiences and replay."""

    # Joining
    join_window_s: Positive = 1800.0
    reward_aggregation: Literal["first", "last", "mean", "min", "max", "sum"] = "last"
    extractor: str | None = None
    """Name of the reader of replies; None: the default one."""
    joiner_group: str = Field(default_factory=lambda known: f"{known['topic_prefix']}-joiner")
    """Consumer group; <topic_prefix>-joiner, so that two deployments on one Kafka do not share one."""
    join_batch: Count = 500
    """Events per batch, at most."""

    # Learning
    lr: Positive = 1e-4
    update_every: Count = 5
    batch_size: Count = 16
    replay_capacity: Count = 10_000
    publish_interval_s: Positive = 0.5
    trainer_group: str = Field(default_factory=lambda known: f"{known['topic_prefix']}-trainer")
    """Consumer group; <topic_prefix>-trainer."""
    weights_kept: Count = 4
    """Versions per model that stay readable in the weights topic, for rollback."""

    # Running
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    shutdown_timeout_s: Positive = 8.0
    """After SIGTERM a worker that has not stopped by itself is ended hard."""
    session_timeout_s: Annotated[float, Field(ge=1)] = 6.0
    """Silence after which a dead trainer's partitions go to another. Brokers allow no less than 6 s unless
    their `group.min.session.timeout.ms` says so."""
    torch_threads: Count = 1
    """Threads of torch and of BLAS in each worker process."""

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and urlsplit(value.get_secret_value()).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("wanted redis://host:port/db, rediss://host:port/db or unix:///path")
        return value

    @field_validator("kafka")
    @classmethod
    def _kafka_host_port(cls, value: str | None) -> str | None:
        for address in (value or "").split(",") if value else []:
            host, _, port = address.strip().rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(f"wanted host:port[,host:port…], got {address!r}")
        return value

    @classmethod
    def load(cls, **flags: Any) -> Settings:
        """Settings from flags (those not None), the environment, `.env` and defaults, in that order.

        Raises:
            ConfigError: a value is unusable; the message names the variable, what came and what was wanted.
        """
        try:
            return cls(**{k: v for k, v in flags.items() if v is not None})
        except ValidationError as error:
            lines = [
                f"CORTEX_{'_'.join(str(x) for x in e['loc']).upper()}: {e['msg']} (got {e.get('input')!r})"
                for e in error.errors(include_url=False)
            ]
            raise ConfigError("unusable settings: " + "; ".join(lines)) from error

    def of_worker(self, name: str) -> Settings:
        """These settings with the worker's own port, where none is set."""
        if "port" in self.model_fields_set:
            return self
        return self.model_copy(update={"port": WORKER_PORTS[name]})

    @property
    def local_host(self) -> str:
        """Where a process on this machine reaches what listens on `host`."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::", "localhost") else self.host

    def environment(self) -> dict[str, str]:
        """These settings as `CORTEX_*` variables, secrets included: what a worker process is started with."""
        values: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            values[f"CORTEX_{name.upper()}"] = str(int(value) if isinstance(value, bool) else value)
        return values

    @property
    def stack_file(self) -> Path:
        """What a running stack writes here: its addresses and process ids, as JSON."""
        return self.data / "stack.json"

    def running_stack(self) -> dict[str, Any]:
        """`stack.json` of the stack that runs on `data`; empty when none runs."""
        try:
            stack: dict[str, Any] = json.loads(self.stack_file.read_text())
            os.kill(int(stack["pid"]), 0)
        except PermissionError:  # it runs, as another user
            return stack
        except (OSError, ValueError, KeyError):  # no file; half a file; a stack that was killed
            return {}
        return stack

    def resolved(self) -> Settings:
        """These settings with both addresses filled in: configured ones, else those of a running stack.

        Raises:
            ConfigError: an address is neither configured nor known from a running stack.
        """
        stack = self.running_stack() if self.kafka is None or self.redis_url is None else {}
        kafka = self.kafka or stack.get("kafka")
        redis_url = self.redis_url.get_secret_value() if self.redis_url else stack.get("redis_url")
        missing = [n for n, v in (("CORTEX_KAFKA", kafka), ("CORTEX_REDIS_URL", redis_url)) if not v]
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} not set, and no stack runs on {self.data}: set "
                f"{'them' if len(missing) > 1 else 'it'}, or start `cortex up`"
            )
        return self.model_copy(update={"kafka": kafka, "redis_url": SecretStr(str(redis_url))})

    @property
    def kafka_address(self) -> str:
        """Bootstrap servers; after `resolved()`."""
        if self.kafka is None:
            raise ConfigError("CORTEX_KAFKA is not set")
        return self.kafka

    @property
    def redis_address(self) -> str:
        """The Redis URL with its password; after `resolved()`. Never log it: `redis_shown` is for that."""
        if self.redis_url is None:
            raise ConfigError("CORTEX_REDIS_URL is not set")
        return self.redis_url.get_secret_value()

    @property
    def redis_shown(self) -> str:
        """The Redis URL without user and password, for messages."""
        parts = urlsplit(self.redis_address)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
