"""Cold start, decisions and what travels."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.confidence_estimator import action_for
from cortex_core.errors import ConfigError, DimensionError, NonFiniteError, WeightsError
from cortex_core.model import CortexModel, ModelConfig
from cortex_core.weights import WeightsSnapshot
from tests.cortex_core.learner_helpers import DIM, SMALL, entry_of, fresh, near, unit


def snapshot(model: CortexModel) -> WeightsSnapshot:
    return WeightsSnapshot.of(model, model_id="test", version=1)


def trained() -> CortexModel:
    model, trainer, buffer = fresh()
    rng = np.random.default_rng(3)
    memories = unit(rng, 12)
    for step in range(40):
        message = unit(rng)
        decision = model.decide(message, None, None, memories, rng=rng)
        entry = entry_of(decision, message, memories, 0.8 if step % 3 else -0.8, str(step))
        buffer.add(entry)
        trainer.observe(entry)
    return model


@pytest.mark.parametrize("config", [ModelConfig(), SMALL, ModelConfig(text_dim=48, situation_dim=20)])
def test_cold_start_is_cosine_uniform_and_one_half(config: ModelConfig) -> None:
    model = CortexModel.create(config, "newborn")
    rng = np.random.default_rng(0)
    message = rng.normal(size=config.text_dim).astype(np.float32)
    history = rng.normal(size=config.text_dim).astype(np.float32)
    memories = rng.normal(size=(30, config.text_dim)).astype(np.float32)
    decision = model.decide(message, history, np.ones(10, np.float32), memories, explore=False, rng=rng)
    cosine = memories @ message / np.linalg.norm(memories, axis=1) / np.linalg.norm(message)
    if config.text_dim == config.situation_dim:
        assert decision.memory_indices == np.argsort(-cosine)[:3].tolist()
        assert decision.memory_scores == pytest.approx(np.sort(cosine)[::-1][:3].tolist(), abs=1e-5)
    explored = model.decide(message, history, None, memories, rng=rng)
    assert explored.probabilities == pytest.approx(1.0 / len(config.strategies), abs=1e-6)
    assert decision.confidence == explored.confidence == 0.5
    assert decision.action == "hedge"


def test_a_reply_changes_the_next_decision() -> None:
    model, trainer, buffer = fresh()
    rng = np.random.default_rng(1)
    message = unit(rng)
    before = model.decide(message, None, None, None, rng=rng)
    entry = entry_of(before, message, None, 0.9, "one")
    buffer.add(entry)
    assert trainer.observe(entry) is None
    assert trainer.flush() is not None
    praised = model.decide(near(rng, message, 0.02), None, None, None, explore=False, rng=rng)
    assert praised.strategy_index == before.strategy_index
    blamed_model, blamed, other = fresh()
    bad = entry_of(before, message, None, -0.9, "one")
    other.add(bad)
    blamed.observe(bad)
    blamed.flush()
    after = blamed_model.decide(message, None, None, None, rng=rng)
    assert after.probabilities[before.strategy_index] < before.probabilities[before.strategy_index]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 9), top_k=st.integers(0, 5))
def test_a_decision_is_well_formed(seed: int, count: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    model = CortexModel.create(SMALL, "shape")
    decision = model.decide(unit(rng), unit(rng), None, unit(rng, count), top_k=top_k, rng=rng)
    k = min(count, top_k)
    assert len(decision.memory_indices) == len(set(decision.memory_indices)) == k
    assert len(decision.memory_scores) == len(decision.memory_propensities) == k
    assert all(0.0 < p <= 1.0 for p in decision.memory_propensities)
    assert decision.probabilities.sum() == pytest.approx(1.0, abs=1e-6)
    assert decision.propensity == pytest.approx(float(decision.probabilities[decision.strategy_index]))
    assert len(decision.context) == 7
    assert 0.0 <= decision.confidence <= 1.0
    assert decision.action == action_for(decision.confidence)


def test_propensities_are_the_frequencies() -> None:
    model = trained()
    rng = np.random.default_rng(5)
    message, memories = unit(rng), unit(rng, 6)
    first = np.zeros(6)
    strategies = np.zeros(3)
    claimed: dict[int, float] = {}
    draws = 1500
    for _ in range(draws):
        decision = model.decide(message, None, None, memories, top_k=2, rng=rng)
        first[decision.memory_indices[0]] += 1
        strategies[decision.strategy_index] += 1
        claimed[decision.memory_indices[0]] = decision.memory_propensities[0]
    assert strategies / draws == pytest.approx(decision.probabilities, abs=0.04)
    for index, propensity in claimed.items():
        assert first[index] / draws == pytest.approx(propensity, abs=0.04)


def test_bad_inputs_are_named() -> None:
    model = CortexModel.create(SMALL, "inputs")
    rng = np.random.default_rng(0)
    with pytest.raises(DimensionError, match="message_emb"):
        model.decide(np.zeros(DIM + 1, np.float32), None, None, None, rng=rng)
    with pytest.raises(DimensionError, match="memory_embs"):
        model.decide(unit(rng), None, None, np.zeros((2, DIM - 1), np.float32), rng=rng)
    with pytest.raises(NonFiniteError, match="history_emb"):
        model.decide(unit(rng), np.full(DIM, np.nan, np.float32), None, None, rng=rng)
    with pytest.raises(ConfigError, match="strategies"):
        ModelConfig(strategies=("same", "same"))
    with pytest.raises(ConfigError, match="unheard_of"):
        ModelConfig.from_dict({"unheard_of": 1})


def test_the_same_id_gives_the_same_bytes_in_every_process() -> None:
    code = (
        "from cortex_core.model import CortexModel\nfrom cortex_core.weights import WeightsSnapshot\n"
        "m = CortexModel.create(model_id='stable')\n"
        "print(WeightsSnapshot.of(m, model_id='stable', version=1).manifest.sha256)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = WeightsSnapshot.of(CortexModel.create(model_id="stable"), model_id="stable", version=1)
    assert other.stdout.strip() == own.manifest.sha256
    different = WeightsSnapshot.of(CortexModel.create(model_id="other"), model_id="other", version=1)
    assert different.manifest.sha256 != own.manifest.sha256


def test_what_travels_decides_the_same() -> None:
    model = trained()
    sent = snapshot(model)
    received = WeightsSnapshot.join(sent.manifest, sent.split()).to_model()
    rng = np.random.default_rng(8)
    for _ in range(20):
        message, memories = unit(rng), unit(rng, 9)
        a = model.decide(message, None, None, memories, explore=False, rng=np.random.default_rng(0))
        b = received.decide(message, None, None, memories, explore=False, rng=np.random.default_rng(0))
        assert a.strategy_id == b.strategy_id
        assert a.memory_indices == b.memory_indices
        assert a.confidence == pytest.approx(b.confidence, abs=1e-4)
    a, b = (m.decide(unit(rng), None, None, None, rng=np.random.default_rng(1)) for m in (model, received))
    again = snapshot(received)
    assert again.payload == sent.payload


def test_default_weights_stay_small() -> None:
    sent = WeightsSnapshot.of(CortexModel.create(), model_id="size", version=1)
    assert sent.manifest.bytes < 3_300_000
    assert len(sent.split()) == sent.manifest.chunks


def test_damaged_and_forged_weights_are_refused_whole() -> None:
    model = trained()
    sent = snapshot(model)
    target = CortexModel.create(SMALL, "target")
    before = snapshot(target).payload
    flipped = bytearray(sent.payload)
    flipped[-1] ^= 1
    with pytest.raises(WeightsError, match="sha256"):
        WeightsSnapshot(sent.manifest, bytes(flipped)).load_into(target)
    with pytest.raises(WeightsError, match="bytes"):
        WeightsSnapshot.join(sent.manifest, sent.split()[:-1] or [b""])
    with pytest.raises(WeightsError, match="architecture"):
        sent.load_into(CortexModel.create(ModelConfig(text_dim=8, situation_dim=8)))
    assert snapshot(target).payload == before
    with torch.no_grad():
        model.gate.weight[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"gate\.weight"):
        snapshot(model)
