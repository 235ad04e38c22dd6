"""Texts, metadata and strategies: what the learner is given."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cortex_core.errors import ConfigError, InputError, NonFiniteError
from cortex_core.metadata import METADATA_KEYS, metadata_features
from cortex_core.strategy_registry import StrategyProfile, StrategyRegistry
from cortex_core.text_encoder import CachedEncoder, HashingEncoder, TextEncoder, load_encoder


def test_hashing_keeps_similar_texts_close_in_every_process() -> None:
    encoder = HashingEncoder(128)
    a, b, c = encoder.encode_many(["reset my password", "please reset the password", "book a flight to Oslo"])
    assert np.linalg.norm(a) == pytest.approx(1.0, abs=1e-5)
    assert a @ b > 0.5
    assert a @ c < 0.3
    code = (
        "from cortex_core.text_encoder import HashingEncoder; "
        "print(HashingEncoder(128).encode('reset my password').tobytes().hex())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == a.tobytes().hex()
    assert not encoder.encode("").any()
    with pytest.raises(InputError, match="str"):
        encoder.encode(3)  # type: ignore[arg-type]  # the wrong type is the test


def test_the_cache_asks_once_and_forgets_the_oldest() -> None:
    cache = CachedEncoder(HashingEncoder(16), capacity=2)
    assert isinstance(cache, TextEncoder)
    rows = cache.encode_many(["a", "b", "a"])
    assert (rows[0] == rows[2]).all()
    cache.encode("a")
    cache.encode("c")  # "b" was used longest ago
    misses = cache.misses
    cache.encode("a")
    assert cache.misses == misses
    cache.encode("b")
    assert cache.misses == misses + 1


def test_encoders_by_name() -> None:
    assert load_encoder("hashing").dim == 384
    assert load_encoder("hashing-24").dim == 24


def test_metadata_features() -> None:
    known = metadata_features({"hour_of_day": 6, "conversation_length": 10}, "Why?", ["a"])
    named = dict(zip(METADATA_KEYS, known.tolist(), strict=True))
    assert named["hour_sin"] == pytest.approx(1.0)
    assert named["conversation_length"] == pytest.approx(0.5)
    assert named["message_is_question"] == 1.0
    assert not metadata_features(None).any()
    for bad, error in (({"hour_of_day": 24}, InputError), ({"idle_s": float("nan")}, NonFiniteError)):
        with pytest.raises(error, match=next(iter(bad))):
            metadata_features(bad)
    with pytest.raises(InputError, match="noon"):
        metadata_features({"hour_of_day": "noon"})


def test_registry() -> None:
    registry = StrategyRegistry()
    assert registry.ids == (
        "deep_research",
        "quick_answer",
        "clarify_first",
        "step_by_step",
        "summarize",
        "creative",
        "empathize",
    )
    assert registry.get_by_id("creative") is registry[5]
    assert registry.id_to_index("step_by_step") == 3
    assert len(StrategyRegistry.from_set("developer")) > 1 < len(StrategyRegistry.from_set("support"))
    registry.add(StrategyProfile("own"))
    assert registry[7].name == "Own"
    with pytest.raises(ConfigError, match="duplicate"):
        registry.add(StrategyProfile("own"))
    with pytest.raises(InputError, match="quick_answer"):
        registry.id_to_index("missing")
    with pytest.raises(ConfigError, match="at least one"):
        StrategyRegistry([])
