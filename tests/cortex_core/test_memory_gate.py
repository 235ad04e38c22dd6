"""The gate's kernel part: what it is fitted to, and who gets the credit."""

from __future__ import annotations

import numpy as np
import torch

from cortex_core.arrays import FloatArray
from cortex_core.landmarks import Landmarks
from cortex_core.memory_gate import PRIOR_VARIANCE, MemoryGate

DIM, REPLIES = 16, 60


def unit_rows(rng: np.random.Generator, count: int) -> FloatArray:
    rows = rng.normal(size=(count, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def test_it_reaches_the_posterior_mode_block_by_block() -> None:
    rng = np.random.default_rng(0)
    gate = MemoryGate(DIM, features=DIM, landmarks=DIM, strategies=3)
    phi, psi = unit_rows(rng, REPLIES), unit_rows(rng, REPLIES)
    strategy = rng.integers(3, size=REPLIES)
    bilinear = rng.normal(size=REPLIES).astype(np.float32)
    label = rng.integers(2, size=REPLIES).astype(np.float32)
    weight = rng.uniform(0.2, 1.0, REPLIES).astype(np.float32)
    dual = np.zeros(REPLIES, np.float32)
    for _ in range(150):
        rows = rng.choice(REPLIES, 20, replace=False)
        dual[rows] = gate.condition(
            phi=phi[rows],
            psi=psi[rows],
            strategy=strategy[rows],
            bilinear=bilinear[rows],
            label=label[rows],
            weight=weight[rows],
            dual=dual[rows],
        )
    share = gate.strategy_weight.numpy()[strategy]
    logit = bilinear + gate.kernel_logit(phi, psi) + (share[:, :-1] * phi).sum(1) + share[:, -1]
    residual = weight * (label - 1.0 / (1.0 + np.exp(-logit)))
    np.testing.assert_allclose(dual, residual, atol=2e-3)
    np.testing.assert_allclose(
        gate.kernel_weight.numpy(), PRIOR_VARIANCE * (phi * dual[:, None]).T @ psi, atol=1e-3
    )


def test_memories_are_not_credited_with_what_the_strategy_did() -> None:
    rng = np.random.default_rng(1)
    features = np.eye(DIM, dtype=np.float32)

    def fitted(cause: str) -> MemoryGate:
        gate = MemoryGate(DIM, features=DIM, landmarks=DIM, strategies=2)
        strategy, memory = rng.integers(2, size=200), rng.integers(2, size=200)
        label = (strategy if cause == "strategy" else memory).astype(np.float32)
        dual = np.zeros(200, np.float32)
        for _ in range(20):
            dual = gate.condition(
                phi=np.repeat(features[:1], 200, 0),
                psi=features[memory],
                strategy=strategy,
                bilinear=np.zeros(200, np.float32),
                label=label,
                weight=np.ones(200, np.float32),
                dual=dual,
            )
        return gate

    of_strategy = fitted("strategy").kernel_weight[0]
    of_memory = fitted("memory").kernel_weight[0]
    assert float(of_memory[1] - of_memory[0]) > 3.0
    assert abs(float(of_strategy[1] - of_strategy[0])) < 0.3 * float(of_memory[1] - of_memory[0])


def test_a_slate_adds_nothing_until_one_was_shown() -> None:
    gate = MemoryGate(DIM)
    scores, mask = torch.rand(4, 3), torch.ones(4, 3)
    assert torch.equal(gate.log_odds(scores, mask), torch.zeros(4))
    gate.mean_score.copy_(torch.tensor([0.5, 1.0]))
    assert (gate.log_odds(scores, mask) > 0).tolist() == (scores.mean(1) > 0.5).tolist()


def test_landmarks_have_nothing_in_common_with_what_is_orthogonal_to_them() -> None:
    landmarks = Landmarks(DIM, size=8, gamma=1.5)
    basis = np.eye(DIM, dtype=np.float32)
    landmarks.admit_new(basis[:4])
    np.testing.assert_allclose(landmarks.kernel(basis[:4])[:, :4], np.eye(4), atol=1e-3)
    assert not landmarks.features(basis[5:6]).any()


def test_functions_and_sums_need_no_features_of_each_row() -> None:
    rng = np.random.default_rng(2)
    landmarks = Landmarks(DIM, size=12, gamma=4.0)
    landmarks.admit_new(unit_rows(rng, 10))
    rows, weights = unit_rows(rng, 20), rng.normal(size=12).astype(np.float32)
    features = landmarks.features(rows)
    np.testing.assert_allclose(landmarks.evaluate(rows, weights), features @ weights, atol=1e-4)
    summed = landmarks.project(landmarks.kernel(rows).sum(0, keepdims=True))
    np.testing.assert_allclose(summed[0], features.sum(0), atol=1e-4)
