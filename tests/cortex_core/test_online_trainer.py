"""Learning from replies: what moves, what stays, and how it comes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cortex_core.errors import ConfigError, DimensionError, InputError, WeightsError
from cortex_core.joint_trainer import JointTrainer, TrainingSample
from cortex_core.model import CortexModel
from cortex_core.online.degradation import copy_weights
from cortex_core.online_trainer import OnlineTrainer
from cortex_core.replay_buffer import ReplayBuffer, ReplayEntry
from tests.cortex_core.learner_helpers import DIM, SMALL, entry_of, fresh, near, unit


def entries(count: int, seed: int = 0, model: CortexModel | None = None) -> list[ReplayEntry]:
    rng = np.random.default_rng(seed)
    model = model or CortexModel.create(SMALL, "test")
    memories = unit(rng, 10)
    out = []
    for i in range(count):
        message = unit(rng)
        decision = model.decide(message, None, None, memories, rng=rng)
        out.append(entry_of(decision, message, memories, float(rng.choice([-0.8, 0.8])), f"e{i:03d}"))
    return out


def feed(trainer: OnlineTrainer, buffer: ReplayBuffer, items: list[ReplayEntry]) -> None:
    for item in items:
        buffer.add(item)
        trainer.observe(item)


def test_all_four_components_learn_from_replies() -> None:
    model, trainer, buffer = fresh()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gate_v, selector_mean = model.gate.kernel_weight.clone(), model.selector.mean.clone()
    feed(trainer, buffer, entries(60))
    for part in ("encoder.out.weight", "gate.weight", "selector.out.weight", "estimator.linear.weight"):
        assert not torch.equal(before[part], dict(model.named_parameters())[part]), part
    assert not torch.equal(gate_v, model.gate.kernel_weight)
    assert not torch.equal(selector_mean, model.selector.mean)


def test_it_finds_each_kinds_strategy_through_noise() -> None:
    model, trainer, buffer = fresh()
    rng = np.random.default_rng(2)
    kinds, best = unit(rng, 4), [0, 1, 2, 1]
    right = []
    for step in range(400):
        kind = int(rng.integers(4))
        message = near(rng, kinds[kind])
        decision = model.decide(message, None, None, None, rng=rng)
        good = decision.strategy_index == best[kind]
        right.append(good)
        reward = 0.8 if good != (rng.random() < 0.1) else -0.8
        feed(trainer, buffer, [entry_of(decision, message, None, reward, f"{step:04d}")])
    assert np.mean(right[:12]) < 0.7
    assert np.mean(right[-150:]) > 0.9


def test_it_follows_a_change_and_keeps_the_rest() -> None:
    model, trainer, buffer = fresh()
    rng = np.random.default_rng(4)
    kinds, best = unit(rng, 4), [0, 1, 2, 1]
    right: dict[int, list[bool]] = {0: [], 1: [], 2: [], 3: []}
    for step in range(900):
        if step == 450:
            best[0] = 2
        kind = int(rng.integers(4))
        message = near(rng, kinds[kind])
        decision = model.decide(message, None, None, None, rng=rng)
        good = decision.strategy_index == best[kind]
        right[kind].append(good)
        feed(trainer, buffer, [entry_of(decision, message, None, 0.8 if good else -0.8, f"{step:04d}")])
    assert np.mean(right[0][-30:]) > 0.85
    assert min(np.mean(right[kind][-30:]) for kind in (1, 2, 3)) > 0.9


def test_a_memory_that_precedes_bad_replies_loses_whatever_its_cosine() -> None:
    model, trainer, buffer = fresh()
    rng = np.random.default_rng(6)
    topic = unit(rng)
    memories = np.concatenate([np.stack([near(rng, topic, 0.05) for _ in range(3)]), unit(rng, 9)])
    useful = {7, 8}
    first = model.decide(topic, None, None, memories, top_k=2, explore=False, rng=rng)
    assert set(first.memory_indices) <= {0, 1, 2}
    for step in range(500):
        message = near(rng, topic)
        decision = model.decide(message, None, None, memories, top_k=2, rng=rng)
        reward = 0.8 if useful & set(decision.memory_indices) else -0.8
        feed(trainer, buffer, [entry_of(decision, message, memories, reward, f"{step:04d}")])
    last = model.decide(topic, None, None, memories, top_k=2, explore=False, rng=rng)
    assert useful & set(last.memory_indices)


def test_an_amended_reward_is_no_second_sample() -> None:
    once, trainer_once, buffer_once = fresh()
    twice, trainer_twice, buffer_twice = fresh()
    first = replace(entries(1)[0], reward=0.8)
    amended = replace(first, reward=-0.8, revision=2)
    feed(trainer_once, buffer_once, [amended])
    trainer_once.flush()
    feed(trainer_twice, buffer_twice, [first])
    trainer_twice.flush()
    feed(trainer_twice, buffer_twice, [amended])
    trainer_twice.flush()
    assert trainer_twice.total_interactions == trainer_once.total_interactions == 1
    row = once.registry.id_to_index(first.strategy_id)
    assert first.message_emb is not None
    means = [m.selector.belief(torch.zeros(DIM), first.message_emb).mean[row] for m in (once, twice)]
    assert means[1] == pytest.approx(means[0], abs=0.1)
    assert means[1] < 0.5
    a, b = once.selector.state_dict()["covariance"], twice.selector.state_dict()["covariance"]
    assert torch.allclose(a.float(), b.float(), atol=2e-3)
    _, pending, buffer = fresh()
    feed(pending, buffer, [first, amended, first])
    assert pending.pending == 1


def test_a_reward_that_was_taken_back_leaves_no_opinion() -> None:
    model, trainer, buffer = fresh()
    others = [e for e in entries(40) if e.strategy_id != "a"][:10]
    feed(trainer, buffer, others)
    trainer.flush()
    wrong = replace(entries(41)[40], id="wrong", reward=1.0, reward_confidence=1.0)
    assert wrong.message_emb is not None
    row = model.registry.id_to_index(wrong.strategy_id)

    def opinion() -> float:
        return float(model.selector.belief(torch.zeros(DIM), wrong.message_emb).mean[row])

    before = opinion()
    feed(trainer, buffer, [wrong])
    trainer.flush()
    learned = opinion()
    feed(trainer, buffer, [replace(wrong, reward=0.0, reward_confidence=0.0, revision=2)])
    trainer.flush()
    assert learned - before > 0.1
    assert abs(opinion() - before) < 0.25 * (learned - before)
    assert trainer.total_interactions == len(others) + 1


def test_counts_and_batches_as_specified() -> None:
    _, trainer, buffer = fresh()
    updates = []
    for item in entries(23):
        buffer.add(item)
        updates.append(trainer.observe(item))
    assert [i for i, u in enumerate(updates) if u] == [4, 9, 14, 19]
    last = updates[19]
    assert last is not None
    assert (last.update, last.fresh, last.replayed) == (4, 5, 11)
    assert trainer.ema_loss == last.ema_loss
    assert (trainer.total_updates, trainer.total_interactions, trainer.pending) == (4, 20, 3)
    assert trainer.flush() is not None
    assert trainer.flush() is None


def test_the_specified_arguments_alone_teach() -> None:
    model, trainer, buffer = fresh()
    situation = torch.from_numpy(unit(np.random.default_rng(0)))
    uniform = model.selector.probabilities(situation)[0]
    for _ in range(5):
        outcome = trainer.record_interaction(
            situation_emb=situation,
            memory_indices=[0, 1, 2],
            memory_scores=[0.9, 0.7, 0.5],
            strategy_id="quick_answer",
            confidence=0.85,
            user_response="Thanks, that worked!",
        )
    assert outcome.reward > 0.4
    assert outcome.signals[0].type == "positive"
    assert outcome.update is not None
    assert len(buffer) == 5
    assert model.selector.probabilities(situation)[0] > uniform


def test_unusable_experiences_cost_themselves_alone() -> None:
    _, trainer, buffer = fresh()
    good = entries(1)[0]
    with pytest.raises(InputError, match="unknown strategy"):
        trainer.observe(replace(good, strategy_id="unknown"))
    with pytest.raises(DimensionError, match="situation_emb"):
        trainer.observe(replace(good, situation_emb=np.ones(3, np.float32)))
    assert trainer.pending == 0
    with pytest.raises(ConfigError, match="update_every"):
        fresh(update_every=0)
    del buffer


def test_a_loss_that_is_not_finite_touches_nothing() -> None:
    model, trainer, buffer = fresh()
    feed(trainer, buffer, entries(5))
    trainer._parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    before = copy_weights(trainer._modules)
    buffer.add(entries(6)[5])
    trainer.observe(entries(6)[5])
    update = trainer.flush()
    assert update is not None
    assert update.skipped
    after = copy_weights(trainer._modules)
    assert all(torch.equal(before[k], after[k]) for k in before if "landmarks" not in k)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_degraded_weights_go_back() -> None:
    model, trainer, buffer = fresh()
    rng = np.random.default_rng(7)
    topic = unit(rng)

    def live(steps: int, start: int) -> list[bool]:
        back = []
        for step in range(start, start + steps):
            message = near(rng, topic)
            decision = model.decide(message, None, None, None, rng=rng)
            reward = 0.8 if decision.strategy_index == 1 else -0.8
            item = entry_of(decision, message, None, reward, f"{step:04d}")
            buffer.add(item)
            update = trainer.observe(item)
            back.append(update is not None and update.rolled_back)
        return back

    assert not any(live(300, 0))
    good = model.selector.mean.clone()
    with torch.no_grad():
        model.selector.mean.copy_(-4.0 * good)
        model.selector.covariance.zero_()
    assert any(live(300, 300))
    assert model.decide(topic, None, None, None, explore=False, rng=rng).strategy_index == 1


def test_a_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    items = entries(40)
    model, trainer, buffer = fresh()
    feed(trainer, buffer, items[:20])
    path = tmp_path / "deep" / "checkpoint.safetensors"
    trainer.save_checkpoint(path)
    other, resumed, other_buffer = fresh("another")
    other_buffer.extend(items[:20])
    resumed.load_checkpoint(path)
    assert (resumed.total_updates, resumed.ema_loss) == (trainer.total_updates, trainer.ema_loss)
    a, b = copy_weights(trainer._modules), copy_weights(resumed._modules)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(resumed.optimizer.state) == len(trainer.optimizer.state) > 0
    assert list(path.parent.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(WeightsError):
        resumed.load_checkpoint(path)
    with pytest.raises(WeightsError, match="cannot be read"):
        resumed.load_checkpoint(tmp_path / "missing")
    del model, other


def test_noisy_replies_do_not_undo_joint_training() -> None:
    model, trainer, buffer = fresh()
    rng = np.random.default_rng(9)
    kinds = unit(rng, 3)
    samples = [
        TrainingSample(near(rng, kinds[i % 3]), np.zeros(DIM), {}, np.zeros((0, DIM)), set(),
                       SMALL.strategies[i % 3], 1.0)
        for i in range(90)
    ]  # fmt: skip
    JointTrainer.for_model(model, lr=1e-2).train(samples, epochs=60)

    def accuracy() -> float:
        picks = [
            model.decide(near(rng, kinds[i % 3]), None, None, None, explore=False, rng=rng).strategy_index
            == i % 3
            for i in range(60)
        ]
        return float(np.mean(picks))

    assert accuracy() > 0.95
    for step in range(15):
        message = near(rng, kinds[step % 3])
        decision = model.decide(message, None, None, None, rng=rng)
        reward = -0.8 if step % 3 == 0 else 0.8
        feed(trainer, buffer, [entry_of(decision, message, None, reward, f"{step:03d}")])
    assert accuracy() > 0.95
