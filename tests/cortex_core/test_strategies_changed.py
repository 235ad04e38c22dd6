"""A model whose strategies change keeps what it learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cortex_core.errors import ConfigError
from cortex_core.model import CortexModel
from tests.cortex_core.learner_helpers import DIM, SMALL, entry_of, fresh, unit

NEW = ("debug", "quick_answer", "refactor")


def trained() -> CortexModel:
    """Praised for `quick_answer`, blamed for the others, in one kind of request."""
    model, trainer, buffer = fresh()
    rng = np.random.default_rng(0)
    message, memories = unit(rng), unit(rng, 4)
    for n in range(60):
        decision = model.decide(message, None, None, memories, rng=rng)
        reward = 0.8 if decision.strategy_id == "quick_answer" else -0.8
        entry = entry_of(decision, message, memories, reward, f"e{n}")
        buffer.add(entry)
        trainer.observe(entry)
    return model


def test_a_model_that_grows_keeps_what_it_learned_and_new_strategies_start_cold() -> None:
    model, rng = trained(), np.random.default_rng(0)
    grown = model.with_strategies(NEW)
    assert grown.config.strategies == (*SMALL.strategies, "debug", "refactor")
    assert grown.with_strategies(NEW) is grown
    message, memories = unit(rng), torch.from_numpy(unit(rng, 5))
    situation = torch.from_numpy(model.decide(message, None, None, None, rng=rng).situation)
    before, after = (m.selector.belief(situation, message) for m in (model, grown))
    np.testing.assert_allclose(after.mean[:3], before.mean, atol=0.01)
    np.testing.assert_allclose(after.deviation[:3], before.deviation, atol=0.01)
    np.testing.assert_allclose(after.deviation[3:], 1.0, atol=1e-3)
    np.testing.assert_allclose(after.mean[3:], 0.5, atol=0.05)
    phi = model.selector.features(message[None])[0]
    slates = [
        m.gate.draw_slate(situation, memories, 3, explore=False, rng=rng, phi=phi) for m in (model, grown)
    ]
    assert slates[0].indices == slates[1].indices
    np.testing.assert_allclose(slates[0].scores, slates[1].scores, atol=0.005)
    same = grown.state_dict()
    assert all(
        torch.equal(value, same[name]) for name, value in model.with_strategies(NEW).state_dict().items()
    )


def test_only_allowed_strategies_are_chosen_with_exact_propensities() -> None:
    grown = trained().with_strategies(NEW).freeze()
    rng = np.random.default_rng(1)
    message = unit(rng)
    known = grown.registry.ids
    drawn = np.zeros(len(known))
    for _ in range(400):
        decision = grown.decide(message, None, None, None, strategies=NEW, rng=rng)
        assert decision.strategy_id in NEW
        assert decision.propensity == pytest.approx(decision.probabilities[decision.strategy_index])
        drawn[decision.strategy_index] += 1
    assert decision.probabilities.sum() == pytest.approx(1.0, abs=1e-6)
    assert [id_ for id_, p in zip(known, decision.probabilities, strict=True) if p > 0.0] == [
        "quick_answer", "debug", "refactor",
    ]  # fmt: skip
    np.testing.assert_allclose(drawn / 400, decision.probabilities, atol=0.08)
    greedy = grown.decide(message, None, None, None, strategies=["refactor"], explore=False, rng=rng)
    assert (greedy.strategy_id, greedy.propensity) == ("refactor", 1.0)
    with pytest.raises(ConfigError, match="none of"):
        grown.decide(message, None, None, None, strategies=["dance"], rng=rng)
    assert unit(rng).shape == (DIM,)


def test_all_strategies_allowed_is_the_same_as_no_choice() -> None:
    model = trained()
    message = unit(np.random.default_rng(2))
    one, two = (
        model.decide(message, None, None, None, strategies=ids, rng=np.random.default_rng(3))
        for ids in (None, SMALL.strategies)
    )
    assert (one.strategy_id, one.context, one.confidence) == (two.strategy_id, two.context, two.confidence)
    np.testing.assert_array_equal(one.probabilities, two.probabilities)
