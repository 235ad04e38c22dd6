"""The architecture of new models, from the settings; the same for trainers and inference workers."""

from __future__ import annotations

from cortex_core.model import ModelConfig
from cortex_core.strategy_registry import StrategyRegistry
from streams.settings import Settings


def model_config(settings: Settings) -> ModelConfig:
    """The architecture of a model without a version."""
    return ModelConfig(
        text_dim=settings.text_dim, strategies=StrategyRegistry.from_set(settings.strategies).ids
    )
