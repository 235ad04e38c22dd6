"""Duration of a decision, an online step and a snapshot, with default dimensions on one core.

    python -m benchmarks.decision_speed

Prints milliseconds: median, 10th and 90th percentile. Run it on an idle machine; on a busy one the 10th
percentile is the best estimate.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before importing numpy, whose BLAS reads it once

import numpy as np
import torch

from cortex_core.model import CortexModel
from cortex_core.online_trainer import OnlineTrainer
from cortex_core.replay_buffer import ReplayBuffer, ReplayEntry
from cortex_core.weights import WeightsSnapshot


def measure(memories: int, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each operation, measured with all landmarks in use."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    model = CortexModel.create(model_id="speed")
    buffer = ReplayBuffer(rng=seed)
    trainer = OnlineTrainer.for_model(model, buffer=buffer)
    dim = model.config.text_dim
    bank = rng.normal(size=(memories, dim)).astype(np.float32)
    times: dict[str, list[float]] = {"decide": [], "online step": [], "snapshot": []}
    warm_up = 2 * model.config.landmarks
    for i in range(warm_up + steps):
        message = rng.normal(size=dim).astype(np.float32)
        began = time.perf_counter()
        decision = model.decide(message, None, None, bank, rng=rng)
        decided = time.perf_counter() - began
        entry = ReplayEntry(
            situation_emb=decision.situation,
            memory_indices=list(range(len(decision.memory_indices))),
            memory_scores=decision.memory_scores,
            strategy_id=decision.strategy_id,
            confidence=decision.confidence,
            reward=float(rng.choice([-0.8, 0.8])),
            id=str(i),
            message_emb=message,
            memory_embs=bank[decision.memory_indices],
            propensity=decision.propensity,
            context=decision.context,
        )
        buffer.add(entry)
        began = time.perf_counter()
        update = trainer.observe(entry)
        stepped = time.perf_counter() - began
        if i < warm_up:
            continue
        times["decide"].append(decided)
        if update is not None:
            times["online step"].append(stepped)
            began = time.perf_counter()
            WeightsSnapshot.of(model, model_id="speed", version=1)
            times["snapshot"].append(time.perf_counter() - began)
    out = {}
    for name, values in times.items():
        low, median, high = (float(x) for x in 1e3 * np.quantile(values, [0.1, 0.5, 0.9]))
        out[name] = {"p10_ms": round(low, 3), "median_ms": round(median, 3), "p90_ms": round(high, 3)}
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decision_speed")
    parser.add_argument("--memories", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000, help="number of measured decisions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    figures = measure(args.memories, args.steps, args.seed)
    if args.json:
        print(json.dumps(figures))
        return 0
    for name, values in figures.items():
        print(f"{name:<12} " + "  ".join(f"{k.removesuffix('_ms')} {v:.2f} ms" for k, v in values.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
