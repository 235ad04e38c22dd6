"""One model in training: its weights, optimizer, learned experiences, and next version.

Everything here is synchronous and runs in the trainer's one learning thread; it does not use Kafka.

What a restart needs, and where it is kept:

- weights, counters, `consumed`: the manifest and payload of the newest version in the weights log;
- which experiences were learned, and up to which control event: `Resume`, a header of that manifest's
  record. All of this became visible in one transaction, so it cannot disagree with the weights;
- the windows that calibration and gate are fitted on: replay, in the order of `Resume`;
- Adam's moments: a cache in Redis, beside the version they belong to. Where it is missing, or of another
  version, the optimizer starts anew ("warm restart"): nothing is learned twice or lost, the first steps
  are merely taken with fresh moments. The log says which of the two happened.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np
import redis
import structlog
from safetensors import SafetensorError
from safetensors.torch import load, save

from cortex_core.errors import InputError, WeightsError
from cortex_core.model import CortexModel
from cortex_core.online.update import OnlineUpdate
from cortex_core.online_trainer import RECALLED, OnlineTrainer
from cortex_core.replay_buffer import ReplayBuffer, ReplayEntry
from cortex_core.requirements import Requirements
from cortex_core.weights import WeightsSnapshot
from streams.events import ExperienceEvent
from streams.failures import is_systemic
from streams.replay_fit import architecture_key
from streams.replay_store import RedisReplayBuffer
from streams.settings import Settings
from streams.trainer.replay import LearnerReplay
from streams.weights.architecture import build_model, model_config, strategies_changed, strategy_ids

log = structlog.get_logger(__name__)

LEDGER_CAPACITY = 20_000
"""Experiences whose repetition is recognised, the latest ones; 12 bytes each in every version's record."""

_SPAN = 2**32 - 1

Outcome = Literal["learned", "amended", "retracted", "repeated", "no_reply"]


@dataclass(slots=True)
class Resume:
    """What the next owner of a model must know beyond its weights."""

    control_offset: int = -1
    """Offset of the last control event that was carried out; -1 for none."""
    versions: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """Experience (by a 64-bit hash of its id) → highest version learned; the latest last."""

    def version(self, experience_id: str) -> int | None:
        """The highest version learned of this experience; None where none was."""
        return self.versions.get(_hash(experience_id))

    def note(self, experience_id: str, version: int) -> None:
        """This version is learned."""
        key = _hash(experience_id)
        self.versions.pop(key, None)
        self.versions[key] = version
        while len(self.versions) > LEDGER_CAPACITY:
            self.versions.popitem(last=False)

    def to_bytes(self) -> bytes:
        """A line of JSON, then all hashes, then all versions as 32 bits after the lowest.

        Versions are milliseconds: those more than 49 days older than the newest are stored as that old.
        """
        n = len(self.versions)
        lowest = max(min(self.versions.values(), default=0), max(self.versions.values(), default=0) - _SPAN)
        meta = {"control_offset": self.control_offset, "experiences": n, "lowest": lowest}
        keys = np.fromiter(self.versions.keys(), dtype="<u8", count=n)
        versions = np.fromiter((max(v - lowest, 0) for v in self.versions.values()), dtype="<u4", count=n)
        return json.dumps(meta).encode() + b"\n" + keys.tobytes() + versions.tobytes()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Resume:
        """The inverse of `to_bytes`; empty bytes are those of an untrained model.

        Raises:
            WeightsError: it cannot be read.
        """
        if not raw:
            return cls()
        head, _, body = raw.partition(b"\n")
        try:
            meta = json.loads(head)
            n, control_offset, lowest = (int(meta[k]) for k in ("experiences", "control_offset", "lowest"))
            keys = np.frombuffer(body, dtype="<u8", count=n).tolist()
            versions = np.frombuffer(body, dtype="<u4", count=n, offset=8 * n).astype(np.int64) + lowest
        except Exception as error:  # the bytes may be anything
            raise WeightsError(f"a version's resume header cannot be read: {error}") from error
        return cls(control_offset, OrderedDict(zip(keys, versions.tolist(), strict=True)))

    @staticmethod
    def control_offset_in(raw: bytes) -> int:
        """`control_offset` alone; -1 where it cannot be read."""
        try:
            return int(json.loads(raw.partition(b"\n")[0])["control_offset"])
        except Exception:
            return -1


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def optimizer_key(settings: Settings, model_id: str) -> str:
    """The key in Redis of a model's optimizer states."""
    return f"{settings.topic_prefix}:trainer:{{{model_id}}}:optimizer"


def warm_up(settings: Settings) -> None:
    """Takes one training step and discards it: torch loads modules for seconds at its first step."""
    model = CortexModel.create(model_config(settings))
    trainer = OnlineTrainer.for_model(model, buffer=ReplayBuffer(1))
    situation = np.zeros(model.config.situation_dim, dtype=np.float32)
    trainer.observe(ReplayEntry(situation, [], [], model.config.strategies[0], 0.5, 1.0, id="warm-up"))
    trainer.flush()
    WeightsSnapshot.of(model, model_id="warm-up", version=1).to_model()


