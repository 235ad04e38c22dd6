"""A version as it is served: prepared whole, then immutable, so that threads may share it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cortex_core.arrays import FloatArray, unit
from cortex_core.errors import WeightsError
from cortex_core.model import CortexModel, ModelConfig, ModelDecision
from cortex_core.weights import WeightsSnapshot

THREADS = 4
VERSIONS = 12


def learned() -> tuple[WeightsSnapshot, FloatArray, FloatArray]:
    """A full-sized version whose caches take time to build, a message that it knows, and memories."""
    rng = np.random.default_rng(0)
    model = CortexModel.create(ModelConfig(), "fresh")
    rows = unit(rng.normal(size=(300, 384)).astype(np.float32))
    messages, memories = rows[:280], rows[280:]
    model.selector.landmarks.admit_new(messages)
    for message in messages[:20]:
        phi = model.selector.features(message[None])[0]
        model.selector.condition(phi, 2, 0.5)
        model.selector.condition(phi, 0, -0.5)
    return WeightsSnapshot.of(model, model_id="fresh", version=1), messages[0], memories


def decide(model: CortexModel, message: FloatArray, memories: FloatArray) -> ModelDecision:
    return model.decide(message, None, None, memories, rng=np.random.default_rng(7))


def test_concurrent_first_decisions_on_fresh_versions_are_those_of_one_thread() -> None:
    snapshot, message, memories = learned()
    wanted = decide(snapshot.to_model().freeze(), message, memories)
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(VERSIONS):
            model, start = snapshot.to_model().freeze(), threading.Barrier(THREADS)

            def first(model: CortexModel = model, start: threading.Barrier = start) -> ModelDecision:
                start.wait()
                return decide(model, message, memories)

            for got in [f.result() for f in [pool.submit(first) for _ in range(THREADS)]]:
                np.testing.assert_array_equal(got.probabilities, wanted.probabilities)
                assert (got.strategy_id, got.memory_indices) == (wanted.strategy_id, wanted.memory_indices)
                assert (got.memory_scores, got.confidence) == (wanted.memory_scores, wanted.confidence)


def test_a_frozen_model_decides_as_before_and_refuses_to_change() -> None:
    snapshot, message, memories = learned()
    model = snapshot.to_model()
    wanted = decide(model, message, memories)
    frozen = model.freeze()
    assert frozen is model
    np.testing.assert_array_equal(decide(frozen, message, memories).probabilities, wanted.probabilities)
    phi = frozen.selector.features(message[None])[0]
    with pytest.raises(ValueError, match="read-only"):
        frozen.selector.condition(phi, 0, 1.0)
    with pytest.raises(RuntimeError, match="frozen"):
        frozen.train()
    with pytest.raises(ValueError, match="read-only"):
        frozen.selector.landmarks.admit(-message)
    with pytest.raises(RuntimeError, match="frozen"):
        snapshot.load_into(frozen)
    assert WeightsSnapshot.of(frozen, model_id="fresh", version=1).payload == snapshot.payload


def test_finite_but_absurd_weights_do_not_become_a_version() -> None:
    snapshot, _, _ = learned()
    model = snapshot.to_model()
    for parameter in model.parameters():
        parameter.data.fill_(1e20)
    with pytest.raises(WeightsError, match="trial decision"):
        model.freeze()
