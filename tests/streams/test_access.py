"""Who may use the inference service: API keys, and the names by which it is reached. Over real HTTP."""

from __future__ import annotations

import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs
from typer.testing import CliRunner

from cortex_core.errors import ConfigError
from streams.api_keys import ApiKey, create_key, find_key, is_loopback, parse_keys, require_keys
from streams.cli.app import app
from streams.client.client import CortexClient
from streams.demo.watch import WorkerWatch
from streams.settings import Settings
from streams.worker import Worker
from tests.streams.serving import body, exchange, listening

AGENT, agent = create_key("agent", ["decide", "reply"])
SHOP, shop = create_key("shop", ["decide", "operate"], ["shop.v1", "shop.v2"])
OPS, ops = create_key("ops", ["operate"])
KEYS = SecretStr(",".join(key.entry for key in (agent, shop, ops)))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- keys ---------------------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_a_key_opens_what_its_scopes_and_models_name(settings: Settings) -> None:
    reply = {"conversation_id": "c-1", "text": "thanks"}
    async with (
        listening(settings.model_copy(update={"api_keys": KEYS})) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):

        async def got_status(key: str, method: str, path: str, content: Any = None) -> int:
            return (await http.request(method, path, json=content, headers=bearer(key))).status_code

        asked: list[tuple[str, str, Any, tuple[int, int, int]]] = [
            ("POST", "/v1/decide", body(), (200, 403, 403)),
            ("POST", "/v1/decide", body(model_id="shop.v2"), (200, 200, 403)),
            ("POST", "/v1/replies", reply, (202, 403, 403)),
            ("GET", "/v1/models", None, (403, 200, 200)),
            ("GET", "/v1/models/default", None, (403, 403, 200)),
            ("GET", "/v1/models/shop.v1", None, (403, 200, 200)),
            ("GET", "/healthz", None, (200, 200, 200)),
        ]
        for method, path, content, expected in asked:
            got = tuple([await got_status(key, method, path, content) for key in (AGENT, SHOP, OPS)])
            assert got == expected, (method, path)
        listed = (await http.get("/v1/models", headers=bearer(SHOP))).json()["models"]
        assert [model["model_id"] for model in listed] == ["shop.v2"]
        assert len((await http.get("/v1/models", headers=bearer(OPS))).json()["models"]) == 2

        wrong: list[dict[str, str]] = [
            {},
            bearer(AGENT[:-1]),
            bearer(AGENT + "x"),
            bearer(agent.sha256),
            {"Authorization": AGENT},
            {"Authorization": f"Basic {AGENT}"},
            {"X-Api-Key": AGENT},
        ]
        for headers in wrong:
            # A body that is no JSON: the key comes first.
            refused = await http.post("/v1/decide", content=b"{", headers=headers)
            assert refused.status_code == 401, headers
            assert refused.headers["www-authenticate"] == "Bearer"
            error = refused.json()["error"]
            assert (error["type"], error["fields"]) == ("unauthorized", {})
            assert "CORTEX_API_KEY" in error["message"]
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await http.get(path)).status_code == 200
        schemes = (await http.get("/openapi.json")).json()["components"]["securitySchemes"]
        assert {(s["type"], s["scheme"]) for s in schemes.values()} == {("http", "bearer")}


