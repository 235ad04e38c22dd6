"""The learner: which memories, which strategy, how confident; taught by users' replies alone.

Names are loaded on first use, so that `import cortex_core` is instant and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "CalibrationLoss": "confidence_estimator",
    "ConfidenceEstimator": "confidence_estimator",
    "ContextSummary": "confidence_estimator",
    "CortexModel": "model",
    "Decision": "model",
    "FeedbackCollector": "feedback_collector",
    "FeedbackSignal": "feedback_collector",
    "JointTrainer": "joint_trainer",
    "MemoryBank": "memory_bank",
    "MemoryGate": "memory_gate",
    "ModelConfig": "model",
    "OnlineTrainer": "online_trainer",
    "ReplayBuffer": "replay_buffer",
    "ReplayEntry": "replay_buffer",
    "SituationEncoder": "situation_encoder",
    "StrategyProfile": "strategy_registry",
    "StrategyRegistry": "strategy_registry",
    "StrategySelector": "strategy_selector",
    "TextEncoder": "text_encoder",
    "TrainingSample": "joint_trainer",
    "WeightsSnapshot": "weights",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 - a table, so that a name and its home stand together


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'cortex_core' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}"
        )
    return getattr(importlib.import_module(f"cortex_core.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
