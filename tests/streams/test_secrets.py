"""Secrets appear in no message, and only their owner can read the files that contain them."""

from __future__ import annotations

import os
import stat
import traceback
import uuid
from pathlib import Path

import pytest

from cortex_core.errors import ConfigError
from streams.local.embedded import new_cluster_id, write_atomically
from streams.local.stack import Stack
from streams.settings import Settings

SECRET = "s3cret"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cret@h:1/0",
        "redis://s3cret:s3cret@h/0",
        "redis://h/0?password=s3cret",
        "redis://h/0?username=u&password=s3cret#s3cret",
        "unix:///tmp/redis?password=s3cret",
    ],
)
def test_a_redis_url_is_shown_without_its_password(url: str) -> None:
    settings = Settings.load(kafka="h:1", redis_url=url)
    assert settings.redis_address == url
    for text in (settings.redis_shown, repr(settings), str(settings)):
        assert SECRET not in text
    assert settings.redis_shown.startswith(("redis://h", "unix:/"))


@pytest.mark.parametrize(
    "url",
    [
        "http://:s3cret@h/0",
        "redis://:s3cret/x@h/0",
        "redis://h:s3cret/0",
        "redis://[s3cret/0",
        "redis://h:99999999/0?password=s3cret",
        "s3cret",
    ],
)
def test_an_unusable_redis_url_is_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_REDIS_URL", url)
    with pytest.raises(ConfigError, match=r"CORTEX_REDIS_URL: .*expected redis://host:port/db") as caught:
        Settings.load()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_what_is_no_secret_is_repeated_in_errors() -> None:
    with pytest.raises(ConfigError, match=r"CORTEX_PARTITIONS.*'many'"):
        Settings.load(partitions="many")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("there_before", [True, False])
def test_the_data_folder_and_what_is_in_it_are_the_owners_alone(tmp_path: Path, there_before: bool) -> None:
    data = tmp_path / "data"
    if there_before:
        data.mkdir(mode=0o755)
        (data / "stack.json").write_text("{}")
        (data / "stack.new").write_text("half")
    before = os.umask(0o022)
    try:
        Stack(Settings.load(data=data))._take_lock()
        write_atomically(data / "other.json", "{}")
    finally:
        os.umask(before)
    assert mode(data) == 0o700
    assert mode(data / "stack.json") == mode(data / "other.json") == 0o600


def test_a_cluster_id_is_taken_for_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 64 random ones begins with a dash."""
    drawn = [uuid.UUID(bytes=b"\xf8" + bytes(15)), uuid.UUID(bytes=b"\xfb" * 16), uuid.UUID(bytes=bytes(16))]
    monkeypatch.setattr(uuid, "uuid4", lambda: drawn.pop(0))
    assert new_cluster_id() == "A" * 22
    assert not drawn
