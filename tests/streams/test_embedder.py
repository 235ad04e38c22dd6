"""Texts to embeddings for many requests: each text once, in fair batches, and only the one at fault fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from cortex_core.arrays import FloatArray
from cortex_core.errors import InputError
from cortex_core.text_encoder import HashingEncoder
from streams.inference.embedder import ENCODE_BATCH, Embedder
from streams.testing import async_wait_for


class Watched:
    """A hashing encoder that notes its batches, waits to be let go on, and cannot read one word."""

    def __init__(self) -> None:
        self._inner = HashingEncoder(32)
        self.dim, self.name = 32, "watched"
        self.batches: list[list[str]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.thread: int | None = None

    def encode(self, text: str) -> FloatArray:
        row: FloatArray = self.encode_many([text])[0]
        return row

    def encode_many(self, texts: Sequence[str]) -> FloatArray:
        self.batches.append(list(texts))
        self.thread = threading.get_ident()
        assert self.go_on.wait(10)
        if "unreadable" in texts:
            raise InputError("this text cannot be read")
        return self._inner.encode_many(texts)


@asynccontextmanager
async def embedder(capacity: int = 100) -> AsyncIterator[tuple[Embedder, Watched]]:
    encoder = Watched()
    it = Embedder(encoder, capacity)
    try:
        yield it, encoder
    finally:
        encoder.go_on.set()
        it.close()


async def under_way(encoder: Watched) -> None:
    """Returns once the encoder holds a first batch."""
    await async_wait_for(lambda: encoder.batches, "a first batch")


async def test_vectors_come_in_order_and_are_what_float16_holds() -> None:
    async with embedder() as (it, encoder):
        rows = await it.encode(["b", "a", "b"])
        assert encoder.batches == [["b", "a"]]
        assert encoder.thread != threading.get_ident()
        for row, text in zip(rows, "bab", strict=True):
            np.testing.assert_array_equal(row, HashingEncoder(32).encode(text).astype(np.float16))
        assert await it.encode([]) == []
        await it.encode(["a", "b"])
        assert len(encoder.batches) == 1


async def test_a_text_that_many_wait_for_is_encoded_once() -> None:
    async with embedder() as (it, encoder):
        encoder.go_on.clear()
        first = asyncio.create_task(it.encode(["same"]))
        await under_way(encoder)
        others = [asyncio.create_task(it.encode(["same", f"own {i}"])) for i in range(5)]
        await asyncio.sleep(0)
        encoder.go_on.set()
        await asyncio.gather(first, *others)
        assert [text for batch in encoder.batches for text in batch].count("same") == 1
        assert len(encoder.batches) == 2, "what gathered meanwhile is one batch"


async def test_a_large_request_does_not_hold_a_small_one_up() -> None:
    async with embedder(1_000) as (it, encoder):
        encoder.go_on.clear()
        large = asyncio.create_task(it.encode([f"large {i}" for i in range(10 * ENCODE_BATCH)]))
        await under_way(encoder)
        small = asyncio.create_task(it.encode(["small"]))
        await asyncio.sleep(0)
        encoder.go_on.set()
        await small
        assert "small" in encoder.batches[1]
        assert not large.done()
        assert len(await large) == 10 * ENCODE_BATCH
        assert max(len(batch) for batch in encoder.batches) == ENCODE_BATCH


async def test_only_the_text_at_fault_fails() -> None:
    async with embedder() as (it, encoder):
        encoder.go_on.clear()
        blocker = asyncio.create_task(it.encode(["first"]))
        await under_way(encoder)
        bad = asyncio.create_task(it.encode(["unreadable"]))
        good = asyncio.create_task(it.encode(["fine"]))
        await asyncio.sleep(0)
        encoder.go_on.set()
        assert len(await good) == len(await blocker) == 1
        with pytest.raises(InputError, match="cannot be read"):
            await bad
        with pytest.raises(InputError):
            await it.encode(["unreadable"])
        assert len(await it.encode(["fine", "after"])) == 2


async def test_a_request_that_is_given_up_takes_nothing_from_others() -> None:
    async with embedder() as (it, encoder):
        encoder.go_on.clear()
        gone = asyncio.create_task(it.encode(["shared"]))
        await under_way(encoder)
        stays = asyncio.create_task(it.encode(["shared"]))
        await asyncio.sleep(0)
        gone.cancel()
        encoder.go_on.set()
        assert len(await stays) == 1
        assert gone.cancelled()


async def test_closing_ends_what_waits() -> None:
    async with embedder() as (it, encoder):
        encoder.go_on.clear()
        waiting = asyncio.create_task(it.encode(["a"]))
        await under_way(encoder)
        it.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
