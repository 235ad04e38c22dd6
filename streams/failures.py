"""Classifies the errors of the Redis and Kafka clients. Only this module decides what an error means:

* transient: the server is unreachable, starting, failing over, full or busy; a later attempt can succeed.
* configuration: a wrong password, permission, certificate or version; a restart changes nothing.
* neither: caused by a single event or key, or by a bug.

Pure: opens no connection. `streams.connections` retries, and probes Kafka if its client hides the reason.
"""

from __future__ import annotations

import re
import ssl
from typing import TYPE_CHECKING

import redis
from aiokafka import errors as kafka
from aiokafka.errors import KafkaError
from redis import exceptions as redis_errors
from redis.exceptions import RedisError

from cortex_core.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from streams.settings import Settings

ErrorTypes = tuple[type[Exception], ...]

TRANSIENT_REDIS: ErrorTypes = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis_errors.BusyLoadingError,
    redis_errors.ClusterDownError,  # MASTERDOWN is one
    redis_errors.NoScriptError,  # the server restarted after a script was loaded
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.TryAgainError,
)
TRANSIENT_REDIS_REPLY = re.compile(
    # At the start, or within a script's error: "ERR Error running script … @user_script: 3: -READONLY …".
    r"(?:^|caused error: \W*|@user_script: ?\d+: -)"
    r"(?:BUSY|CLUSTERDOWN|LOADING|MASTERDOWN|MISCONF|NOREPLICAS|OOM|READONLY|TRYAGAIN) "
)
"""Error replies for which redis-py has no class, or whose class is lost in a script's error."""

CONFIGURATION_REDIS: tuple[tuple[ErrorTypes, str, str], ...] = (
    (
        (redis_errors.NoPermissionError, redis_errors.AuthorizationError),
        "user executing the script can't",
        "the user lacks a permission; grant it with ACL SETUSER",
    ),
    (
        (redis_errors.AuthenticationError, redis_errors.AuthenticationWrongNumberOfArgsError),
        "",
        "the server refused the password, or its absence; write it as redis://user:password@host:port/db",
    ),
    ((redis_errors.MovedError,), "", "the server is a node of a Redis cluster; use a standalone server"),
    (
        (),
        "DB index is out of range|invalid DB index|SELECT is not allowed",
        "the server has no such database",
    ),
)
"""(error classes, a pattern that an error reply's text matches, the message: what is wrong and what to do)"""

REFUSED_CERTIFICATE = re.compile(
    r"ALERT_(BAD_CERTIFICATE|CERTIFICATE_\w+|UNKNOWN_CA|UNSUPPORTED_CERTIFICATE)"
)
"""The alerts with which a server refuses a client's certificate, or its absence."""

TRANSIENT_KAFKA: ErrorTypes = (
    kafka.BrokerNotAvailableError,
    kafka.ConcurrentTransactions,
    kafka.CorruptRecordException,
    kafka.FetchSessionIdNotFound,
    kafka.IllegalGenerationError,
    kafka.InvalidFetchSessionEpoch,
    kafka.InvalidProducerIdMapping,
    kafka.KafkaTimeoutError,
    kafka.KafkaUnavailableError,
    kafka.OutOfOrderSequenceNumber,
    kafka.ReassignmentInProgress,
    kafka.RebalanceInProgressError,
    kafka.ReplicaNotAvailableError,
    kafka.StaleControllerEpochError,
    kafka.StaleLeaderEpochCodeError,
    kafka.UnknownError,
    kafka.UnknownMemberIdError,
    kafka.UnknownProducerId,
)
"""In addition to those that aiokafka marks as retriable."""

CONFIGURATION_KAFKA: tuple[tuple[ErrorTypes, str], ...] = (
    (
        (kafka.SaslAuthenticationFailed, kafka.AuthenticationFailedError),
        "CORTEX_KAFKA_SASL_USERNAME or CORTEX_KAFKA_SASL_PASSWORD: the broker refused them",
    ),
    (
        (kafka.UnsupportedSaslMechanismError, kafka.AuthenticationMethodNotSupported),
        "CORTEX_KAFKA_SASL_MECHANISM: the broker has not enabled it",
    ),
    (
        (kafka.IllegalSaslStateError, kafka.SecurityDisabled),
        "CORTEX_KAFKA_SECURITY_PROTOCOL: the broker's listener uses another one",
    ),
    (
        (
            kafka.ClusterAuthorizationFailedError,
            kafka.GroupAuthorizationFailedError,
            kafka.TopicAuthorizationFailedError,
            kafka.TransactionalIdAuthorizationFailed,
        ),
        "CORTEX_KAFKA_SASL_USERNAME: this user lacks a permission; grant it with kafka-acls",
    ),
    (
        (kafka.InvalidSessionTimeoutError,),
        "CORTEX_SESSION_TIMEOUT_S: outside the broker's group.min and group.max.session.timeout.ms",
    ),
    ((kafka.InvalidReplicationFactorError,), "CORTEX_REPLICATION_FACTOR: greater than the number of brokers"),
    (
        (kafka.InconsistentGroupProtocolError, kafka.InvalidGroupIdError),
        "CORTEX_JOINER_GROUP or CORTEX_TRAINER_GROUP: another program uses this group; choose another name",
    ),
    (
        (kafka.IncompatibleBrokerVersion, kafka.UnrecognizedBrokerVersion, kafka.UnsupportedVersionError),
        "CORTEX_KAFKA: the broker is too old",
    ),
)


