"""CortexModel: the four components and the decisions that they make together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cortex_core.arrays import FloatArray, as_float32
from cortex_core.confidence_estimator import Action, ConfidenceEstimator, ContextSummary, action_for
from cortex_core.errors import ConfigError, DimensionError, WeightsError
from cortex_core.memory_gate import MemoryGate, Slate
from cortex_core.metadata import METADATA_KEYS
from cortex_core.situation_encoder import SituationEncoder
from cortex_core.strategy_registry import StrategyRegistry
from cortex_core.strategy_selector import Belief, StrategySelector

SIZES = {
    "text_dim": ("selector.landmarks.points", 1),
    "situation_dim": ("encoder.out.bias", 0),
    "encoder_hidden_dim": ("encoder.hidden.bias", 0),
    "selector_hidden_dim": ("selector.hidden.bias", 0),
    "estimator_hidden_dim": ("estimator.hidden.bias", 0),
    "landmarks": ("selector.landmarks.points", 0),
    "memory_landmarks": ("gate.landmarks.points", 0),
}
"""Field of `ModelConfig` → the tensor and axis that has this size."""
TRIALS = 4
"""Trial decisions before a model serves, 2 ms each."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that determines the shapes: `architecture` in the weights manifest."""

    text_dim: int = 384
    situation_dim: int = 384
    encoder_hidden_dim: int = 64
    selector_hidden_dim: int = 64
    estimator_hidden_dim: int = 32
    dropout: float = 0.1
    landmarks: int = 384
    """number of messages that the selector's posterior can distinguish"""
    memory_landmarks: int = 256
    """number of memories that the gate's kernel part can distinguish"""
    strategies: tuple[str, ...] = field(default_factory=lambda: StrategyRegistry().ids)

    def __post_init__(self) -> None:
        if not self.strategies or len(set(self.strategies)) != len(self.strategies):
            raise ConfigError(
                f"ModelConfig.strategies expects at least one id, all distinct; got {self.strategies}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "strategies": list(self.strategies)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: unknown or invalid fields. A newer architecture cannot be loaded partially.
        """
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"the architecture has fields {sorted(unknown)}, unknown to this version")
        try:
            return cls(**{**data, "strategies": tuple(data.get("strategies") or StrategyRegistry().ids)})
        except TypeError as error:
            raise ConfigError(f"invalid architecture: {error}") from error


@dataclass(frozen=True, slots=True)
class ModelDecision:
    """A decision of the model, as an InteractionEvent logs it."""

    situation: FloatArray
    """(S,)"""
    strategy_index: int
    strategy_id: str
    probabilities: FloatArray
    """(A,) probability of choosing each strategy; sums to 1; 0 for those that were not to choose among"""
    propensity: float
    """probability of the chosen strategy"""
    memory_indices: list[int]
    """(K,) rows of the candidate memories, in slot order"""
    memory_scores: list[float]
    """(K,)"""
    memory_propensities: list[float]
    """(K,) probability of each retrieved memory in its slot, given the slots before it"""
    context: list[float]
    """(7,)"""
    confidence: float
    """[0, 1]"""
    action: Action


class CortexModel(nn.Module):
    """The SituationEncoder, MemoryGate, StrategySelector and ConfidenceEstimator of one model_id.

    model = CortexModel.create(ModelConfig(), "support-bot")
    decision = model.decide(message, history, metadata, memories, rng=np.random.default_rng())
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.encoder = SituationEncoder(
            config.text_dim, config.situation_dim, config.encoder_hidden_dim, config.dropout
        )
        self.gate = MemoryGate(
            config.situation_dim,
            config.text_dim,
            features=config.landmarks,
            landmarks=config.memory_landmarks,
            strategies=len(config.strategies),
        )
        self.selector = StrategySelector(
            config.situation_dim,
            len(config.strategies),
            config.selector_hidden_dim,
            text_dim=config.text_dim,
            landmarks=config.landmarks,
        )
        self.estimator = ConfidenceEstimator(
            config.situation_dim, config.estimator_hidden_dim, config.dropout
        )
        self.registry = StrategyRegistry.from_ids(config.strategies)
        self._frozen = False

    @classmethod
    def create(cls, config: ModelConfig | None = None, model_id: str = "default") -> CortexModel:
        """A new, untrained model. The same id and config give the same weights in every process."""
        model = cls(config)
        seed = int.from_bytes(hashlib.sha256(model_id.encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(seed)
        model.encoder.reset_parameters(generator)
        model.selector.reset_parameters(generator)
        model.estimator.reset_parameters(generator)
        if model.encoder.projection.numel():
            # Memories have D dimensions: with W = P the untrained score is a cosine there as well.
            model.gate.reset_parameters(model.encoder.projection)
        return model.eval()

    def with_strategies(self, ids: Iterable[str]) -> CortexModel:
        """This model, or a new one that also has those of these strategies that this one has not.

        The known ones keep their rows and what was learned; new ones start untrained. The same model and ids
        give the same weights in every process.
        """
        new = [id_ for id_ in dict.fromkeys(ids) if id_ not in self.registry]
        if not new:
            return self
        grown = CortexModel(replace(self.config, strategies=(*self.config.strategies, *new)))
        grown.encoder.load_state_dict(self.encoder.state_dict())
        grown.estimator.load_state_dict(self.estimator.state_dict())
        grown.selector.copy_strategies(self.selector)
        grown.gate.copy_strategies(self.gate)
        return grown.eval()

    def freeze(self) -> CortexModel:
        """Prepares the model for serving and makes it immutable; returns it.

        Computes everything that decisions derive from the weights, so that the first decision is as fast as
        the others and threads may decide concurrently. Then makes trial decisions on random texts.

        Raises:
            WeightsError: a trial decision failed, e.g. because weights are finite but too large.
        """
        self.eval()
        self.requires_grad_(False)
        try:
            with np.errstate(all="ignore"):
                self.selector.freeze()
                self.gate.landmarks.freeze()
                trials = [self._trial(np.random.default_rng(seed)) for seed in range(TRIALS)]
        except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
            raise WeightsError(f"a trial decision failed ({type(error).__name__}: {error})") from error
        for trial in trials:
            numbers = [*trial.situation, *trial.memory_scores, *trial.context, trial.confidence]
            chances = np.array([*trial.probabilities, *trial.memory_propensities, trial.confidence])
            if not (np.isfinite(numbers).all() and (chances >= 0.0).all() and (chances <= 1.0).all()):
                raise WeightsError("a trial decision gave NaN, infinity or a probability outside [0, 1]")
        self._frozen = True
        return self

    def _trial(self, rng: np.random.Generator) -> ModelDecision:
        texts = rng.normal(size=(18, self.config.text_dim)).astype(np.float32)
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
        return self.decide(texts[0], texts[1], None, texts[2:], rng=rng)

    @property
    def frozen(self) -> bool:
        """Whether the model is immutable: it can decide, but not be trained."""
        return self._frozen

    def train(self, mode: bool = True) -> CortexModel:
        """Like `nn.Module.train`; raises `RuntimeError` for a frozen model."""
        if mode and self._frozen:
            raise RuntimeError("the model is frozen: to train, create a new model from its snapshot")
        return super().train(mode)

    @torch.no_grad()
    def decide(
        self,
        message_emb: FloatArray,
        history_emb: FloatArray | None,
        metadata: FloatArray | None,
        memory_embs: FloatArray | None,
        *,
        top_k: int = 3,
        explore: bool = True,
        strategies: Collection[str] | None = None,
        rng: np.random.Generator,
    ) -> ModelDecision:
        """Selects strategy and memories for one request; takes under 2 ms for 200 memories.

        Thread-safe for a frozen model; otherwise one thread may call it while others train other instances.

        Args:
            message_emb: (D,).
            history_emb: (D,), or None without history.
            metadata: (F,) from `metadata_features`, or None.
            memory_embs: (N, D) candidates; None means N = 0.
            top_k: K, number of memories to retrieve.
            explore: False always selects the highest estimates, so that the others are never tried.
            strategies: ids of the strategies to choose among; None means all.
            rng: source of randomness.

        Raises:
            ConfigError: none of `strategies` is known.
            DimensionError, NonFiniteError: an invalid array.
        """
        config = self.config
        message = self._checked(message_emb, "message_emb", (config.text_dim,))
        history = self._checked(history_emb, "history_emb", (config.text_dim,))
        features = self._checked(metadata, "metadata", (len(METADATA_KEYS),))
        memories = as_float32(
            np.zeros((0, config.text_dim)) if memory_embs is None else memory_embs, "memory_embs", 2
        )
        if memories.shape[1] != config.text_dim:
            raise DimensionError("memory_embs", memories.shape, f"(N, {config.text_dim})")
        if self.training:
            self.eval()

        situation = self.encoder(message, history, features)
        phi = self.selector.features(message.numpy()[None])[0]
        selection = self.selector.select(
            situation, self.registry, explore, phi=phi, allowed=strategies, rng=rng
        )
        slate = self.gate.draw_slate(
            situation, torch.from_numpy(memories), top_k, explore=explore, rng=rng, phi=phi
        )
        context = summarize(selection.belief, selection.index, slate)
        confidence = float(self.estimator(situation, context))
        return ModelDecision(
            situation=situation.numpy(),
            strategy_index=selection.index,
            strategy_id=selection.strategy_id,
            probabilities=selection.probabilities,
            propensity=selection.propensity,
            memory_indices=slate.indices,
            memory_scores=slate.scores,
            memory_propensities=slate.propensities,
            context=context.to_tensor().tolist(),
            confidence=confidence,
            action=action_for(confidence),
        )

    def _checked(self, value: FloatArray | None, what: str, shape: tuple[int, ...]) -> Tensor:
        array = as_float32(np.zeros(shape) if value is None else value, what, len(shape))
        if array.shape != shape:
            raise DimensionError(what, array.shape, shape)
        return torch.from_numpy(array)


def summarize(belief: Belief, index: int, slate: Slate) -> ContextSummary:
    """The context summary of a decision for strategy `index` and a slate."""
    chosen = float(belief.mean[index])
    allowed = belief.probabilities > 0.0
    allowed[index] = False
    others = float(belief.mean[allowed].max()) if allowed.any() else chosen
    scores, unselected = slate.scores, slate.best_unselected
    return ContextSummary(
        satisfaction_logit=math.log(chosen / (1.0 - chosen)),
        strategy_margin=chosen - others,
        strategy_uncertainty=float(belief.deviation[index]),
        memory_logit=slate.logit,
        top_memory_score=max(scores, default=0.0),
        memory_margin=min(scores) - unselected if scores and unselected is not None else 0.0,
        memory_count=len(scores) / (len(scores) + 3.0),
    )
