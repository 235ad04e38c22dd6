"""Every example in a docstring is run. A block that this test does not know how to run fails."""

from __future__ import annotations

import ast
import asyncio
import doctest
import importlib
import inspect
import io
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cortex_core.replay_buffer import ReplayBuffer, ReplayEntry
from streams import testing
from streams.audit.compare import audit
from streams.audit.reading import collect
from streams.connections import kafka_client_options
from streams.demo.view import Frame
from streams.inference.api import DecideRequest, ReplyRequest
from streams.joiner.batch import Batch, Part
from streams.joiner.decode import decode_interaction, decode_reply
from streams.kafka.publisher import Message
from streams.kafka.topics import Topics
from streams.local.embedded import redis_program
from streams.local.processes import Child
from streams.settings import Settings
from streams.testing import wait_for
from tests.cortex_core.learner_helpers import entry_of, fresh, unit
from tests.streams.serving import body, listening

ROOT = Path(__file__).parent.parent
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SECTION = re.compile(r"(Args|Returns|Raises|Yields)\b.*:")


@dataclass(frozen=True, slots=True)
class Example:
    """An indented block of a docstring."""

    place: str
    """Module, or module and qualified name; with a number from the second one of a docstring."""
    module: str
    text: str

    @property
    def kind(self) -> str:
        if self.text.startswith(">>> "):
            return "doctest"
        return "commands" if re.match(r"(cortex|faust) ", self.text) else "code"


def docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(place, text) of each docstring, by the qualified name of what it describes."""
    stack: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = [
        (module, tree)
    ]
    while stack:
        place, node = stack.pop()
        if text := ast.get_docstring(node):
            yield place, text
        for child in node.body:
            if isinstance(child, Definition):
                stack.append((f"{place}.{child.name}", child))


def blocks(text: str) -> Iterator[str]:
    """The indented blocks of a docstring, but for those of its sections."""
    block: list[str] = []
    section = False
    for line in [*text.splitlines(), "end"]:
        if not line or line.startswith("    "):
            if not section:
                block.append(line)
            continue
        if any(block):
            yield textwrap.dedent("\n".join(block)).strip() + "\n"
        block, section = [], bool(SECTION.fullmatch(line))


def examples() -> Iterator[Example]:
    for path in sorted([*ROOT.glob("cortex_core/**/*.py"), *ROOT.glob("streams/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for place, text in docstrings(ast.parse(path.read_text(encoding="utf-8")), module):
            for number, block in enumerate(blocks(text)):
                yield Example(f"{place} {number + 1}" if number else place, module, block)


EXAMPLES = {example.place: example for example in examples()}

NOT_RUN = {
    "cortex_core.errors",  # the tree of errors
    "cortex_core.memory_bank.MemoryBank.decay",  # a formula
    "cortex_core.recency.RecencySampler",  # a formula
    "streams.audit 2",  # its modules
    "streams.forgotten",  # keys and values of a topic
    "streams.heartbeats",  # keys of Redis
    "streams.joiner.effects",  # the order of effects
    "streams.joiner.offsets.StoredOffsets",  # keys of Redis
    "streams.joiner.states.RedisStates",  # keys of Redis
    "streams.replay_store",  # keys of Redis
    "streams.trail.Trail",  # an outline
    "streams.trail.Trail 2",  # keys of Redis
    "streams.weights.records",  # keys and values of a topic
}
"""Blocks that are tables, trees and formulas."""


def learned() -> list[ReplayEntry]:
    """Three experiences."""
    rng = np.random.default_rng(0)
    model, memories = fresh()[0], unit(rng, 10)
    messages = [unit(rng) for _ in range(3)]
    return [
        entry_of(model.decide(message, None, None, memories, rng=rng), message, memories, 0.8, f"e{i}")
        for i, message in enumerate(messages)
    ]


def of_online_trainer() -> dict[str, Any]:
    model, _, buffer = fresh()
    experiences = learned()
    buffer.extend(experiences)
    return {"model": model, "buffer": buffer, "experiences": experiences}


def of_join() -> dict[str, Any]:
    asked, said = testing.interaction("i-1"), testing.reply("r-1", "i-1")
    return {
        "decode_interaction": decode_interaction,
        "value": asked.to_bytes(),
        "reply": decode_reply(said.to_bytes()),
        "arrived": 1.0,
        "now": 2.0,
    }


class Solitary:
    """The owner of a batch whom nobody disturbs."""

    settings = Settings.load()

    def owns(self, batch: Batch) -> bool:
        return True

    def attempt_begins(self, limit: asyncio.Timeout) -> None:
        """Nothing to note."""

    def attempt_ended(self, batch: Batch, error: Exception | None) -> None:
        assert error is None

    def unavailable(self, server: str, why: str) -> None:
        raise AssertionError(f"{server}: {why}")

    async def commit_done(self, part: Part) -> None:
        """Nothing to commit to."""


ALONE: dict[str, Callable[[], dict[str, Any]]] = {
    "cortex_core.evaluation.progressive_validation": lambda: {
        "requests": [SimpleNamespace(best=i % 2) for i in range(8)],
        "learner": SimpleNamespace(
            decide=lambda request: SimpleNamespace(strategy=0), learn=lambda request, answer, feedback: None
        ),
        "reply": lambda request, answer: "thanks",
        "correct": [],
    },
    "cortex_core.memory_bank.MemoryBank": lambda: {
        "embedding": np.ones(384, np.float32),
        "query_embedding": np.ones(384, np.float32),
    },
    "cortex_core.off_policy": lambda: {
        "actions": [0, 1, 0, 1],
        "rewards": [0.2, 0.9, 0.1, 0.8],
        "propensities": [0.5] * 4,
        "old_probabilities": np.full((4, 2), 0.5),
        "new_probabilities": np.tile([0.2, 0.8], (4, 1)),
        "predicted": np.tile([0.1, 0.8], (4, 1)),
    },
    "cortex_core.online_trainer": of_online_trainer,
    "cortex_core.replay_buffer.ReplayBuffer": lambda: {"entry": learned()[0]},
    "cortex_core.replay_buffer.ReplayStore": lambda: {"arriving": learned(), "store": ReplayBuffer(100)},
    "streams.demo.users": lambda: {"index": 3, "strategy_id": "step_by_step", "memory_ids": ("m1",)},
    "streams.demo.view.View": lambda: {"console": Console(file=io.StringIO()), "frame": Frame()},
    "streams.joiner.batch": lambda: {"batch": Batch(Solitary(), (1, 0), [], {})},
    "streams.joiner.decode": lambda: {
        "interaction_bytes": testing.interaction("i-1").to_bytes(),
        "reply_bytes": testing.reply("r-1").to_bytes(),
    },
    "streams.joiner.join": of_join,
    "streams.local.embedded": lambda: {"data": Path("data")},
    "streams.weights.versions": lambda: {"settings": Settings.load(), "records": []},
    "streams.local.processes.Child": lambda: {"program": redis_program(), "data": Path("data")},
}
"""Examples that need no server, and what stands for the names that they take for given."""

ON_SERVERS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "streams.audit": lambda _: {"collect": collect, "audit": audit},
    "streams.demo.watch.ExperienceReader": lambda _: {"model_id": "default"},
    "streams.inference.service": lambda _: {
        "request": DecideRequest.model_validate(body()),
        "reply": ReplyRequest(conversation_id="c-1", text="Thanks, that worked!"),
    },
    "streams.joiner.forget": lambda _: {},
    "streams.joiner.rebuild": lambda _: {},
    "streams.kafka.clients": lambda settings: {
        "kafka_client_options": kafka_client_options,
        "topic": Topics.of(settings).replies,
        "value": testing.reply("r-2").to_bytes(),
    },
    "streams.kafka.follower": lambda settings: {"topic": Topics.of(settings).control, "handle": ignore},
    "streams.kafka.publisher": lambda settings: {
        "on_state": print,
        "topic": Topics.of(settings).replies,
        "key": b"c-1",
        "value": testing.reply("r-2").to_bytes(),
        "messages": [Message(Topics.of(settings).replies, b"c-1", testing.reply("r-3").to_bytes())],
    },
    "streams.kafka.reader": lambda settings: {"topic": Topics.of(settings).replies},
    "streams.local.stack": lambda _: {},
    "streams.replay_store.RedisReplayBuffer": lambda _: {},
    "streams.testing": lambda _: {"Settings": Settings},
    "streams.weights.follower.WeightsFollower": lambda _: {"build": ignore},
}
"""Examples that need Kafka and Redis, an interaction and its reply in the topics."""


async def ignore(records: object) -> None:
    """Handles what was read."""


async def run(example: Example, **names: Any) -> None:
    """Runs an example, `await` outside of functions included, in a copy of its module's names."""
    # Trainers and inference workers take seconds of torch each; `cortex up` is tested with them.
    text = example.text.replace("trainers=1, inference=2", "trainers=0, inference=0")
    code = compile(text, example.place, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    done = eval(code, vars(importlib.import_module(example.module)) | names)
    if inspect.isawaitable(done):
        await done


def test_every_example_is_known() -> None:
    code = {place for place, example in EXAMPLES.items() if example.kind == "code"}
    assert code == {*ALONE, *ON_SERVERS, *NOT_RUN, "streams.client.client", "streams.worker"}


@pytest.mark.parametrize("place", [p for p, e in EXAMPLES.items() if e.kind == "doctest"])
def test_doctest(place: str) -> None:
    example = EXAMPLES[place]
    names = dict(vars(importlib.import_module(example.module)))
    test = doctest.DocTestParser().get_doctest(example.text, names, place, None, None)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("place", [p for p, e in EXAMPLES.items() if e.kind == "commands"])
def test_commands(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_KAFKA", "localhost:9092")
    monkeypatch.setenv("CORTEX_REDIS_URL", "redis://localhost:6379/0")
    for line in EXAMPLES[place].text.splitlines():
        command = [str(Path(sys.executable).parent / line.split()[0]), *line.split()[1:], "--help"]
        subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("place", ALONE)
async def test_example(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write a file
    await run(EXAMPLES[place], **ALONE[place]())


@pytest.mark.integration
@pytest.mark.parametrize("place", ON_SERVERS)
async def test_example_on_servers(
    place: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORTEX_TEST_KAFKA", settings.kafka_address)
    monkeypatch.setenv("CORTEX_TEST_REDIS_URL", settings.redis_address)
    monkeypatch.setenv("CORTEX_TOPIC_PREFIX", settings.topic_prefix)
    await testing.send(settings, [testing.interaction("i-1"), testing.reply("r-1", "i-1")])
    monkeypatch.chdir(tmp_path)
    await run(EXAMPLES[place], settings=settings, folder=tmp_path, **ON_SERVERS[place](settings))


@pytest.mark.integration
async def test_client_example(settings: Settings) -> None:
    example = EXAMPLES["streams.client.client"]
    async with listening(settings) as url:
        await run(
            replace(example, text=example.text.replace("http://127.0.0.1:8080", url)),
            message="How do I deploy this?",
            chat_id="c-1",
            history=["Hello"],
            memories={"m1": "Deploys run on Fridays."},
            next_message="Thanks, that worked!",
        )


def test_worker_example(tmp_path: Path) -> None:
    """A worker ends with its process, so this one has its own."""
    example = EXAMPLES["streams.worker"]
    program = tmp_path / "example.py"
    program.write_text(f"from streams.worker import *\nsettings = Settings.load(port=0)\n{example.text}")
    worker = Child("example", [sys.executable, str(program)], tmp_path / "example.log")
    worker.start()
    try:
        wait_for(lambda: "listening" in worker.log_text() or not worker.alive, "the worker to listen")
        worker.signal(signal.SIGTERM)
        wait_for(lambda: not worker.alive, "the worker to stop")
    finally:
        worker.kill()
    assert worker.returncode == 0, worker.log_text()
