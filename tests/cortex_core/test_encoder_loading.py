"""Loading an encoder that does not exist, or that the hub does not send: an error, at once."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cortex_core import text_encoder
from cortex_core.errors import ConfigError
from cortex_core.text_encoder import load_encoder


class Hub:
    """A server that gives this answer to each request, or none; it counts the connections."""

    def __init__(self, answer: bytes | None) -> None:
        self.asked = 0
        self._answer = answer
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._kept: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._server.accept()
                self.asked += 1
                self._kept.append(connection)
                if self._answer is not None:
                    connection.recv(10_000)
                    connection.sendall(self._answer)

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        for each in (self._server, *self._kept):
            each.close()


UNKNOWN = (
    b"HTTP/1.1 404 Not Found\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)


@pytest.fixture(params=[None, UNKNOWN], ids=["silent", "unknown"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(request.param)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr(text_encoder, "HUB_TIMEOUT_S", 0.2)
    yield hub
    hub.close()


def test_a_hub_name_that_cannot_be_loaded_is_an_error_after_one_request(hub: Hub) -> None:
    with pytest.raises(ConfigError, match=r"'nobody/no-such-encoder' cannot be loaded .*\[embedded\]"):
        load_encoder("nobody/no-such-encoder")
    assert hub.asked == 1


def test_a_name_without_owner_is_asked_for_as_sentence_transformers_would(hub: Hub) -> None:
    with pytest.raises(ConfigError, match="'no-such-encoder' cannot be loaded"):
        load_encoder("no-such-encoder")
    assert hub.asked == 2


def test_a_folder_that_does_not_exist_is_an_error_without_a_request(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_encoder(str(tmp_path / "nowhere"))
    assert hub.asked == 0