class MisfitError(InputError):
    """An experience does not fit its model, and none of its versions does."""


class ModelLearner:
    """Learns one model from its experiences, in the order of their offsets.

    learner = ModelLearner.open(settings, "support-bot", newest, resume, buffer=..., cache=...)
    learner.learn(event, version, offset)
    snapshot, resume = learner.next_version({"cortex.experiences-0": offset + 1})
    ...published...
    learner.published(snapshot)
    """

    def __init__(
        self,
        settings: Settings,
        model_id: str,
        model: CortexModel,
        *,
        resume: Resume,
        buffer: RedisReplayBuffer,
        base: WeightsSnapshot | None,
    ) -> None:
        self.settings = settings
        self.model_id = model_id
        self.version = base.manifest.version if base else 0
        """The last version published."""
        self.interactions = base.manifest.interactions if base else 0
        """Number of distinct experiences learned since initialisation."""
        self.consumed = dict(base.manifest.consumed) if base else {}
        self.first_unpublished: int | None = None
        """Offset of the first experience that no version has learned from; None where all is published."""
        self.reason: Literal["train", "rollback", "seed"] = "train"
        self._oldest_reply_at: datetime | None = None
        self.resume = resume
        self._model = model
        self.encoder = base.manifest.encoder if base else ""
        """Name of the text encoder: that of the first experience learned that names one."""
        self.replay = LearnerReplay(buffer, self._requirements())
        self._trainer = (
            self._train(base.manifest.updates, base.manifest.ema_loss) if base else self._train(0, None)
        )

    @classmethod
    def open(
        cls,
        settings: Settings,
        model_id: str,
        newest: WeightsSnapshot | None,
        resume: bytes,
        *,
        buffer: RedisReplayBuffer,
        cache: redis.Redis,
    ) -> ModelLearner:
        """Continues from the newest version, or initialises a model that has none.

        Raises:
            WeightsError: the version cannot be used.
            redis.RedisError: the store does not answer.
        """
        if newest is None:
            model = CortexModel.create(model_config(settings), model_id)
        else:
            model = build_model(newest).with_strategies(strategy_ids(settings))
            if why := strategies_changed(settings, newest.manifest.architecture):
                log.warning("strategies changed", model_id=model_id, what=why)
        try:
            known = Resume.from_bytes(resume)
        except WeightsError as error:
            log.error(
                "resume header unusable: experiences may be learned again",
                model_id=model_id,
                error=str(error),
            )
            known = Resume()
        learner = cls(settings, model_id, model, resume=known, buffer=buffer, base=newest)
        cache.set(*learner._architecture)
        if newest is not None:
            exact = learner._load_optimizer(cache)
            learner._recall()
            log.info("model continues", model_id=model_id, version=learner.version, warm_restart=not exact)
        return learner

    @property
    def ema_loss(self) -> float | None:
        """Exponential moving average of the training loss; None before the first step."""
        return self._trainer.ema_loss

    @property
    def updates(self) -> int:
        """Gradient steps since initialisation."""
        return self._trainer.total_updates

    def learn(self, event: ExperienceEvent, version: int, offset: int) -> tuple[Outcome, OnlineUpdate | None]:
        """Takes one experience; trains when enough are pending.

        Silence (`no_reply`) teaches nothing: it is no reward of 0, and is only counted. A version that is not
        higher than the one learned changes nothing. A higher one amends the reward and is no second sample;
        where nobody has answered any more, it takes the reward back (`Posteriors.condition` says how far).

        Args:
            version: of the experience's record (`streams.events.version_of`).

        Raises:
            MisfitError: its arrays or its strategy do not fit this model; nothing has changed.
            redis.RedisError: the store does not answer; this object is to be thrown away.
        """
        known = self.resume.version(event.interaction.interaction_id)
        if known is not None and version <= known:
            return "repeated", None
        try:
            entry = replace(event.to_entry(), revision=version)
            self.replay.requirements.check_entry(entry)
        except InputError as error:
            raise MisfitError(str(error)) from error
        if known is None and not event.revision:
            return "no_reply", None
        update = self._trainer.observe(entry)
        if entry.encoder and not self.encoder:
            self.encoder = entry.encoder
            self.replay.requirements = self._requirements()
        self.resume.note(event.interaction.interaction_id, version)
        self.interactions += known is None
        if self.first_unpublished is None:
            self.first_unpublished = offset
        if event.replied_at is not None:
            self._oldest_reply_at = min(self._oldest_reply_at or event.replied_at, event.replied_at)
        self._note(update)
        if known is None:
            return "learned", update
        return ("amended" if event.revision else "retracted"), update

    def flush(self) -> OnlineUpdate | None:
        """One step on what is pending, so that no reply waits for others to come."""
        update = self._trainer.flush()
        self._note(update)
        return update

    def next_version(self, consumed: dict[str, int], above: int = 0) -> tuple[WeightsSnapshot, bytes]:
        """What to publish next, with its `Resume`. Trains on what is pending first.

        Args:
            above: the highest version of the model in the log; higher than `version` if that one was refused.

        Raises:
            WeightsError: a weight is not finite; it must not leave.
        """
        self.flush()
        snapshot = WeightsSnapshot.of(
            self._model,
            model_id=self.model_id,
            version=max(self.version, above) + 1,
            parent=self.version or None,
            updates=self.updates,
            interactions=self.interactions,
            ema_loss=self.ema_loss,
            consumed={**self.consumed, **consumed},
            oldest_reply_at=self._oldest_reply_at,
            reason=self.reason,
            encoder=self.encoder,
        )
        return snapshot, self.resume.to_bytes()

    def published(self, snapshot: WeightsSnapshot) -> None:
        """Records that this version was published."""
        self.version = snapshot.manifest.version
        self.consumed = dict(snapshot.manifest.consumed)
        self.first_unpublished = self._oldest_reply_at = None
        self.reason = "train"

    def roll_back(self, to: WeightsSnapshot, control_offset: int) -> None:
        """Takes an older version's weights; the optimizer starts anew. What was learned stays counted."""
        updates = self.updates
        self._model = to.to_model().with_strategies(strategy_ids(self.settings))
        self.encoder = to.manifest.encoder or self.encoder
        self.replay.requirements = self._requirements()
        self._trainer = self._train(updates, to.manifest.ema_loss)
        self._recall()
        self.resume.control_offset = control_offset
        self.reason = "rollback"

    def save_optimizer(self, cache: redis.Redis, version: int) -> None:
        """Keeps Adam's moments beside the version they belong to, and those of the version before it.

        Whether or not that version gets published, the newest in the log then has its moments here.
        """
        state = self._trainer.state_dict()
        tensors = {k: v.contiguous() for k, v in state["tensors"].items() if not k.startswith("model.")}
        blob = save(tensors, metadata={"meta": json.dumps(state["meta"])}) if tensors else b""
        key = self._cache_key
        pipe = cache.pipeline(transaction=True)
        pipe.set(*self._architecture)
        pipe.hset(key, str(version), blob)
        pipe.hkeys(key)
        stale = [k for k in pipe.execute()[-1] if not version - 1 <= int(k) <= version]
        if stale:
            cache.hdel(key, *stale)

    @property
    def _architecture(self) -> tuple[str, str]:
        """Key and value of what joiners check experiences against; written again in case Redis lost it."""
        key = architecture_key(self.settings.topic_prefix, self.model_id)
        return key, json.dumps(self._facts)

    @property
    def _facts(self) -> dict[str, Any]:
        return {**self._model.config.to_dict(), "encoder": self.encoder}

    def _requirements(self) -> Requirements:
        return Requirements.of(self._facts)

    @property
    def _cache_key(self) -> str:
        return optimizer_key(self.settings, self.model_id)

    def _load_optimizer(self, cache: redis.Redis) -> bool:
        try:
            blob: Any = cache.hget(self._cache_key, str(self.version))
            if not blob:
                return False
            tensors = load(blob)
            header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
            meta = json.loads(header["__metadata__"]["meta"])
            weights = self._trainer.state_dict()["tensors"]
            own = {k: v for k, v in weights.items() if k.startswith("model.")}
            self._trainer.load_state_dict({"tensors": {**tensors, **own}, "meta": meta})
        except (SafetensorError, WeightsError, redis.ResponseError, ValueError, KeyError, TypeError) as error:
            if is_systemic(error):
                raise
            log.warning("cached optimizer unusable", model_id=self.model_id, error=str(error))
            return False
        return True

    def _train(self, updates: int, ema_loss: float | None) -> OnlineTrainer:
        trainer = OnlineTrainer.for_model(
            self._model,
            buffer=self.replay,
            lr=self.settings.lr,
            update_every=self.settings.update_every,
            batch_size=self.settings.batch_size,
        )
        state = trainer.state_dict()
        state["meta"] |= {"updates": updates, "interactions": self.interactions, "ema_loss": ema_loss}
        trainer.load_state_dict(state)
        return trainer

    def _recall(self) -> None:
        """Refills the trainer's windows with the latest learned experiences that replay has.

        `resume` has their order and versions, so that the result depends on no time and no chance. Takes
        0.7 ms for each.
        """
        versions = self.resume.versions
        in_replay = {key: i for i in self.replay.store.ids() if (key := _hash(i)) in versions}
        latest = [key for key in versions if key in in_replay][-RECALLED:]
        learned = {in_replay[key]: versions[key] for key in latest}
        self._trainer.recall(self.replay.get_learned(learned))

    def _note(self, update: OnlineUpdate | None) -> None:
        if update is not None and update.rolled_back:
            self.reason = "rollback"
            log.warning(
                "learning had degraded and went back to its last good weights",
                model_id=self.model_id,
                version=self.version,
                ema_loss=update.ema_loss,
            )
        if update is not None and update.skipped:
            log.error("a step was not finite and was not taken", model_id=self.model_id, loss=update.loss)
