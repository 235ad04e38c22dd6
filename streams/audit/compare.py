"""What is lost, doubled or wrong: replay and the experiences topic against the join by brute force. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from streams.audit.evidence import Evidence, Experience, Interaction, Key, Reply
from streams.audit.join import Assigned, Joined, join
from streams.audit.report import Report
from streams.audit.versions import check_versions

MOST_REPLIES = 256
"""Replies that one interaction takes."""

REWARD: dict[str, Callable[[Sequence[float]], float]] = {
    "first": lambda rewards: rewards[0],
    "last": lambda rewards: rewards[-1],
    "mean": lambda rewards: math.fsum(rewards) / len(rewards),
    "min": min,
    "max": max,
    "sum": math.fsum,
}


def audit(evidence: Evidence, since: float = 0.0) -> Report:
    """Judges the evidence.

    Args:
        since: interactions that occurred before this (Unix seconds) are not judged.
    """
    report = Report()
    check_versions(evidence.versions, report)
    joined = join(evidence)
    _Comparison(evidence, joined, since, report).run()
    for what in evidence.unreadable:
        report.find("lost", "", what, "it is no event, and does not stand in the dead letters")
    for what in evidence.damaged:
        report.find("wrong", "", what, "it contradicts itself")
    report.counts.update(
        refused=evidence.refused,
        uncommitted=evidence.uncommitted,
        republished=sum(p.records - 1 for p in evidence.published.values()),
    )
    return report


class _Comparison:
    def __init__(self, evidence: Evidence, joined: Joined, since: float, report: Report) -> None:
        self.evidence = evidence
        self.joined = joined
        self.since = since
        self.report = report
        self.replies = {(a.reply.conversation_id, a.reply.id): a for a in joined.replies}
        self.required: dict[Key, list[Assigned]] = defaultdict(list)
        self.allowed: dict[Key, list[Assigned]] = defaultdict(list)
        for assigned in joined.replies:
            for candidate in assigned.candidates:
                self.allowed[candidate.key].append(assigned)
            if assigned.certain:
                self.required[assigned.candidates[0].key].append(assigned)
        self.stands: dict[tuple[str, str], set[Key]] = defaultdict(set)
        """Reply → the interactions whose experience holds it."""

    def run(self) -> None:
        for interaction in self.joined.interactions:
            self._interaction(interaction)
        known = {i.key for i in self.joined.interactions}
        for where, keys in (
            ("replay", self.evidence.stored),
            ("the experiences topic", self.evidence.published),
        ):
            for key in keys:
                if key not in known and not self.evidence.horizon:
                    self.report.find("wrong", *key, f"it stands in {where}, and its interaction in no topic")
        for model_id, _ in self.evidence.stored:
            model = self.report.models.setdefault(model_id, {})
            model["entries"] = model.get("entries", 0) + 1
        self._replies()
        self.report.counts["acknowledged"] = len(self.joined.interactions) + len(self.joined.replies)
        self.report.counts["repeated"] = self.joined.duplicates

    def _interaction(self, it: Interaction) -> None:
        counts, evidence = self.report.counts, self.evidence
        if it.key in self.joined.reused:
            counts["reused"] += 1
            return
        if it.at < self.since or (evidence.horizon and it.arrived < evidence.horizon + evidence.window_s):
            counts["beyond"] += 1
            return
        due = it.is_done and max(it.at + evidence.window_s, it.arrived) + evidence.grace_s <= evidence.started
        must = bool(self.required[it.key]) or due
        stored, published = evidence.stored.get(it.key), evidence.published.get(it.key)
        may_be_gone = self.joined.rank[it.key] >= evidence.capacity
        if stored is not None:
            self._experience(it, stored, "replay")
        elif must and not may_be_gone:
            self._lost(it, "replay")
        said = published.newest if published and must else None
        if said is not None:
            self._experience(
                it, said, "the experiences topic", amendable=stored is not None or not may_be_gone
            )
        elif must:
            self._lost(it, "the experiences topic")
        if stored is not None and said is not None:
            self._agree(it, stored, said)
        if published is not None and published.contradicts:
            what = f"the experiences topic has two contents of version {published.newest.version}"
            self.report.find("wrong", *it.key, what)
        final = stored or said
        if final is None:
            counts["open"] += 1
            return
        counts["experiences"] += 1
        counts["amended"] += len(final.reply_ids) > 1
        counts["expired"] += not final.reply_ids
        about = {a.reply.id for a in self.allowed[it.key]}
        for reply_id in about.intersection(final.reply_ids):
            self.stands[it.conversation_id, reply_id].add(it.key)
        counts["moved"] += len(published.reply_ids - set(final.reply_ids)) if published else 0

    def _agree(self, it: Interaction, stored: Experience, said: Experience) -> None:
        """Replay against the topic."""
        differ = set(stored.reply_ids) ^ set(said.reply_ids)
        under_way = [a for a in self.allowed[it.key] if a.reply.id in differ and not a.settled]
        if differ and not under_way:
            ids = ", ".join(sorted(differ)[:5])
            self.report.find("wrong", *it.key, f"replay and the experiences topic disagree about {ids}")
        elif not differ and not math.isclose(stored.reward, said.reward, abs_tol=1e-6):
            what = f"the reward is {stored.reward} in replay, {said.reward} in the experiences topic"
            self.report.find("wrong", *it.key, what)

    def _lost(self, it: Interaction, where: str) -> None:
        names = ", ".join(a.reply.id for a in self.required[it.key][:5])
        why = f"answered by {names}" if names else "its window has closed"
        self.report.find("lost", *it.key, f"{why}, and {where} has no experience of it")

    def _experience(self, it: Interaction, got: Experience, where: str, amendable: bool = True) -> None:
        """One experience against the events that it must be made of.

        Args:
            amendable: False where replay has let it go: a reply that left it could not be taken out.
        """

        def wrong(what: str) -> None:
            self.report.find("wrong", *it.key, f"{where}: {what}")

        ids = set(got.reply_ids)
        for reply_id in sorted(ids):
            if got.reply_ids.count(reply_id) > 1:
                self.report.find("doubled", it.model_id, reply_id, f"{where}: twice in {it.id}")
        allowed = {a.reply.id: a.reply for a in self.allowed[it.key]}
        foreign = sorted(ids - allowed.keys())
        if foreign and amendable and not self.evidence.horizon:
            wrong(f"it holds {', '.join(foreign[:5])}, which are not about it")
        missing = sorted({a.reply.id for a in self.required[it.key]} - ids)
        if len(ids) >= MOST_REPLIES:
            self.report.counts["excess"] += len(missing)
            missing = []
        for reply_id in missing:
            self.report.find("lost", it.model_id, reply_id, f"{where}: it is about {it.id}, which lacks it")
        if got.digest != it.digest:
            wrong("what the model saw is not what was sent")
        if got.outcome != ("reply" if got.reply_ids else "no_reply"):
            wrong(f"the outcome is {got.outcome} with {len(got.reply_ids)} replies")
        if not foreign:
            self._order_and_reward([allowed[reply_id] for reply_id in got.reply_ids], got, wrong)

    def _order_and_reward(
        self, replies: Sequence[Reply], got: Experience, wrong: Callable[[str], None]
    ) -> None:
        if [r.id for r in replies] != [r.id for r in sorted(replies, key=lambda r: r.order)]:
            wrong(f"its replies are not in the order of time: {', '.join(got.reply_ids[:5])}")
        if len(got.rewards) != len(replies):
            wrong(f"it has {len(got.rewards)} readings of {len(replies)} replies")
            return
        for reply, reward in zip(replies, got.rewards, strict=True):
            if reply.rating is not None and not math.isclose(reply.rating, reward, abs_tol=1e-6):
                wrong(f"{reply.id} rated {reply.rating}, and was read as {reward}")
        ratings = [r.rating for r in replies if r.rating is not None]
        if len(ratings) < len(replies):
            return  # what a text says is for its reader to know
        wanted = min(max(REWARD[got.aggregation](ratings), -1.0), 1.0) if ratings else 0.0
        if not math.isclose(wanted, got.reward, abs_tol=1e-6):
            wrong(f"the reward is {got.reward}, its ratings make {wanted}")

    def _replies(self) -> None:
        counts = self.report.counts
        for name, assigned in self.replies.items():
            stands = self.stands.get(name, set())
            counts["joined"] += bool(stands)
            counts["late"] += assigned.late
            if len(stands) > 1:
                where = ", ".join(sorted(interaction_id for _, interaction_id in stands))
                model_id = min(stands)[0]
                self.report.find("doubled", model_id, assigned.reply.id, f"it stands in {where}")
            if not assigned.candidates and assigned.reply.is_done:
                counts["orphaned" if assigned.settled else "waiting"] += 1
