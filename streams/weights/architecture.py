"""The architecture of new models, from the settings; the same for trainers and inference workers.

`CORTEX_STRATEGIES` may change while models live: a model grows by the strategies that it lacks, and keeps
those that are no longer in the set. Workers choose among the set alone; what was learned of the others stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cortex_core.model import ModelConfig
from cortex_core.strategy_registry import StrategyRegistry
from streams.settings import Settings


def strategy_ids(settings: Settings) -> tuple[str, ...]:
    """The strategies to choose among."""
    return StrategyRegistry.from_set(settings.strategies).ids


def strategies_changed(settings: Settings, architecture: Mapping[str, Any]) -> str:
    """How a model's strategies differ from the configured ones, and what to do; empty if they do not."""
    learned, chosen = architecture.get("strategies") or (), strategy_ids(settings)
    new = [id_ for id_ in chosen if id_ not in learned]
    old = [id_ for id_ in learned if id_ not in chosen]
    parts = [f"untrained: {', '.join(new)}"] if new else []
    parts += [f"no longer chosen: {', '.join(old)}"] if old else []
    if not parts:
        return ""
    return (
        f"CORTEX_STRATEGIES={settings.strategies}: {'; '.join(parts)}. The others keep what they learned. "
        "To choose among the former ones again, set CORTEX_STRATEGIES back and restart all workers"
    )


def model_config(settings: Settings) -> ModelConfig:
    """The architecture of a model without a version."""
    return ModelConfig(text_dim=settings.text_dim, strategies=strategy_ids(settings))
