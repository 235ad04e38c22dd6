"""API keys of the inference service: who may do what. The service knows the hashes of keys, not the keys.

Each entry of `CORTEX_API_KEYS` is NAME:SCOPES:SHA256, or NAME:SCOPES@MODELS:SHA256 for a key that is limited
to some models; entries are separated by commas, spaces or lines. `cortex keys create` makes a key and its
entry.

    >>> [key] = parse_keys("shop:decide+reply@orders+returns:" + 64 * "0")
    >>> key.name, sorted(key.scopes), sorted(key.models)
    ('shop', ['decide', 'reply'], ['orders', 'returns'])

A key has 256 random bits. Unlike a password it cannot be guessed from a fast hash, so that a slow one would
gain nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast, get_args

from cortex_core.errors import ConfigError

if TYPE_CHECKING:
    from streams.settings import Settings

Scope = Literal["decide", "reply", "operate"]
"""decide: POST /v1/decide. reply: POST /v1/replies. operate: all others, such as GET /v1/models."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"
_ENTRY = re.compile(
    rf"(?P<name>{_NAME}):(?P<scopes>[a-z+]+)(?:@(?P<models>{_NAME}(?:\+{_NAME})*))?:(?P<sha256>[0-9a-f]{{64}})"
)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What the holder of one key may do."""

    name: str
    scopes: frozenset[Scope]
    models: frozenset[str] = frozenset()
    """the models that it is limited to; empty: all"""
    sha256: str = field(default="", repr=False)
    """of the key, in hexadecimal"""

    @property
    def entry(self) -> str:
        """As in `CORTEX_API_KEYS`."""
        models = f"@{'+'.join(sorted(self.models))}" if self.models else ""
        return f"{self.name}:{'+'.join(s for s in SCOPES if s in self.scopes)}{models}:{self.sha256}"


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """The keys of `CORTEX_API_KEYS`.

    Raises:
        ValueError: an entry is invalid. The message has its number and not its text, which may be a key.
    """
    keys = []
    for number, entry in enumerate(re.split(r"[,\s]+", text.strip(" ,\t\r\n")), 1):
        found = _ENTRY.fullmatch(entry)
        scopes = set(found["scopes"].split("+")) if found else set()
        if found is None or not scopes <= set(SCOPES):
            raise ValueError(
                f"entry {number} is not NAME:SCOPES[@MODELS]:SHA256 with SCOPES among {'+'.join(SCOPES)} and "
                "the hash of the key as SHA256: make one with `cortex keys create NAME`"
            )
        models = frozenset((found["models"] or "").split("+")) - {""}
        keys.append(ApiKey(found["name"], frozenset(cast(set[Scope], scopes)), models, found["sha256"]))
    if len({key.name for key in keys}) < len(keys):
        raise ValueError("two entries have the same name, expected a name for each key")
    return tuple(keys)


def create_key(name: str, scopes: Iterable[str], models: Iterable[str] = ()) -> tuple[str, ApiKey]:
    """A new random key, and what the service stores of it.

    Raises:
        ConfigError: an unknown scope, or a name that cannot be written in an entry.
    """
    secret = f"cortex_{secrets.token_urlsafe(32)}"
    key = ApiKey(name, frozenset(cast(Iterable[Scope], scopes)), frozenset(models), _sha256(secret.encode()))
    text = f"{name}:{'+'.join(key.scopes)}{'@' + '+'.join(key.models) if key.models else ''}:{key.sha256}"
    try:
        [parsed] = parse_keys(text)
    except ValueError as error:
        raise ConfigError(
            f"no key for name {name!r}, scopes {sorted(key.scopes)} and models {sorted(key.models)}: "
            "expected names of letters, digits, dots, dashes and underscores, and scopes among "
            f"{', '.join(SCOPES)}"
        ) from error
    return secret, parsed


def find_key(keys: Iterable[ApiKey], presented: bytes) -> ApiKey | None:
    """The key that was presented, if it is one of these. Takes the same time for any presented key."""
    digest, found = _sha256(presented), None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def require_keys(settings: Settings) -> None:
    """Checks that an inference service with these settings is not open to a network.

    Raises:
        ConfigError: it would listen on another address than loopback, without keys.
    """
    if settings.api_keys is None and not settings.insecure and not is_loopback(settings.host):
        raise ConfigError(
            f"CORTEX_HOST is {settings.host}, which other machines can reach, and CORTEX_API_KEYS is not "
            "set: make a key with `cortex keys create agent`, or set CORTEX_INSECURE=1 if a proxy "
            "authenticates every request, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sha256(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()
