"""The architecture of models: of new ones from the settings, the same for trainers and inference workers.

`CORTEX_STRATEGIES` may change while models live: a model grows by the strategies that it lacks, and keeps
those that are no longer in the set. Workers choose among the set alone; what was learned of the others stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cortex_core.errors import CortexError
from cortex_core.model import CortexModel, ModelConfig
from cortex_core.strategy_registry import StrategyRegistry
from cortex_core.weights import WeightsSnapshot
from streams.settings import Settings
from streams.weights.records import UnusableError


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


def build_model(snapshot: WeightsSnapshot) -> CortexModel:
    """The model of a version.

    Raises:
        UnusableError: damaged, forged, not finite, or of an architecture that does not fit the weights.
    """
    try:
        return snapshot.to_model()
    except CortexError as error:
        raise UnusableError(str(error)) from error
    except Exception as error:  # an invalid architecture can fail anywhere in torch
        raise UnusableError(
            f"weights {snapshot.manifest.model_id} v{snapshot.manifest.version}: no model can be built from "
            f"their architecture ({type(error).__name__}: {error})"
        ) from error
