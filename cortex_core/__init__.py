"""The learner: selects memories and a strategy, predicts confidence, and trains on users' replies.

Names load on first use, so that `import cortex_core` is fast and does not load torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "CalibrationLoss": "confidence_estimator",
    "ConfidenceEstimator": "confidence_estimator",
    "ContextSummary": "confidence_estimator",
    "CortexModel": "model",
    "FeedbackCollector": "feedback_collector",
    "FeedbackSignal": "feedback_collector",
    "JointTrainer": "joint_trainer",
    "MemoryBank": "memory_bank",
    "MemoryGate": "memory_gate",
    "ModelConfig": "model",
    "ModelDecision": "model",
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

__all__ = sorted(_MODULES)  # noqa: PLE0605 - one table of names and their modules


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(
            f"module 'cortex_core' has no attribute {name!r}; it has {', '.join(sorted(_MODULES))}"
        )
    return getattr(importlib.import_module(f"cortex_core.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
