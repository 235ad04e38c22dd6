"""Joint training: the specification's snippet and its losses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from cortex_core import (
    ConfidenceEstimator,
    JointTrainer,
    MemoryGate,
    OnlineTrainer,
    ReplayBuffer,
    SituationEncoder,
    StrategyRegistry,
    StrategySelector,
    TrainingSample,
)
from cortex_core.confidence_estimator import CalibrationLoss
from cortex_core.errors import InputError
from cortex_core.evaluation import expected_calibration_error
from cortex_core.text_encoder import HashingEncoder

PARTS = tuple[SituationEncoder, MemoryGate, StrategySelector, ConfidenceEstimator, StrategyRegistry]


@pytest.fixture
def parts() -> PARTS:
    torch.manual_seed(0)
    encoder = SituationEncoder(64, 64, 32, text_encoder=HashingEncoder(64))
    return encoder, MemoryGate(64, 64), StrategySelector(64, 7), ConfidenceEstimator(64), StrategyRegistry()


def samples(encoder: SituationEncoder) -> list[TrainingSample]:
    memories = torch.stack(
        [encoder.encode(f"note {i} about {'deploying' if i % 2 else 'poems'}") for i in range(6)]
    )
    return [
        TrainingSample(
            message_emb=encoder.encode(f"How do I deploy {i}?" if i % 2 else f"Write poem number {i}"),
            history_emb=encoder.encode("Tests are passing"),
            metadata={"hour_of_day": 10},
            memory_embs=memories,
            relevant_indices={1, 3, 5} if i % 2 else {0, 2, 4},
            strategy_id="step_by_step" if i % 2 else "creative",
            outcome=1.0,
        )
        for i in range(24)
    ]


def test_the_snippet_learns_all_three_tasks(parts: PARTS) -> None:
    encoder, gate, selector, estimator, registry = parts
    before = [gate.weight.detach().clone(), encoder.out.weight.detach().clone()]
    metrics = JointTrainer(encoder, gate, selector, estimator, registry).train(samples(encoder), epochs=60)
    assert re.fullmatch(
        r"Joint Training: 60 epochs\n  Total loss:      \d+\.\d\d → \d+\.\d\d\n"
        r"  Memory loss:     \d+\.\d\d → \d+\.\d\d\n  Strategy loss:   \d+\.\d\d → \d+\.\d\d\n"
        r"  Confidence loss: \d+\.\d\d → \d+\.\d\d",
        metrics.summary(),
    )
    assert metrics.memory[-1] < 0.2 * metrics.memory[0]
    assert metrics.strategy[-1] < 0.5 * metrics.strategy[0]
    assert metrics.confidence[-1] < metrics.confidence[0]
    assert not torch.equal(before[0], gate.weight)
    assert not torch.equal(before[1], encoder.out.weight)
    message = encoder.encode("How do I deploy this?")
    situation = encoder(message, encoder.encode("Tests are passing"), torch.zeros(10))
    assert (
        selector.select(situation, registry, explore=False, message=message.numpy()).strategy_id
        == "step_by_step"
    )


def test_parts_built_by_hand_may_have_a_situation_of_another_dimension() -> None:
    encoder = SituationEncoder(64, output_dim=48, hidden_dim=32, dropout=0.1, text_encoder=HashingEncoder(64))
    gate, selector = MemoryGate(48, 64), StrategySelector(48, 7, hidden_dim=32)
    estimator, registry = ConfidenceEstimator(48, hidden_dim=16, dropout=0.1), StrategyRegistry()
    JointTrainer(encoder, gate, selector, estimator, registry).train(samples(encoder), epochs=2)
    online = OnlineTrainer(
        encoder, gate, selector, estimator, registry, buffer=ReplayBuffer(), update_every=1
    )
    message = encoder.encode("How do I deploy this?")
    situation = encoder(message, torch.zeros(64), torch.zeros(10)).detach()
    before = selector.belief(situation).mean[registry.id_to_index("quick_answer")]
    for _ in range(5):
        online.record_interaction(
            situation_emb=situation,
            memory_indices=[0],
            memory_scores=[0.5],
            strategy_id="quick_answer",
            confidence=0.5,
            user_response="Thanks, that worked!",
            message_emb=message,
            memory_embs=message[None],
        )
    after = selector.belief(situation).mean[registry.id_to_index("quick_answer")]
    assert after > before + 0.1, "praise made the strategy no likelier in its situation"


def test_a_bad_outcome_teaches_against_its_strategy(parts: PARTS) -> None:
    encoder, gate, selector, estimator, registry = parts
    bad = [s for s in samples(encoder) if s.strategy_id == "creative"]
    for sample in bad:
        sample.outcome = 0.0
    JointTrainer(encoder, gate, selector, estimator, registry).train(bad, epochs=40)
    message = encoder.encode("Write poem number 3")
    p = selector.belief(encoder(message, message, torch.zeros(10)), message.numpy()).mean
    assert int(p.argmin()) == registry.id_to_index("creative")


def test_unusable_samples_train_nothing(parts: PARTS) -> None:
    encoder, gate, selector, estimator, registry = parts
    trainer = JointTrainer(encoder, gate, selector, estimator, registry)
    with pytest.raises(InputError, match="expects samples"):
        trainer.train([])
    sample = samples(encoder)[0]
    sample.relevant_indices = {99}
    with pytest.raises(InputError, match="99"):
        trainer.train([sample])
    assert torch.equal(gate.weight, torch.eye(64))


def test_contrastive_loss_by_hand() -> None:
    gate = MemoryGate(3, 3)
    situation = torch.tensor([1.0, 0.0, 0.0])
    good, bad = torch.tensor([[0.6, 0.8, 0.0]]), torch.tensor([[0.8, 0.6, 0.0], [0.0, 1.0, 0.0]])
    loss = gate.contrastive_loss(situation, good, bad, margin=0.5).detach()
    assert float(loss) == pytest.approx((0.7 + 0.0) / 2)
    assert float(gate.contrastive_loss(situation, good, bad[:0]).detach()) == 0.0


def test_soft_ece_approaches_the_hard_one_and_has_gradient() -> None:
    rng = np.random.default_rng(0)
    confidence = torch.tensor(rng.random(4000), dtype=torch.float32, requires_grad=True)
    outcome = torch.tensor(rng.random(4000) < 0.3, dtype=torch.float32)
    sharp = CalibrationLoss(temperature=1e-5).soft_ece(confidence, outcome)
    hard = expected_calibration_error(confidence.detach().numpy(), outcome.numpy())
    assert float(sharp.detach()) >= hard - 1e-3  # root mean square of the gaps, not their mean
    assert float(sharp.detach()) == pytest.approx(hard, abs=0.1)
    CalibrationLoss(temperature=0.01).soft_ece(confidence, outcome).backward()
    assert confidence.grad is not None
    # The mean outcome is 0.3: high confidences have to fall, low ones to rise.
    assert (
        float(confidence.grad[confidence > 0.6].mean()) > 0 > float(confidence.grad[confidence < 0.1].mean())
    )
    calibrated = torch.tensor(rng.random(20_000), dtype=torch.float32)
    truth = (torch.tensor(rng.random(20_000), dtype=torch.float32) < calibrated).float()
    assert float(CalibrationLoss().soft_ece(calibrated, truth)) < 0.03