def is_redis(error: BaseException) -> bool:
    """Whether the error is from Redis, not from Kafka; redis-py wraps all errors."""
    return isinstance(error, RedisError)


def is_transient(error: BaseException) -> bool:
    """Whether a later attempt can succeed without a change of this process.

    True for servers that are unreachable or do not answer in time, Kafka's retriable errors, and Redis's
    LOADING, READONLY, MASTERDOWN, CLUSTERDOWN, TRYAGAIN, BUSY, OOM, MISCONF and NOREPLICAS. False for
    configuration errors, for errors that a single event or key causes (WRONGTYPE, a script's error, a too
    large record) and for errors that no client raised.
    """
    if _configuration_problem(error):
        return False
    if isinstance(error, RedisError):
        return isinstance(error, TRANSIENT_REDIS) or bool(TRANSIENT_REDIS_REPLY.search(str(error)))
    if isinstance(error, KafkaError):
        # aiokafka raises a bare KafkaError for unexpected responses of a broker.
        return type(error) is KafkaError or error.retriable or isinstance(error, TRANSIENT_KAFKA)
    # OSError also covers files; these errors have nothing to do with a server.
    is_file = isinstance(error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError)
    return isinstance(error, OSError) and not is_file


def is_systemic(error: BaseException) -> bool:
    """Whether other events would fail too: the error is transient or a configuration error."""
    return is_transient(error) or _configuration_problem(error) is not None


def configuration_error(error: BaseException, settings: Settings) -> ConfigError | None:
    """A `ConfigError` that names the setting, if the error is a configuration error; else None."""
    if isinstance(error, ConfigError):
        return error
    problem = _configuration_problem(error)
    if problem is None:
        return None
    if is_redis(error):
        return ConfigError(f"CORTEX_REDIS_URL {settings.redis_shown}: {problem} ({error_text(error)})")
    return ConfigError(f"{problem} (Kafka at {settings.kafka_address}: {error_text(error)})")


def refused_command(error: BaseException, settings: Settings) -> ConfigError | None:
    """Any other error reply of a server as a `ConfigError`, for commands, which do one thing; else None."""
    if isinstance(error, redis.ResponseError):
        return ConfigError(
            f"Redis at {settings.redis_shown} refused a command ({error_text(error)}): check that no other "
            f"program uses the keys {settings.topic_prefix}:* of this database"
        )
    if isinstance(error, KafkaError):
        return ConfigError(f"Kafka at {settings.kafka_address} refused a request ({error_text(error)})")
    return None


def unavailable_error(error: BaseException, settings: Settings) -> UnavailableError:
    """A transient error as an `UnavailableError` that names the server and its answer."""
    if isinstance(error, UnavailableError):
        return error
    answers = (redis.ResponseError, redis_errors.BusyLoadingError, kafka.BrokerResponseError)
    server = f"Redis at {settings.redis_shown}" if is_redis(error) else f"Kafka at {settings.kafka_address}"
    return UnavailableError(
        f"{server} {'cannot serve now' if isinstance(error, answers) else 'does not answer'} "
        f"({error_text(error)})"
    )


def error_text(error: BaseException) -> str:
    """An error as messages show it: its class and the server's answer."""
    code = getattr(error, "status_code", None)  # redis-py removes it from the text
    text = f"{code} {error}" if code and code not in str(error) else str(error)
    name = type(error).__name__
    return text if text.startswith(name) else f"{name}: {text}"  # aiokafka's texts begin with the class


def _configuration_problem(error: BaseException) -> str | None:
    if certificate := _certificate_problem(error):
        return certificate
    if isinstance(error, RedisError):
        for types, pattern, problem in CONFIGURATION_REDIS:
            if isinstance(error, types) or (pattern and re.search(pattern, str(error))):
                return problem
        return None
    return next((problem for types, problem in CONFIGURATION_KAFKA if isinstance(error, types)), None)


def _certificate_problem(error: BaseException) -> str | None:
    # redis-py raises its own ConnectionError while it handles the error of ssl.
    chain = (error, error.__cause__, error.__context__)
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in chain):
        return (
            "the server's certificate is not trusted; append ?ssl_ca_certs=FILE with its CA"
            if is_redis(error)
            else "CORTEX_KAFKA_SSL_CAFILE: the broker's certificate is not trusted"
        )
    if any(
        isinstance(each, ssl.SSLError) and REFUSED_CERTIFICATE.search(each.reason or "") for each in chain
    ):
        return (
            "the server refused the certificate, or its absence; append ?ssl_certfile=FILE&ssl_keyfile=FILE"
            if is_redis(error)
            else "CORTEX_KAFKA_SSL_CERTFILE: the broker refused this certificate, or its absence"
        )
    return None
