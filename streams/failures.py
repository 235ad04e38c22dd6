"""Which errors of Redis's and Kafka's clients are transient, and which say that a setting is wrong.

An error is one of three things, and only this module decides which:

* transient: the server is unreachable, starting, failing over, full or busy. Trying again later is right.
* configuration: a password, a permission, a certificate, a version. Starting again would change nothing.
* neither: one event or one key causes it, or a bug.

Pure: nothing here connects. `streams.connections` retries, and asks Kafka where its client hides the reason.
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

Kinds = tuple[type[Exception], ...]

TRANSIENT_REDIS: Kinds = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis_errors.BusyLoadingError,
    redis_errors.ClusterDownError,  # MASTERDOWN is one
    redis_errors.NoScriptError,  # it was restarted between the loading of a script and its call
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.TryAgainError,
)
TRANSIENT_REDIS_ANSWER = re.compile(
    # At its start, or inside: Redis 6 answers "ERR Error running script … @user_script: 3: -READONLY …".
    r"(?:^|caused error: \W*|@user_script: ?\d+: -)"
    r"(?:BUSY|CLUSTERDOWN|LOADING|MASTERDOWN|MISCONF|NOREPLICAS|OOM|READONLY|TRYAGAIN) "
)
"""What redis-py has no class for, or has one that a script hides."""

CONFIGURATION_REDIS: tuple[tuple[Kinds, str, str], ...] = (
    (
        (redis_errors.NoPermissionError, redis_errors.AuthorizationError),
        "user executing the script can't",
        "its user lacks a permission; grant it",
    ),
    (
        (redis_errors.AuthenticationError, redis_errors.AuthenticationWrongNumberOfArgsError),
        "",
        "the server refused the password, or its absence; write it as redis://user:password@host:port/db",
    ),
    ((redis_errors.MovedError,), "", "a node of a Redis cluster; wanted a server of its own"),
    (
        (),
        "DB index is out of range|invalid DB index|SELECT is not allowed",
        "the server has no such database",
    ),
)
"""Classes, else an answer's text (a pattern), and what to do."""

TRANSIENT_KAFKA: Kinds = (
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
"""Beside those that aiokafka marks as retriable."""

CONFIGURATION_KAFKA: tuple[tuple[Kinds, str], ...] = (
    (
        (kafka.SaslAuthenticationFailed, kafka.AuthenticationFailedError),
        "CORTEX_KAFKA_SASL_USERNAME and CORTEX_KAFKA_SASL_PASSWORD: refused",
    ),
    (
        (kafka.UnsupportedSaslMechanismError, kafka.AuthenticationMethodNotSupported),
        "CORTEX_KAFKA_SASL_MECHANISM: not enabled there",
    ),
    (
        (kafka.IllegalSaslStateError, kafka.SecurityDisabled),
        "CORTEX_KAFKA_SECURITY_PROTOCOL: not what that listener speaks",
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
    ((kafka.InvalidReplicationFactorError,), "CORTEX_REPLICATION_FACTOR: more than there are brokers"),
    (
        (kafka.InconsistentGroupProtocolError, kafka.InvalidGroupIdError),
        "CORTEX_JOINER_GROUP or CORTEX_TRAINER_GROUP: another program uses that group; take another name",
    ),
    (
        (kafka.IncompatibleBrokerVersion, kafka.UnrecognizedBrokerVersion, kafka.UnsupportedVersionError),
        "CORTEX_KAFKA: that broker is too old",
    ),
)


def is_redis(error: BaseException) -> bool:
    """Whether it is Redis's and not Kafka's; redis-py wraps all that it raises."""
    return isinstance(error, RedisError)


def is_transient(error: BaseException) -> bool:
    """Whether trying again later may succeed, with nothing changed here.

    True for servers that cannot be reached or do not answer in time, Kafka's retriable errors, and Redis's
    LOADING, READONLY, MASTERDOWN, CLUSTERDOWN, TRYAGAIN, BUSY, OOM, MISCONF and NOREPLICAS. False for errors
    of configuration, for what one event or key causes (WRONGTYPE, a script's error, a record too large) and
    for all that is no client's error.
    """
    if _configuration_problem(error):
        return False
    if isinstance(error, RedisError):
        return isinstance(error, TRANSIENT_REDIS) or bool(TRANSIENT_REDIS_ANSWER.search(str(error)))
    if isinstance(error, KafkaError):
        # aiokafka wraps in a bare KafkaError what it did not expect of a broker.
        return type(error) is KafkaError or error.retriable or isinstance(error, TRANSIENT_KAFKA)
    # A missing file is an OSError too, but no server.
    is_file = isinstance(error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError)
    return isinstance(error, OSError) and not is_file


def is_systemic(error: BaseException) -> bool:
    """Whether other events would fail alike: it is transient or one of configuration."""
    return is_transient(error) or _configuration_problem(error) is not None


def configuration_error(error: BaseException, settings: Settings) -> ConfigError | None:
    """The `ConfigError` that names the setting, where the error is one of configuration."""
    if isinstance(error, ConfigError):
        return error
    problem = _configuration_problem(error)
    if problem is None:
        return None
    if is_redis(error):
        return ConfigError(f"CORTEX_REDIS_URL {settings.redis_shown}: {problem} ({answered(error)})")
    return ConfigError(f"{problem} (Kafka at {settings.kafka_address}: {answered(error)})")


def unavailable(error: BaseException, settings: Settings) -> UnavailableError:
    """A transient error as an `UnavailableError` that says who answered what."""
    if isinstance(error, UnavailableError):
        return error
    spoke = isinstance(error, redis.ResponseError | redis_errors.BusyLoadingError | kafka.BrokerResponseError)
    server = f"Redis at {settings.redis_shown}" if is_redis(error) else f"Kafka at {settings.kafka_address}"
    return UnavailableError(
        f"{server} {'cannot serve now' if spoke else 'does not answer'} ({answered(error)})"
    )


def answered(error: BaseException) -> str:
    """An error as messages show it: its class and what the server answered."""
    code = getattr(error, "status_code", None)  # redis-py takes it off the text
    text = f"{code} {error}" if code and code not in str(error) else str(error)
    name = type(error).__name__
    return text if text.startswith(name) else f"{name}: {text}"  # aiokafka's begin with their class


def _configuration_problem(error: BaseException) -> str | None:
    # redis-py raises a ConnectionError of its own while it handles the one of ssl.
    chain = (error, error.__cause__, error.__context__)
    bad_certificate = any(isinstance(each, ssl.SSLCertVerificationError) for each in chain)
    if isinstance(error, RedisError):
        if bad_certificate:
            return "the server's certificate is not trusted"
        for kinds, pattern, problem in CONFIGURATION_REDIS:
            if isinstance(error, kinds) or (pattern and re.search(pattern, str(error))):
                return problem
        return None
    if bad_certificate:
        return "CORTEX_KAFKA_SSL_CAFILE: the broker's certificate is not trusted"
    return next((problem for kinds, problem in CONFIGURATION_KAFKA if isinstance(error, kinds)), None)