@pytest.mark.integration
async def test_the_client_and_the_commands_send_the_key(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(settings.model_copy(update={"api_keys": KEYS})) as url:
        async with CortexClient(url, api_key=AGENT) as cortex:
            await cortex.reply(await cortex.decide("hello", conversation_id="c"), "thanks")
        with pytest.raises(ConfigError, match="no valid API key"):
            await (client := CortexClient(url)).decide("hello", conversation_id="c")
        await client.aclose()

        monkeypatch.setenv("CORTEX_API_KEY", SHOP)
        async with CortexClient(url, model_id="shop.v1") as cortex:
            decision = await cortex.decide("hello", conversation_id="c")
            with pytest.raises(
                ConfigError, match=r"key 'shop' has the scopes decide\+operate, expected reply"
            ):
                await cortex.reply(decision, "thanks")
            with pytest.raises(ConfigError, match="limited to other models"):
                await cortex.decide("hello", conversation_id="c", model_id="default")
        async with WorkerWatch(Settings.load(), [url], "shop.v1") as watch:
            await watch.poll_once()
            assert watch.newest.url == url
            answer = await watch._http.get(f"{url}/v1/models")
            assert answer.status_code == 200


@pytest.mark.integration
async def test_keys_are_in_no_error_log_or_repr(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CORTEX_API_KEYS", KEYS.get_secret_value())
    monkeypatch.setenv("CORTEX_API_KEY", "not-the-key")
    loaded = Settings.load(**settings.model_dump(exclude_unset=True, exclude={"redis_url"}))
    said: list[str] = [repr(loaded), str(loaded), repr(loaded.access_keys)]
    with capture_logs() as logs:
        async with listening(loaded) as url, CortexClient(url) as cortex:
            with pytest.raises(ConfigError) as refused:
                await cortex.decide("hello", conversation_id="c")
            said += traceback.format_exception(refused.value)
            said += [repr(vars(cortex)), repr(vars(cortex._transport))]
            async with httpx.AsyncClient(base_url=url) as http:
                said += [(await http.get("/metrics", headers=bearer(AGENT))).text]
                said += [(await http.get("/v1/models", headers=bearer(AGENT))).text]
    for text in (*said, str(logs), caplog.text):
        for secret in (AGENT, "not-the-key", agent.sha256, ops.sha256):
            assert secret not in text


@pytest.mark.parametrize(
    "text",
    [
        f"agent:decide:{AGENT}",
        AGENT,
        f"agent:decide:{'0' * 63}",
        f"agent:fly:{'0' * 64}",
        f"agent::{'0' * 64}",
        f"agent:decide@:{'0' * 64}",
        f"{agent.entry},{agent.entry}",
        f"{agent.entry},{AGENT}",
    ],
    # Keys are random, and the processes of a test run must agree on the names of tests.
    ids=["a key", "only a key", "short", "no scope", "empty scope", "empty model", "twice", "a key behind"],
)
def test_an_unusable_entry_is_an_error_that_does_not_repeat_it(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORTEX_API_KEYS", text)
    with pytest.raises(ConfigError, match=r"CORTEX_API_KEYS.*(entry \d|same name)") as caught:
        Settings.load()
    shown = "".join(traceback.format_exception(caught.value))
    assert AGENT not in shown
    assert agent.sha256 not in shown


def test_a_key_that_no_header_can_carry_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_API_KEY", "s3cret\r\nX: y")
    with pytest.raises(ConfigError, match=r"CORTEX_API_KEY: .*keys create") as caught:
        Settings.load()
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_entries_stand_in_lines_or_with_commas_and_an_empty_value_is_none() -> None:
    for text in (
        f"{agent.entry},{ops.entry}",
        f"\n{agent.entry}\n{ops.entry}\n",
        f"{agent.entry}, {ops.entry},",
    ):
        assert parse_keys(text) == (agent, ops)
    for text in ("", " \n"):
        assert Settings.load(api_keys=text).access_keys == ()
    assert find_key((agent, ops), OPS.encode()) == ops
    assert find_key((agent, ops), b"\xff") is None
    assert find_key((), b"") is None


def test_secrets_may_be_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "CORTEX_API_KEYS").write_text(f"{agent.entry}\n{ops.entry}\n")
    (tmp_path / "CORTEX_REDIS_URL").write_text("redis://:pw@h/0\n")
    monkeypatch.setenv("CORTEX_SECRETS_DIR", str(tmp_path))
    settings = Settings.load()
    assert settings.access_keys == (agent, ops)
    assert settings.redis_address == "redis://:pw@h/0"
    assert Settings.load(api_keys=shop.entry).access_keys == (shop,)
    monkeypatch.setenv("CORTEX_SECRETS_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="CORTEX_SECRETS_DIR"):
        Settings.load()


# --- the rule that keys are required ------------------------------------------------------------------------


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streams.cli", *arguments],
        env={"PATH": "", "HOME": "/nonexistent", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_service_that_others_can_reach_needs_keys(tmp_path: Path) -> None:
    for arguments in (("inference", "--kafka", "127.0.0.1:1"), ("up", "--data", str(tmp_path / "stack"))):
        refused = command(*arguments, "--host", "0.0.0.0")
        assert refused.returncode == 2, refused.stderr
        [line] = refused.stderr.splitlines()
        for word in ("CORTEX_API_KEYS", "cortex keys create", "CORTEX_INSECURE=1"):
            assert word in line
    assert not (tmp_path / "stack").exists()
    require_keys(Settings.load(host="0.0.0.0", api_keys=agent.entry))
    require_keys(Settings.load(host="0.0.0.0", insecure=True))
    with pytest.raises(ConfigError):
        require_keys(Settings.load(host="0.0.0.0", api_keys=""))


def test_loopback_is_what_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.com", "", "localhost.example.com"))
    )


def test_the_command_makes_a_key_and_an_entry_that_fit() -> None:
    made = command("keys", "create", "agent", "--scope", "decide", "--model", "m-1", "--model", "m.2")
    assert made.returncode == 0, made.stderr
    lines = dict(line.split("=", 1) for line in made.stdout.splitlines())
    assert set(lines) == {"CORTEX_API_KEY", "CORTEX_API_KEYS"}
    key = find_key(
        Settings.load(api_keys=lines["CORTEX_API_KEYS"]).access_keys, lines["CORTEX_API_KEY"].encode()
    )
    assert key == ApiKey("agent", frozenset({"decide"}), frozenset({"m-1", "m.2"}), key.sha256 if key else "")
    assert re.fullmatch(r"[!-~]{40,}", lines["CORTEX_API_KEY"])
    # Shells, .env files and manifests take it without quotes.
    assert re.fullmatch(r"[\w:.+@,-]+", lines["CORTEX_API_KEYS"])
    again = command("keys", "create", "agent")
    assert lines["CORTEX_API_KEY"] not in again.stdout
    for wrong in (("a b",), ("agent", "--scope", "fly"), ("agent", "--model", "a:b")):
        refused = command("keys", "create", *wrong)
        assert (refused.returncode, refused.stdout) == (2, "")


def test_the_demo_needs_no_key_whatever_the_environment_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("streams.demo.run.run_demo", lambda settings, **_: seen.append(settings))
    for name, value in (("API_KEYS", agent.entry), ("API_KEY", AGENT), ("HOST", "0.0.0.0")):
        monkeypatch.setenv(f"CORTEX_{name}", value)
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 0, done.output
    [settings] = seen
    assert (settings.host, settings.access_keys, settings.authorization) == ("127.0.0.1", (), {})


# --- web pages ----------------------------------------------------------------------------------------------

ATTACKER = "evil.example:8080"


@pytest.mark.integration
async def test_a_page_of_another_site_cannot_use_a_local_service(settings: Settings) -> None:
    own = settings.model_copy(update={"allowed_hosts": "cortex.internal, *.svc.cluster.local"})
    content = b'{"conversation_id": "c", "message": "hello"}'

    async def post(host: str, *headers: str) -> tuple[int, bytes]:
        head = "\r\n".join(
            (
                "POST /v1/decide HTTP/1.1",
                f"Host: {host}",
                "Content-Type: application/json",
                f"Content-Length: {len(content)}",
                "Connection: close",
                *headers,
            )
        )
        answer = await exchange(url, head.encode() + b"\r\n\r\n" + content)
        return int(answer.split()[1]), answer

    async with listening(own) as url:
        port = url.rpartition(":")[2]
        for host in (
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            f"LOCALHOST:{port}",
            f"app.localhost:{port}",
            f"[::1]:{port}",
            "10.1.2.3:8080",
            "cortex.internal",
            "a.svc.cluster.local:8080",
        ):
            assert (await post(host))[0] == 200, host
            assert (await post(host, f"Origin: http://{host}"))[0] == 200, host
        for host in (
            ATTACKER,
            f"127.0.0.1.evil.example:{port}",
            "localhost.evil.example",
            "evillocalhost",
            "svc.cluster.local.evil.example",
            "127.0.0.1:x",
            "[::1",
            "user@127.0.0.1@evil.example",
            "",
        ):
            status, answer = await post(host)
            assert status == 400, (host, answer)
            assert b'"type":"host_not_allowed"' in answer
            assert b"CORTEX_ALLOWED_HOSTS" in answer
        for origin in (f"http://{ATTACKER}", "http://127.0.0.1:1", "http://localhost", "null", "file://", ""):
            status, answer = await post(f"127.0.0.1:{port}", f"Origin: {origin}")
            assert status == 403, (origin, answer)
            assert b'"type":"origin_not_allowed"' in answer
            assert b"access-control" not in answer.lower()
        preflight = await exchange(
            url,
            f"OPTIONS /v1/decide HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://{ATTACKER}\r\n"
            "Access-Control-Request-Method: POST\r\nConnection: close\r\n\r\n".encode(),
        )
        assert preflight.startswith(b"HTTP/1.1 403")
        assert b"access-control" not in preflight.lower()
        # Kubernetes and load balancers probe by any name.
        for path, status in (("/healthz", 200), ("/readyz", 200), ("/metrics", 400), ("/docs", 400)):
            request = f"GET {path} HTTP/1.1\r\nHost: {ATTACKER}\r\nConnection: close\r\n\r\n"
            assert int((await exchange(url, request.encode())).split()[1]) == status, path


async def test_every_worker_checks_the_host(tmp_path: Path) -> None:
    settings = Settings.load(data=tmp_path, port=0)
    async with Worker("trainer", settings).serving() as port, httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{port}"
        assert (await http.get(f"{url}/metrics")).status_code == 200
        assert (await http.get(f"{url}/metrics", headers={"Host": ATTACKER})).status_code == 400
        assert (await http.get(f"{url}/healthz", headers={"Host": ATTACKER})).status_code == 200
    anyone = settings.model_copy(update={"allowed_hosts": "*"})
    async with Worker("trainer", anyone).serving() as port, httpx.AsyncClient() as http:
        answer = await http.get(f"http://127.0.0.1:{port}/metrics", headers={"Host": ATTACKER})
        assert answer.status_code == 200
