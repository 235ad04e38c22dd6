"""Compares replay and the experiences topic with a brute-force join of the events. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from streams.audit.evidence import Evidence, Experience, Interaction, Key, Reply
from streams.audit.join import Assignment, Joined, join
from streams.audit.report import Report
from streams.audit.versions import check_versions

MAX_REPLIES = 256
"""Maximum number of replies of one interaction."""

AGGREGATE: dict[str, Callable[[Sequence[float]], float]] = {
    "first": lambda rewards: rewards[0],
    "last": lambda rewards: rewards[-1],
    "mean": lambda rewards: math.fsum(rewards) / len(rewards),
    "min": min,
    "max": max,
    "sum": math.fsum,
}


def audit(evidence: Evidence, since: float = 0.0) -> Report:
    """Checks the evidence.

    Args:
        since: interactions that occurred before this time (Unix seconds) are not checked.
    """
    report = Report()
    check_versions(evidence.versions, report)
    joined = join(evidence)
    _Comparison(evidence, joined, since, report).run()
    for record in evidence.unreadable:
        report.add("lost", "", record, "an invalid record, committed without a dead letter")
    for record in evidence.inconsistent:
        report.add("wrong", "", record, "it is invalid or inconsistent")
    report.counts.update(
        refused=evidence.refused,
        uncommitted=evidence.uncommitted,
        forgotten=evidence.forgotten,
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
        self.required: dict[Key, list[Assignment]] = defaultdict(list)
        """Interaction → the replies that its experience must contain."""
        self.allowed: dict[Key, list[Assignment]] = defaultdict(list)
        """Interaction → the replies that its experience may contain."""
        for assignment in joined.replies:
            for candidate in assignment.candidates:
                self.allowed[candidate.key].append(assignment)
            if assignment.certain:
                self.required[assignment.candidates[0].key].append(assignment)
        self.found_in: dict[tuple[str, str], set[Key]] = defaultdict(set)
        """Reply → the interactions whose experiences contain it."""

    def run(self) -> None:
        for interaction in self.joined.interactions:
            self._check_interaction(interaction)
        known = {i.key for i in self.joined.interactions}
        for output, keys in (
            ("replay", self.evidence.stored),
            ("the experiences topic", self.evidence.published),
        ):
            for key in keys:
                if key not in known and not self.evidence.retained_since:
                    self.report.add("wrong", *key, f"it is in {output}, but its interaction is in no topic")
        for model_id, _ in self.evidence.stored:
            model = self.report.models.setdefault(model_id, {})
            model["entries"] = model.get("entries", 0) + 1
        self._check_replies()
        self.report.counts["acknowledged"] = len(self.joined.interactions) + len(self.joined.replies)
        self.report.counts["repeated"] = self.joined.duplicates

    def _check_interaction(self, it: Interaction) -> None:
        counts, evidence = self.report.counts, self.evidence
        if it.key in self.joined.reused:
            counts["reused"] += 1
            return
        complete_from = evidence.retained_since and evidence.retained_since + evidence.window_s
        if it.at < self.since or it.arrived < complete_from:
            counts["beyond"] += 1
            return
        closes = max(it.at + evidence.window_s, it.arrived)
        due = it.committed and closes + evidence.grace_s <= evidence.started
        required = bool(self.required[it.key]) or due
        stored, published = evidence.stored.get(it.key), evidence.published.get(it.key)
        may_be_evicted = self.joined.rank[it.key] >= evidence.capacity
        may_be_evicted |= it.arrived < evidence.models_forgotten.get(it.model_id, 0.0)
        if stored is not None:
            self._check_experience(it, stored, "replay")
        elif it.key in evidence.misfits:
            counts["misfits"] += 1
        elif required and not may_be_evicted:
            self._add_lost(it, "replay")
        current = published.newest if published and required else None
        if current is not None:
            # After its window, only what replay has can be amended.
            amendable = stored is not None or not (may_be_evicted or it.key in evidence.misfits)
            self._check_experience(it, current, "the experiences topic", amendable=amendable)
        elif required:
            self._add_lost(it, "the experiences topic")
        if stored is not None and current is not None:
            self._compare_outputs(it, stored, current)
        if published is not None and published.conflicting:
            what = f"the experiences topic has two contents of version {published.newest.version}"
            self.report.add("wrong", *it.key, what)
        experience = stored or current
        if experience is None:
            counts["open"] += 1
            return
        counts["experiences"] += 1
        counts["amended"] += max(0, len(experience.reply_ids) - 1)
        counts["expired"] += not experience.reply_ids
        allowed = {a.reply.id for a in self.allowed[it.key]}
        for reply_id in allowed.intersection(experience.reply_ids):
            self.found_in[it.conversation_id, reply_id].add(it.key)
        counts["moved"] += len(published.reply_ids - set(experience.reply_ids)) if published else 0

    def _compare_outputs(self, it: Interaction, stored: Experience, current: Experience) -> None:
        """Replay against the experiences topic."""
        differ = set(stored.reply_ids) ^ set(current.reply_ids)
        in_progress = [a for a in self.allowed[it.key] if a.reply.id in differ and not a.final]
        if differ and not in_progress:
            ids = ", ".join(sorted(differ)[:5])
            self.report.add("wrong", *it.key, f"replay and the experiences topic differ in {ids}")
        elif not differ and not math.isclose(stored.reward, current.reward, abs_tol=1e-6):
            what = f"the reward is {stored.reward} in replay, {current.reward} on the experiences topic"
            self.report.add("wrong", *it.key, what)

    def _add_lost(self, it: Interaction, output: str) -> None:
        ids = ", ".join(a.reply.id for a in self.required[it.key][:5])
        why = f"it has the replies {ids}" if ids else "its window has closed"
        self.report.add("lost", *it.key, f"{why}, but {output} has no experience of it")

    def _check_experience(
        self, it: Interaction, experience: Experience, output: str, amendable: bool = True
    ) -> None:
        """Compares one experience with its events.

        Args:
            amendable: False if replay does not have it: a reply could then not be moved out of it.
        """

        def wrong(what: str) -> None:
            self.report.add("wrong", *it.key, f"{output}: {what}")

        ids = set(experience.reply_ids)
        for reply_id in sorted(ids):
            if experience.reply_ids.count(reply_id) > 1:
                self.report.add("doubled", it.model_id, reply_id, f"{output}: {it.id} contains it twice")
        allowed = {a.reply.id: a.reply for a in self.allowed[it.key]}
        foreign = sorted(ids - allowed.keys())
        if foreign and amendable and not self.evidence.retained_since:
            wrong(f"it contains {', '.join(foreign[:5])}, which do not belong to it")
        missing = sorted({a.reply.id for a in self.required[it.key]} - ids)
        if len(ids) >= MAX_REPLIES:
            self.report.counts["excess"] += len(missing)
            missing = []
        for reply_id in missing:
            self.report.add("lost", it.model_id, reply_id, f"{output}: {it.id} does not contain it")
        if experience.digest != it.digest:
            wrong("the features differ from those of the interaction")
        if experience.outcome != ("reply" if experience.reply_ids else "no_reply"):
            wrong(f"the outcome is {experience.outcome} with {len(experience.reply_ids)} replies")
        if not foreign:
            replies = [allowed[reply_id] for reply_id in experience.reply_ids]
            self._check_rewards(replies, experience, wrong)

    def _check_rewards(
        self, replies: Sequence[Reply], experience: Experience, wrong: Callable[[str], None]
    ) -> None:
        if [r.id for r in replies] != [r.id for r in sorted(replies, key=lambda r: r.order)]:
            wrong(f"its replies are not ordered by time: {', '.join(experience.reply_ids[:5])}")
        if len(experience.rewards) != len(replies):
            wrong(f"it has {len(experience.rewards)} readings of {len(replies)} replies")
            return
        for reply, reward in zip(replies, experience.rewards, strict=True):
            if reply.rating is not None and not math.isclose(reply.rating, reward, abs_tol=1e-6):
                wrong(f"the rating of {reply.id} is {reply.rating}, its reward {reward}")
        ratings = [r.rating for r in replies if r.rating is not None]
        if len(ratings) < len(replies):
            return  # rewards of texts are not audited
        wanted = min(max(AGGREGATE[experience.aggregation](ratings), -1.0), 1.0) if ratings else 0.0
        if not math.isclose(wanted, experience.reward, abs_tol=1e-6):
            wrong(f"the reward is {experience.reward}, expected {wanted} from its ratings")

    def _check_replies(self) -> None:
        counts = self.report.counts
        for name, assignment in self.replies.items():
            keys = self.found_in.get(name, set())
            counts["joined"] += bool(keys)
            counts["late"] += assignment.late
            if len(keys) > 1:
                ids = ", ".join(sorted(interaction_id for _, interaction_id in keys))
                what = f"the experiences of {ids} contain it"
                self.report.add("doubled", min(keys)[0], assignment.reply.id, what)
            if not assignment.candidates and assignment.reply.committed:
                counts["orphaned" if assignment.final else "waiting"] += 1
