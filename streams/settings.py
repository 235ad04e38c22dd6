"""Settings of all workers: `CORTEX_*` environment variables, a `.env` file, files of secrets, or flags.

Validated at start, then immutable; secrets are masked in `repr`. Only tests and the embedded
servers read other variables.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from cortex_core.errors import ConfigError, InputError
from streams.api_keys import ApiKey, parse_keys
from streams.ports import WORKER_PORTS

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def default_data_dir() -> Path:
    """Default folder for the data and logs of embedded servers."""
    return Path.home() / ".local" / "share" / "cortex"


def default_cache_dir() -> Path:
    """Default folder for the jars of the embedded Kafka, shared by all data folders."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cortex"


SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://\S+:\d+")
"""The value that Kubernetes gives NAME_PORT in each pod beside a Service of this name: CORTEX_PORT beside
`cortex`."""


class _Environment(EnvSettingsSource):
    """Environment variables without Kubernetes' service links, the values of which are no setting's."""

    def __call__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in super().__call__().items()
            if not (isinstance(value, str) and SERVICE_LINK.fullmatch(value))
        }


class Settings(BaseSettings):
    """All settings; created by `Settings.load()`."""

    model_config = SettingsConfigDict(
        env_prefix="CORTEX_", env_file=".env", extra="ignore", frozen=True, allow_inf_nan=False
    )

    # Addresses and folders
    kafka: str | None = None
    """Bootstrap servers, host:port[,host:port…]. None: those of the stack that runs on `data`."""
    redis_url: SecretStr | None = None
    """redis://[user:password@]host:port/db or rediss://…. None: that of the stack that runs on `data`."""
    data: Path = Field(default_factory=default_data_dir)
    """Folder of the embedded servers, their logs and `stack.json`."""
    cache: Path = Field(default_factory=default_cache_dir)
    """Folder for downloads: the jars of the embedded Kafka."""

    # Kafka security, passed to the clients
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
    """Partitions of each of the topics interactions, replies, experiences, weights and payloads. The workers
    use the number that an existing topic has."""
    replication_factor: Count = 1
    """Copies of each topic that is created, on as many brokers."""
    min_insync_replicas: Count = Field(
        default_factory=lambda known: 2 if known["replication_factor"] >= 3 else 1
    )
    """Copies that have an event before it is acknowledged. Default: 2 with three copies or more, so that one
    broker may fail; else 1."""

    # HTTP
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """HTTP port: of the service in inference workers, of health and metrics in the others. Each kind of
    worker has its own default (`streams/ports.py`). 0: a free port."""
    max_body_bytes: Count = 4_000_000
    max_text_chars: Count = 32_000
    max_memories: Count = 1_000
    """Maximum number of memories, and of earlier messages, in a request."""
    publish_timeout_s: Positive = 5.0
    """Time that a request waits for Kafka's acknowledgement before it is answered with 503."""
    max_requests: Count = 256
    """Maximum number of requests in work per inference worker; others are answered with 503 and Retry-After.
    The bodies in work have at most 16 * max_body_bytes."""
    rate_limit: Positive | None = None
    """Requests per second of one API key, or of one client address without keys, per inference worker; others
    are answered with 429 and Retry-After. None: no limit."""
    max_connections: Count = 500
    """Maximum number of open connections per worker; beyond, the one that is idle the longest is closed."""
    request_timeout_s: Positive = 30.0
    """Time in which a request must arrive completely, head and body."""

    # Access to the inference service; see SECURITY.md
    api_keys: SecretStr | None = None
    """Keys that the service accepts, as hashes: NAME:SCOPES[@MODELS]:SHA256[,…] (streams/api_keys.py).
    Required unless `host` is a loopback address."""
    api_key: SecretStr | None = None
    """Key that CortexClient, `cortex status` and `cortex demo` send."""
    insecure: bool = False
    """Whether the service may listen on any address without keys."""
    allowed_hosts: str = ""
    """Host names by which clients reach a worker, with commas, `*.example.com` for all below. Always allowed:
    IP addresses, localhost, and `host`."""

    # The model
    models: Annotated[tuple[str, ...], NoDecode] = ()
    """Ids of the models that may be used, separated by commas; empty: any. Inference workers refuse requests
    of others, and joiners publish their events as dead letters."""
    encoder: str = "minilm"
    """Text encoder: minilm, hashing, or a path or hub name of a SentenceTransformer.

    minilm is made for English; paraphrase-multilingual-MiniLM-L12-v2 has as many dimensions. Of a text longer
    than eight times what an encoder reads at once (minilm: about 8,000 letters) the middle is not read, and
    `cortex_text_shortened_total` counts it. A model that has learned from the embeddings of one encoder is
    not served by workers with another."""
    text_dim: Count = 384
    text_cache: Count = 10_000
    """Number of cached text embeddings per inference worker; about 2 KB each."""
    models_in_memory: Count = 100
    """Models in the memory of each inference worker, about 10 MB each; others are loaded on demand."""
    strategies: Literal["generic", "developer", "support"] = "generic"
    """Strategy set: generic, developer or support; the same for all workers. May change while models live:
    strategies in both sets keep what they learned, new ones start untrained, others are no longer chosen."""
    top_k: Count = 3
    """Default number of memories to retrieve."""
    logged_negatives: Annotated[int, Field(ge=0)] = 5
    """Number of memories not retrieved that are logged with each interaction, as negatives for training."""
    store_text: bool = False
    """Whether interactions, experiences and replay contain raw text."""

    # Joining
    join_window_s: Positive = 1800.0
    reward_aggregation: Literal["first", "last", "mean", "min", "max", "sum"] = "last"
    extractor: str | None = None
    """Name of the feedback extractor; None: the default one."""
    joiner_group: str = Field(default_factory=lambda known: f"{known['topic_prefix']}-joiner")
    """Consumer group. The default has the prefix, so that deployments on one Kafka use different groups."""
    join_batch: Count = 500
    """Maximum number of events per batch."""

    # Learning
    lr: Positive = 1e-4
    update_every: Count = 5
    batch_size: Count = 16
    replay_capacity: Count = 10_000
    publish_interval_s: Positive = 0.5
    trainer_group: str = Field(default_factory=lambda known: f"{known['topic_prefix']}-trainer")
    """Consumer group; default: <topic_prefix>-trainer."""
    weights_kept: Count = 4
    """Number of versions per model that the weights topic keeps, for rollback."""

    # Running
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_s: Annotated[float, Field(ge=0)] = 0.0
    """Time after SIGTERM in which an inference worker still serves while `/readyz` answers 503, so that load
    balancers stop sending requests before connections are refused."""
    shutdown_timeout_s: Positive = 8.0
    """Time after SIGTERM, plus `drain_s`, at which a worker that still runs ends itself with exit code 1."""
    session_timeout_s: Annotated[float, Field(ge=1)] = 6.0
    """Consumer session timeout, after which the partitions of a dead worker are reassigned. The minimum of a
    broker (`group.min.session.timeout.ms`) is 6 s by default."""
    torch_threads: Count = 1
    """Threads of torch and of BLAS per worker process."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls), dotenv_settings, file_secret_settings

    @field_validator("models", mode="before")
    @classmethod
    def _model_ids(cls, value: object) -> object:
        return (
            [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value
        )

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value.get_secret_value())
            usable = parts.scheme in ("redis", "rediss", "unix") and (parts.port is None or parts.port > 0)
        except ValueError:  # its message quotes a part of the URL, which may be a part of the password
            usable = False
        if not usable:
            raise ValueError(
                "expected redis://host:port/db, rediss://host:port/db or unix:///path, with / and @ of a "
                "password percent-encoded"
            )
        return value

    @field_validator("api_keys", "api_key", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        # As in an `.env` or a manifest that leaves it open.
        return value if not isinstance(value, str) or value.strip() else None

    @field_validator("api_keys")
    @classmethod
    def _api_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_keys(value.get_secret_value())
        return value

    @field_validator("api_key")
    @classmethod
    def _api_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[!-~]+", value.get_secret_value()):
            raise ValueError("expected a key as `cortex keys create` makes it, without spaces")
        return value

    @field_validator("kafka")
    @classmethod
    def _kafka_host_port(cls, value: str | None) -> str | None:
        for address in (value or "").split(",") if value else []:
            host, _, port = address.strip().rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(f"expected host:port[,host:port…], got {address!r}")
        return value

    @field_validator("min_insync_replicas")
    @classmethod
    def _writable(cls, value: int, info: ValidationInfo) -> int:
        copies = info.data.get("replication_factor", value)
        if value > copies:
            raise ValueError(f"expected at most CORTEX_REPLICATION_FACTOR, which is {copies}")
        return value

    @classmethod
    def load(cls, **flags: Any) -> Settings:
        """Settings from flags that are not None, the environment, `.env` and defaults, in that order.

        `CORTEX_SECRETS_DIR` names a folder with further variables as files, as Kubernetes and Docker mount
        secrets: the file CORTEX_API_KEYS has the value of that variable.

        Raises:
            ConfigError: an invalid value; the message names the variable, the value and what was expected.
        """
        secrets = os.environ.get("CORTEX_SECRETS_DIR") or None
        if secrets and not Path(secrets).is_dir():
            raise ConfigError(f"CORTEX_SECRETS_DIR is {secrets!r}, expected a folder")
        try:
            return cls(_secrets_dir=secrets, **{k: v for k, v in flags.items() if v is not None})
        except ValidationError as error:
            lines = [
                f"CORTEX_{'_'.join(str(x) for x in e['loc']).upper()}: {e['msg']} (got {_got(e)})"
                for e in error.errors(include_url=False)
                if e["type"] != "default_factory_not_called"  # follows from the error of another setting
            ]
            # Without its cause, which shows what came.
            raise ConfigError("invalid settings: " + "; ".join(lines)) from None

    def of_worker(self, name: str) -> Settings:
        """These settings with the worker's default port, if no port is set."""
        if "port" in self.model_fields_set:
            return self
        return self.model_copy(update={"port": WORKER_PORTS[name]})

    def check_model(self, model_id: str) -> None:
        """Raises `InputError` for a model that may not be used."""
        if self.models and model_id not in self.models:
            raise InputError(
                f"model {model_id!r} may not be used here; CORTEX_MODELS has {', '.join(self.models)}: use "
                "one of these, or add it to CORTEX_MODELS of inference workers and joiners"
            )

    @property
    def local_host(self) -> str:
        """Host at which processes on this machine reach a server that listens on `host`."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::", "localhost") else self.host

    def environment(self) -> dict[str, str]:
        """These settings as `CORTEX_*` variables, including secrets, for a worker process."""
        values: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            if isinstance(value, tuple):
                value = ",".join(value)
            values[f"CORTEX_{name.upper()}"] = str(int(value) if isinstance(value, bool) else value)
        return values

    @property
    def stack_file(self) -> Path:
        """JSON file with the addresses and process ids of a running stack."""
        return self.data / "stack.json"

    def running_stack(self) -> dict[str, Any]:
        """`stack.json` of the stack that runs on `data`; empty if none runs."""
        try:
            stack: dict[str, Any] = json.loads(self.stack_file.read_text())
            os.kill(int(stack["pid"]), 0)
        except PermissionError:  # it runs as another user
            return stack
        except (OSError, ValueError, KeyError):  # no file, an incomplete file, or a stack that was killed
            return {}
        return stack

    def resolved(self) -> Settings:
        """These settings with both addresses: the configured ones, else those of a running stack.

        Raises:
            ConfigError: an address is not configured and no stack runs.
        """
        stack = self.running_stack() if self.kafka is None or self.redis_url is None else {}
        kafka = self.kafka or stack.get("kafka")
        redis_url = self.redis_url.get_secret_value() if self.redis_url else stack.get("redis_url")
        missing = [n for n, v in (("CORTEX_KAFKA", kafka), ("CORTEX_REDIS_URL", redis_url)) if not v]
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} not set and no stack runs on {self.data}: set "
                f"{'them' if len(missing) > 1 else 'it'}, or start `cortex up`"
            )
        return self.model_copy(update={"kafka": kafka, "redis_url": SecretStr(str(redis_url))})

    @property
    def kafka_address(self) -> str:
        """Bootstrap servers; valid after `resolved()`."""
        if self.kafka is None:
            raise ConfigError("CORTEX_KAFKA is not set")
        return self.kafka

    @property
    def redis_address(self) -> str:
        """The Redis URL with its password; valid after `resolved()`. Do not log it: use `redis_shown`."""
        if self.redis_url is None:
            raise ConfigError("CORTEX_REDIS_URL is not set")
        return self.redis_url.get_secret_value()

    @property
    def access_keys(self) -> tuple[ApiKey, ...]:
        """The keys that the inference service accepts; empty: it asks for none."""
        return parse_keys(self.api_keys.get_secret_value()) if self.api_keys else ()

    @property
    def authorization(self) -> dict[str, str]:
        """The header that carries `api_key`, for requests to the inference service. Do not log it."""
        return {"Authorization": f"Bearer {self.api_key.get_secret_value()}"} if self.api_key else {}

    @property
    def redis_shown(self) -> str:
        """The Redis URL without user, password and options, which may hold them too; for messages."""
        parts = urlsplit(self.redis_address)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _got(error: Any) -> str:
    """The value that an error of validation is about, for a message."""
    field = Settings.model_fields.get(str(error["loc"][0])) if error["loc"] else None
    secret = field is not None and SecretStr in (field.annotation, *get_args(field.annotation))
    return "a value that is not shown" if secret else repr(error.get("input"))
