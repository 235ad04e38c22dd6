"""What an audit found: counts and findings, as JSON and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["lost", "doubled", "wrong", "fork"]

COUNTS = {
    "acknowledged": "distinct events in the topics",
    "repeated": "the same events again",
    "refused": "records that stand in the dead letters",
    "uncommitted": "records that the joiners have not committed: judged later",
    "joined": "replies that stand in an experience",
    "waiting": "replies without an interaction yet",
    "orphaned": "replies whose interaction did not come in time",
    "late": "replies that came after their interaction's window",
    "excess": "replies beyond what one interaction takes",
    "moved": "replies published under another interaction first",
    "experiences": "interactions that have become experiences",
    "amended": "of these: with more than one reply",
    "expired": "of these: answered by nobody",
    "open": "interactions whose window is open",
    "republished": "records of the experiences topic that repeat or amend another",
    "beyond": "interactions not judged: older than what the topics still hold or than asked for",
    "reused": "interactions not judged: their ids stand for several conversations",
    "versions": "weights versions in the log",
    "lost": "acknowledged, and not where they must be",
    "doubled": "counted more than once",
    "wrong": "experiences or versions that say something else than their events",
    "forks": "breaks in the chain of weights versions",
}
"""Every count, and what it counts; the last four are 0 in a clean report."""

FAULTS = ("lost", "doubled", "wrong", "forks")


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault."""

    kind: Kind
    model_id: str
    subject: str
    """The interaction, reply or version."""
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.subject} of {self.model_id or 'no model'}: {self.what}"


@dataclass(slots=True)
class Report:
    """The outcome of an audit."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    models: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each model: entries in replay, its newest version, and what that has learned."""

    @property
    def clean(self) -> bool:
        """Whether nothing is lost, doubled, wrong or forked."""
        return not self.findings

    @property
    def pending(self) -> int:
        """What is still under way: a later audit judges it."""
        return self.counts["uncommitted"] + self.counts["waiting"] + self.counts["open"]

    def find(self, kind: Kind, model_id: str, subject: str, what: str) -> None:
        """Adds a fault."""
        self.findings.append(Finding(kind, model_id, subject, what))
        self.counts["forks" if kind == "fork" else kind] += 1

    def lines(self, most: int = 50) -> list[str]:
        """The report as text: every count that is not 0, every model, and the first findings."""
        shown = [name for name in COUNTS if self.counts[name] or name in FAULTS]
        out = [f"{self.counts[name]:>10,}  {name:<13}{COUNTS[name]}" for name in shown]
        for model_id, model in sorted(self.models.items()):
            out.append(f"model {model_id}: " + ", ".join(f"{name} {n:,}" for name, n in model.items()))
        out += [str(finding) for finding in self.findings[:most]]
        if len(self.findings) > most:
            out.append(f"and {len(self.findings) - most} more: --json shows all")
        out.append("clean" if self.clean else "NOT clean")
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain values: clean, counts, models, findings."""
        return {
            "clean": self.clean,
            "counts": {name: self.counts[name] for name in COUNTS},
            "models": self.models,
            "findings": [
                {"kind": f.kind, "model_id": f.model_id, "subject": f.subject, "what": f.what}
                for f in self.findings
            ],
        }
